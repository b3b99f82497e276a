"""What the topics hold after a run, counted as a `read_committed` reader: the ledger that the demo's exit code goes by."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from deploy.settings import Settings
from stream.kafka.clients import aiokafka_options
from stream.kafka.read_log import read_to
from stream.letters.log import read_letter
from stream.records.example import left_out_of
from stream.topics.names import TopicNames

__all__ = ["Audit", "Ledger", "Place"]

Place = tuple[int, int]  # partition, offset


@dataclass(slots=True)
class Ledger:
    """What came in and what went out, by impression id; a place is a partition and an offset in it."""

    impressions: dict[Place, bytes] = field(default_factory=dict)
    labels: Counter[bytes] = field(default_factory=Counter)  # first labels
    corrections: Counter[bytes] = field(default_factory=Counter)
    left_out: Counter[Place] = field(default_factory=Counter)  # impressions whose negatives `join.negative_rate` left out
    positives: dict[bytes, Place] = field(default_factory=dict)  # id → place of its example
    clicked_at_ms: dict[bytes, int] = field(default_factory=dict)  # id → arrival of its first click
    clicks: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)

    def problems(self) -> list[str]:
        """What is not exactly once.

        Empty when every impression has one first label or was left out, once, nothing else has one, and every correction is
        the only one of an impression that has a click.
        """
        sent = dict.fromkeys(self.impressions.values())
        settled = self.labels.copy()
        for place, count in self.left_out.items():
            settled[self.impressions.get(place, b"offset %d of partition %d" % place[::-1])] += count
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

    def click_to_served_ms(self, served: list[tuple[int, dict[str, int], int]]) -> npt.NDArray[np.float64]:
        """From a click's arrival to the moment a model that learned from it answers requests, a click at a time.

        `served`: (version, its offsets, since when it is served in ms), of every version that was. A click that no served
        version has learned from is left out.
        """
        waits: list[float] = []
        by_partition: dict[int, tuple[list[int], list[int]]] = {}
        for _, offsets, since_ms in sorted(served, key=lambda row: row[2]):
            for partition, offset in offsets.items():
                reach, since = by_partition.setdefault(int(partition), ([], []))
                if not reach or offset > reach[-1]:
                    reach.append(offset)
                    since.append(since_ms)
        for key, (number, position) in self.positives.items():
            arrived = self.clicked_at_ms.get(key)
            reach, since = by_partition.get(number, ([], []))
            index = int(np.searchsorted(reach, position, side="right"))
            if arrived is not None and index < len(since):
                waits.append(max(since[index] - arrived, 0))
        return np.array(waits, dtype=np.float64)


class Audit:
    """Reads `impressions`, `clicks`, `examples` and `dead-letters` from their beginnings, as far as they go at each call."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._names = settings, TopicNames.of(settings.topics)
        self._consumer: Any = None
        self.ledger = Ledger()

    async def __aenter__(self) -> Audit:
        self._consumer = AIOKafkaConsumer(
            **aiokafka_options(self._settings.kafka),
            enable_auto_commit=False,
            isolation_level="read_committed",
            max_partition_fetch_bytes=8 << 20,
        )
        await self._consumer.start()
        names = self._names
        topics = (names.impressions, names.clicks, names.examples, names.dead_letters)
        parts = [TopicPartition(topic, number) for topic in topics for number in range(self._settings.topics.partitions)]
        self._consumer.assign(parts)
        await self._consumer.seek_to_beginning()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._consumer.stop()

    async def read(self) -> Ledger:
        """Read on to the ends of the logs as they are now."""
        ends = await self._consumer.end_offsets(list(self._consumer.assignment()))
        async for tp, records in read_to(self._consumer, ends, poll_ms=300, max_records=20_000):
            self._add(tp, records)
        return self.ledger

    def _add(self, tp: TopicPartition, records: list[Any]) -> None:
        ledger, names = self.ledger, self._names
        if tp.topic == names.impressions:
            for record in records:
                if record.key is not None:
                    ledger.impressions[tp.partition, record.offset] = record.key
        elif tp.topic == names.clicks:
            for record in records:
                if record.key is not None:
                    ledger.clicks += 1
                    ledger.clicked_at_ms.setdefault(record.key, record.timestamp)
        elif tp.topic == names.dead_letters:
            ledger.dead_letters.update(letter.reason for letter in map(read_letter, records) if letter is not None)
        else:
            for record in records:
                offsets = left_out_of(record)
                if offsets is not None:
                    ledger.left_out.update((tp.partition, offset) for offset in offsets)
                    continue
                headers = dict(record.headers)
                if headers["kind"] == b"matched":
                    continue  # the join's own note of a click that waits for a label
                if headers["kind"] == b"first":
                    ledger.labels[record.key] += 1
                elif headers["kind"] == b"correction":
                    ledger.corrections[record.key] += 1
                if headers["label"] == b"1":
                    ledger.positives[record.key] = (tp.partition, record.offset)
