"""Sends the streams with a producer that outlasts every fault and isn't affected by the join's quotas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import groupby
from types import TracebackType
from typing import Any

from aiokafka import AIOKafkaProducer

from deploy.feeding.feed import Feed
from deploy.settings import Settings
from stream.kafka.clients import aiokafka_options
from stream.topics.names import TopicNames
from tests.faults.stream import CLICKS, IMPRESSIONS, Sent

__all__ = ["Sender"]

PATIENCE_MS = 120_000
MOST_BYTES = 8 << 20
ROWS = 25  # sent together


class Sender:
    """Sends records to the sources; an async context manager."""

    def __init__(self, settings: Settings) -> None:
        names = TopicNames.of(settings.topics)
        self._topics = {IMPRESSIONS: names.impressions, CLICKS: names.clicks}
        self._kafka = settings.kafka.model_copy(update={"request_timeout_ms": PATIENCE_MS, "client_id": "faults"})
        self._feed = Feed(self._kafka)
        self._packers: dict[str, Any] = {}

    async def __aenter__(self) -> Sender:
        await self._feed.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._feed.__aexit__(kind, error, trace)
        for packer in self._packers.values():
            await packer.stop()

    async def send(self, rows: Sequence[Sent], *, over_s: float) -> None:
        """Send rows in their order, evenly over `over_s` seconds."""
        began = time.monotonic()
        for start in range(0, len(rows), ROWS):
            for codec, some in groupby(rows[start : start + ROWS], key=lambda row: row.codec):
                if codec:
                    await self._pack(codec, list(some))
                else:
                    await self._plain(list(some))
            await self._feed.flush()
            await asyncio.sleep(max(0.0, began + over_s * (start + ROWS) / len(rows) - time.monotonic()))

    async def watermark(self, watermark_ms: int) -> None:
        """Send a watermark to all partitions of both sources: no older event comes any more."""
        await self._feed.watermark(self._topics.values(), watermark_ms)
        await self._feed.flush()

    async def _plain(self, rows: list[Sent]) -> None:
        for source, topic in self._topics.items():
            mine = [row for row in rows if row.source == source]
            await self._feed.send(topic, [row.key for row in mine], [row.value for row in mine])

    async def _pack(self, codec: str, rows: list[Sent]) -> None:
        if codec not in self._packers:
            producer = AIOKafkaProducer(
                **aiokafka_options(self._kafka), acks="all", compression_type=codec, max_request_size=MOST_BYTES
            )
            await producer.start()
            self._packers[codec] = producer
        producer = self._packers[codec]
        sends = [await producer.send(self._topics[row.source], row.value, row.key) for row in rows]
        await asyncio.gather(*sends)
