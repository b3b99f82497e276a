"""Reading the topics of a run for the ledger, with kafka-python: not the client that the join uses."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.admin import KafkaAdminClient

from tests.faults.ledger import Found

__all__ = ["NAMES", "Logs"]

# As the ledger calls them, and as topics are called behind the prefix.
NAMES = {"impressions": "impressions", "clicks": "clicks", "examples": "examples", "dead_letters": "dead-letters"}
SOURCES = ("impressions", "clicks")


class Logs:
    """Reads on from where it was. Every method blocks, and may be called from any thread."""

    def __init__(self, bootstrap_servers: str, *, prefix: str, group: str, partitions: int) -> None:
        self._servers, self._group = bootstrap_servers.split(","), prefix + group
        self._topics = {prefix + topic: name for name, topic in NAMES.items()}
        self._places = [TopicPartition(topic, number) for topic in self._topics for number in range(partitions)]
        self._records: dict[str, list[Any]] = {name: [] for name in NAMES}
        self._lock = threading.Lock()
        self._consumer: KafkaConsumer | None = None
        self._gone: set[str] = set()

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._consumer is not None:
            self._consumer.close(autocommit=False)

    def _reader(self) -> KafkaConsumer:
        if self._consumer is None:
            self._consumer = KafkaConsumer(
                bootstrap_servers=self._servers,
                isolation_level="read_committed",
                auto_offset_reset="earliest",
                enable_auto_commit=False,
                fetch_max_wait_ms=100,
                max_poll_records=10_000,
            )
        return self._consumer

    def read(self) -> Found:
        """All four topics up to where they end now, as a `read_committed` reader, and what the join has committed."""
        with self._lock:
            consumer = self._reader()
            places = [tp for tp in self._places if tp.topic not in self._gone]
            consumer.assign(places)
            ends = consumer.end_offsets(places)
            while any(consumer.position(tp) < end for tp, end in ends.items()):
                for tp, records in consumer.poll(timeout_ms=200).items():
                    self._records[self._topics[tp.topic]] += records
            sources = [tp for tp in places if self._topics[tp.topic] in SOURCES]
            return Found(
                {name: list(records) for name, records in self._records.items()},
                self.committed(),
                {(self._topics[tp.topic], tp.partition): ends[tp] for tp in sources},
            )

    def committed(self) -> dict[tuple[str, int], int]:
        """The group's offsets, by source and partition."""
        admin = KafkaAdminClient(bootstrap_servers=self._servers)
        try:
            found = admin.list_group_offsets(self._group)[self._group]
        finally:
            admin.close()
        return {(self._topics[tp.topic], tp.partition): at.offset for tp, at in found.items() if at.offset >= 0}

    def ends(self, name: str) -> dict[int, int]:
        """The ends of a topic's partitions, open transactions included."""
        consumer = KafkaConsumer(bootstrap_servers=self._servers)
        try:
            found = consumer.end_offsets([tp for tp in self._places if self._topics[tp.topic] == name])
        finally:
            consumer.close(autocommit=False)
        return {tp.partition: end for tp, end in found.items()}

    def behind(self) -> bool:
        """Whether the join has records to read that it has not committed."""
        committed = self.committed()
        return any(committed.get((source, number), 0) < end for source in SOURCES for number, end in self.ends(source).items())

    def written(self) -> dict[str, dict[int, int]]:
        """How far the join's outputs go."""
        return {name: self.ends(name) for name in ("examples", "dead_letters")}

    def deleted(self, name: str) -> bool:
        """Whether a topic's log has lost all of its records."""
        consumer = KafkaConsumer(bootstrap_servers=self._servers)
        try:
            places = [tp for tp in self._places if self._topics[tp.topic] == name]
            return bool(consumer.beginning_offsets(places) == consumer.end_offsets(places))
        finally:
            consumer.close(autocommit=False)

    def forget(self, topic: str) -> None:
        """Read no more of a topic that was made anew; what was read of the old one stays."""
        self._gone.add(topic)
