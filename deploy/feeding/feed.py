"""Sending a stream of encoded events: many a second, in order, at a chosen pace.

A replay sends millions of events, often on the machine that also runs the workers. The client of `headrace` sends one event at
a time through kafka-python, which takes about 120 µs of CPU for 700 bytes. Here whole batches go to one partition at a time,
which takes 4 µs an event (measured on the same machine and broker).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from deploy.errors import FeedError
from deploy.feeding.partitions import partitions_of
from stream.errors import NoAnswer
from stream.kafka.batches import BATCH_BYTES, send_batches
from stream.kafka.clients import aiokafka_options, started, unreachable
from stream.kafka.cluster import partition_counts
from stream.kafka.reach import reach
from stream.records.watermark import watermark_header
from stream.settings import KafkaSettings

__all__ = ["Feed", "Pace"]

# Batches in flight, each of up to 900 kB: enough to keep several brokers busy, and few enough to bound memory.
_MAX_UNACKNOWLEDGED = 64
_IDLE_S = 0.5  # longest pause, so that a stop is noticed soon


class Feed:
    """An idempotent producer of whole batches; use it as an async context manager.

    Within a partition, records arrive in the order in which they were sent: within a call, and from call to call.
    """

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self._producer: Any = None
        self._unacknowledged: deque[asyncio.Future[Any]] = deque()
        self._partitions: dict[str, int] = {}

    async def __aenter__(self) -> Feed:
        try:
            await reach(self._kafka)
            self._producer = AIOKafkaProducer(
                **aiokafka_options(self._kafka),
                acks="all",
                enable_idempotence=True,
                max_batch_size=BATCH_BYTES,
                max_request_size=2 * BATCH_BYTES,
            )
            await started(self._kafka, self._producer, "a producer")
        except (KafkaError, NoAnswer) as error:
            failure = error if isinstance(error, NoAnswer) else unreachable(self._kafka, "an answer about a producer", error)
            raise FeedError(str(failure)) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for future in self._unacknowledged:  # there are some only after an error
            future.cancel()
        await self._producer.stop()

    async def partitions(self, topic: str) -> int:
        """How many partitions a topic has. Raises FeedError when it is missing."""
        if topic not in self._partitions:
            try:
                count = (await partition_counts(self._kafka, [topic])).get(topic)
            except (KafkaError, NoAnswer) as error:
                raise FeedError(f"topic {topic!r}: expected its partitions, found {error!r}. Check the brokers.") from error
            if not count:
                raise FeedError(f"topic {topic!r}: expected a topic, found none with that name. Run `headrace topics create`.")
            self._partitions[topic] = count
        return self._partitions[topic]

    async def send(
        self,
        topic: str,
        keys: Sequence[bytes],
        values: Sequence[bytes | None],
        headers: Sequence[list[tuple[str, bytes]]] | None = None,
    ) -> None:
        """Send records, each to the partition of its key by murmur2.

        Raises:
            FeedError: these records could not be sent, or Kafka rejected some that were sent before.
        """
        if not keys:
            return
        count = await self.partitions(topic)
        of = partitions_of(keys, count)
        order = np.argsort(of, kind="stable")
        cuts = np.searchsorted(of[order], np.arange(count + 1))
        sends = []
        for partition in range(count):
            rows = order[cuts[partition] : cuts[partition + 1]].tolist()
            if rows:
                records = [(keys[i], values[i], headers[i] if headers else []) for i in rows]
                sends.append(send_batches(self._producer, topic, partition, records))
        try:
            for futures in await asyncio.gather(*sends):
                self._unacknowledged.extend(futures)
        except KafkaError as error:
            raise FeedError(
                f"topic {topic!r}: expected the brokers to accept batches, found {error!r}. Check the brokers."
            ) from error
        await self._settle(_MAX_UNACKNOWLEDGED)

    async def watermark(self, topics: Iterable[str], watermark_ms: int) -> None:
        """Send a watermark record to every partition of each topic, after everything sent before. Raises FeedError."""
        record = (None, b"", [watermark_header(watermark_ms)])
        for topic in topics:
            for partition in range(await self.partitions(topic)):
                try:
                    self._unacknowledged.extend(await send_batches(self._producer, topic, partition, [record]))
                except KafkaError as error:
                    raise FeedError(
                        f"topic {topic!r}: expected the brokers to accept a watermark, found {error!r}. Check the brokers."
                    ) from error

    async def flush(self) -> None:
        """Wait until Kafka has acknowledged everything. Raises FeedError."""
        await self._settle(0)

    async def _settle(self, left: int) -> None:
        while self._unacknowledged and (len(self._unacknowledged) > left or self._unacknowledged[0].done()):
            try:
                await self._unacknowledged.popleft()
            except KafkaError as error:
                raise FeedError(
                    f"a batch of events: expected all in-sync replicas to acknowledge it, found {error!r}. Check the brokers; "
                    "what was sent before is in the log, and sending it again does not change any label."
                ) from error


class Pace:
    """When each event is due: by event time (`speed`), by count (`rate`), or at once (neither)."""

    def __init__(self, *, speed: float | None = None, rate: float | None = None) -> None:
        self._speed = speed
        self._rate = rate
        self._began = 0.0
        self._first_ms = 0

    def begin(self, first_ms: int) -> None:
        """Start the clock: an event at `first_ms` is due now."""
        self._began = time.monotonic()
        self._first_ms = first_ms

    def due(self, times_ms: np.ndarray, position: int, sent: int, most: int) -> int:
        """The position up to which (exclusive) events are due now, at most `most` beyond `position`.

        Args:
            times_ms: event times of the block, never falling.
            position: the next event of the block.
            sent: events sent so far, over all blocks.
        """
        stop = min(position + most, len(times_ms))
        elapsed = time.monotonic() - self._began
        if self._speed is not None:
            now_ms = self._first_ms + elapsed * 1_000 * self._speed
            stop = min(stop, int(np.searchsorted(times_ms, now_ms, side="right")))
        if self._rate is not None:
            stop = min(stop, position + max(0, int(elapsed * self._rate) + 1 - sent))
        return stop

    def pause_s(self, next_ms: int, sent: int) -> float:
        """How long to sleep until the next event is due, at most half a second."""
        elapsed = time.monotonic() - self._began
        waits = [0.01]  # a tick: finer ones cost more than they smooth
        if self._speed is not None:
            waits.append((next_ms - self._first_ms) / 1_000 / self._speed - elapsed)
        if self._rate is not None:
            waits.append(sent / self._rate - elapsed)
        return min(max(waits), _IDLE_S)
