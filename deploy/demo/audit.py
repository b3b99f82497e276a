"""What the topics hold after a run, counted as a `read_committed` reader. The demo's exit code is decided by this ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from deploy.settings import Settings
from stream.kafka.clients import aiokafka_options
from stream.kafka.read_log import read_to
from stream.records.dead_letter import read_letter
from stream.records.example import CORRECTION, FIRST, read_example
from stream.records.join_notes import read_left_out, read_matched
from stream.records.record import Record
from stream.topics.names import TopicNames

__all__ = ["Audit", "Ledger", "Position"]


class Position(NamedTuple):
    """Where a record lies in a topic."""

    partition: int
    offset: int


@dataclass(slots=True)
class Ledger:
    """What came in and what was written, by impression id and by the records' positions."""

    impressions: dict[Position, bytes] = field(default_factory=dict)
    labels: Counter[bytes] = field(default_factory=Counter)  # first labels
    corrections: Counter[bytes] = field(default_factory=Counter)
    left_out: Counter[Position] = field(default_factory=Counter)  # impressions whose negatives `join.negative_rate` left out
    positives: dict[bytes, Position] = field(default_factory=dict)  # id → position of its example
    clicked_at_ms: dict[bytes, int] = field(default_factory=dict)  # id → arrival of its first click
    clicks: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)

    def problems(self) -> list[str]:
        """What is not exactly once.

        The list is empty when

        - every impression has one first label or was left out, once;
        - nothing else has a first label;
        - every correction is the only one of its impression, which has a click.
        """
        sent = dict.fromkeys(self.impressions.values())
        settled = self.labels.copy()
        for at, count in self.left_out.items():
            settled[self.impressions.get(at, b"offset %d of partition %d" % (at.offset, at.partition))] += count
        found = []
        for name, keys in (
            ("without a label", [key for key in sent if key not in settled]),
            ("with two labels", [key for key, count in settled.items() if count > 1]),
            ("labelled, but never sent", [key for key in settled if key not in sent]),
            ("with two corrections", [key for key, count in self.corrections.items() if count > 1]),
            ("corrected, but never labelled", [key for key in self.corrections if key not in settled]),
            ("corrected, but never clicked", [key for key in self.corrections if key not in self.clicked_at_ms]),
        ):
            if keys:
                shown = ", ".join(key.decode(errors="replace") for key in keys[:5])
                found.append(f"{len(keys)} impressions {name}: {shown}{', …' if len(keys) > 5 else ''}")
        return found


class Audit:
    """Reads `impressions`, `clicks`, `examples` and `dead-letters` from their beginnings, at each call up to their ends."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._names = settings, TopicNames.of(settings.topics)
        self._consumer: AIOKafkaConsumer | None = None
        self.ledger = Ledger()

    async def __aenter__(self) -> Audit:
        consumer = AIOKafkaConsumer(
            **aiokafka_options(self._settings.kafka),
            enable_auto_commit=False,
            isolation_level="read_committed",
            max_partition_fetch_bytes=8 << 20,
        )
        await consumer.start()
        self._consumer = consumer
        names = self._names
        topics = (names.impressions, names.clicks, names.examples, names.dead_letters)
        parts = [TopicPartition(topic, number) for topic in topics for number in range(self._settings.topics.partitions)]
        consumer.assign(parts)
        await consumer.seek_to_beginning()
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._consumer is not None:
            await self._consumer.stop()

    async def read(self) -> Ledger:
        """Read up to the ends of the logs as they are now."""
        consumer = self._consumer
        assert consumer is not None
        ends = await consumer.end_offsets(list(consumer.assignment()))
        async for tp, records in read_to(consumer, ends, poll_ms=300, max_records=20_000):
            self._add(tp, records)
        return self.ledger

    def _add(self, tp: TopicPartition, records: Sequence[Record]) -> None:
        ledger, names = self.ledger, self._names
        if tp.topic == names.impressions:
            for record in records:
                if record.key is not None:
                    ledger.impressions[Position(tp.partition, record.offset)] = record.key
        elif tp.topic == names.clicks:
            for record in records:
                if record.key is not None:
                    ledger.clicks += 1
                    ledger.clicked_at_ms.setdefault(record.key, record.timestamp)
        elif tp.topic == names.dead_letters:
            ledger.dead_letters.update(letter.reason for letter in map(read_letter, records) if letter is not None)
        else:
            for record in records:
                self._add_example(tp.partition, record)

    def _add_example(self, partition: int, record: Record) -> None:
        ledger = self.ledger
        left_out = read_left_out(record)
        if left_out is not None:
            ledger.left_out.update(Position(partition, offset) for offset in left_out)
            return
        if read_matched(record) is not None:
            return
        example = read_example(record)
        if example.kind == FIRST:
            ledger.labels[example.key] += 1
        elif example.kind == CORRECTION:
            ledger.corrections[example.key] += 1
        if example.click_ms >= 0:
            ledger.positives[example.key] = Position(partition, record.offset)
