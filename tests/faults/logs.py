"""Reads the topics of a run for the ledger, with kafka-python, which the join doesn't use."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.admin import KafkaAdminClient

from tests.faults.ledger import Found

__all__ = ["NAMES", "Logs"]

# The ledger's name of each topic, and the topic's name after the prefix.
NAMES = {"impressions": "impressions", "clicks": "clicks", "examples": "examples", "dead_letters": "dead-letters"}
SOURCES = ("impressions", "clicks")


class Logs:
    """Reads the topics, and continues where it stopped. Every method blocks and may be called from any thread."""

    def __init__(self, bootstrap_servers: str, *, prefix: str, group: str, partitions: int) -> None:
        self._servers, self._group = bootstrap_servers.split(","), prefix + group
        self._topics = {prefix + topic: name for name, topic in NAMES.items()}
        self._partitions = [TopicPartition(topic, number) for topic in self._topics for number in range(partitions)]
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
        """All four topics up to their current ends, with `read_committed`, and the offsets that the join has committed."""
        with self._lock:
            consumer = self._reader()
            partitions = [tp for tp in self._partitions if tp.topic not in self._gone]
            consumer.assign(partitions)
            ends = consumer.end_offsets(partitions)
            while any(consumer.position(tp) < end for tp, end in ends.items()):
                for tp, records in consumer.poll(timeout_ms=200).items():
                    self._records[self._topics[tp.topic]] += records
            sources = [tp for tp in partitions if self._topics[tp.topic] in SOURCES]
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
        return {(self._topics[tp.topic], tp.partition): row.offset for tp, row in found.items() if row.offset >= 0}

    def ends(self, name: str) -> dict[int, int]:
        """The ends of a topic's partitions, with records of open transactions."""
        consumer = KafkaConsumer(bootstrap_servers=self._servers)
        try:
            found = consumer.end_offsets([tp for tp in self._partitions if self._topics[tp.topic] == name])
        finally:
            consumer.close(autocommit=False)
        return {tp.partition: end for tp, end in found.items()}

    def behind(self) -> bool:
        """Whether the sources have records that the join hasn't committed."""
        committed = self.committed()
        return any(committed.get((source, number), 0) < end for source in SOURCES for number, end in self.ends(source).items())

    def written(self) -> dict[str, dict[int, int]]:
        """The ends of the join's outputs."""
        return {name: self.ends(name) for name in ("examples", "dead_letters")}

    def deleted(self, name: str) -> bool:
        """Whether all records of a topic are deleted."""
        consumer = KafkaConsumer(bootstrap_servers=self._servers)
        try:
            partitions = [tp for tp in self._partitions if self._topics[tp.topic] == name]
            return bool(consumer.beginning_offsets(partitions) == consumer.end_offsets(partitions))
        finally:
            consumer.close(autocommit=False)

    def forget(self, topic: str) -> None:
        """Don't read a topic any more, since it was deleted and created again; records of the old topic are kept."""
        self._gone.add(topic)
