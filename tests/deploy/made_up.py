"""A data set out of a list, and a reader of topics: for the tests of replays."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from deploy.datasets.base import Chunk
from deploy.settings import Settings
from model.schema import FeatureSchema, FieldSpec

Row = tuple[int, int]  # impression's time, click's delay or -1


def chunk_of(rows: Sequence[Row], first: int = 0) -> Chunk:
    """Impressions of the given times; ids count up."""
    count = len(rows)
    times = np.array([time for time, _ in rows], np.int64)
    delays = np.array([delay for _, delay in rows], np.int64)
    return Chunk(
        ids=[str(first + row) for row in range(count)],
        timestamps_ms=times,
        features=[b'{"u":"u%d","item":"i%d"}' % (row % 7, row % 5) for row in range(count)],
        clicked=delays >= 0,
        click_timestamps_ms=np.where(delays >= 0, times + delays, -1),
        contexts=[b'{"u":"u%d"}' % (row % 7) for row in range(count)],
        candidates=[b'{"item":"i%d"}' % (row % 5) for row in range(count)],
        users=[f"u{row % 7}" for row in range(count)],
        items=[f"i{row % 5}" for row in range(count)],
        pair=lambda user, item: b'"both":"%b-%b"' % (user.encode(), item.encode()),
    )


class MadeUp:
    """A data set of given chunks."""

    name = title = terms = clicks = obtain = "made-up"

    def __init__(self, *chunks: Sequence[Row]) -> None:
        self._rows = chunks

    def schema(self) -> FeatureSchema:
        return FeatureSchema(fields=(FieldSpec(name="u"), FieldSpec(name="item")))

    def find(self) -> Path | None:
        return None

    def fetch(self, progress: Any, archive: Path | None = None) -> Path:
        raise NotImplementedError

    def size(self) -> int:
        return sum(map(len, self._rows))

    def chunks(self) -> Iterator[Chunk]:
        first = 0
        for rows in self._rows:
            yield chunk_of(rows, first)
            first += len(rows)


def read_topic(settings: Settings, name: str) -> list[Any]:
    """Every record of a topic, by partition and offset."""

    async def read() -> list[Any]:
        consumer = AIOKafkaConsumer(bootstrap_servers=settings.kafka.bootstrap_servers, auto_offset_reset="earliest")
        await consumer.start()
        try:
            partitions = [TopicPartition(settings.topics.prefix + name, number) for number in (0, 1)]
            consumer.assign(partitions)
            ends = await consumer.end_offsets(partitions)
            found: list[Any] = []
            for partition in partitions:
                while await consumer.position(partition) < ends[partition]:
                    found += (await consumer.getmany(partition, timeout_ms=500)).get(partition, [])
            return sorted(found, key=lambda record: (record.partition, record.offset))
        finally:
            await consumer.stop()

    return asyncio.run(read())
