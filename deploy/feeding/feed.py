"""Sending a stream of events that are bytes already: many a second, in order, at a chosen pace.

The client of `headrace` sends one event at a time through kafka-python, some 120 µs of CPU each at 700 bytes. A replay sends
millions, on the machine that also runs the workers: here whole batches go to one partition at a time, 4 µs an event
(measured on the same machine and broker).
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
from stream.kafka.clients import aiokafka_options, no_answer, started
from stream.kafka.reach import reach
from stream.records.watermark import watermark_header
from stream.settings import KafkaSettings

__all__ = ["Feed", "Pace"]

# Batches in flight, of up to 900 kB: enough to keep several brokers busy, and a bound on memory.
_MAX_UNACKNOWLEDGED = 64
_IDLE_S = 0.5  # how soon a pause notices that it should end


class Feed:
    """An idempotent producer of whole batches; an async context manager.

    Records of one call keep their order within each partition, calls follow one another.
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
            told = error if isinstance(error, NoAnswer) else no_answer(self._kafka, "a producer", error)
            raise FeedError(str(told)) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for future in self._unacknowledged:  # only after an error are there any
            future.cancel()
        await self._producer.stop()

    async def partitions(self, topic: str) -> int:
        """How many partitions a topic has. Raises FeedError when it is missing."""
        if topic not in self._partitions:
            try:
                # A broker that makes topics on demand would make this one with one partition: hence the list first.
                known = await self._producer.client.fetch_all_metadata()
                found = known.partitions_for_topic(topic)
            except KafkaError as error:
                raise FeedError(f"topic {topic!r}: expected its partitions, found {error!r}. Check the brokers.") from error
            if not found:
                raise FeedError(f"topic {topic!r}: expected a topic, found none of that name. Run `headrace topics create`.")
            self._partitions[topic] = len(found)
        return self._partitions[topic]

    async def send(
        self,
        topic: str,
        keys: Sequence[bytes],
        values: Sequence[bytes | None],
        headers: Sequence[list[tuple[str, bytes]]] | None = None,
    ) -> None:
        """Hand records over, each to the partition that murmur2 gives its key. Raises FeedError for earlier failures too."""
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
            raise FeedError(f"topic {topic!r}: expected batches to be taken, found {error!r}. Check the brokers.") from error
        await self._settle(_MAX_UNACKNOWLEDGED)

    async def watermark(self, topics: Iterable[str], watermark_ms: int) -> None:
        """A watermark record to every partition of each topic, behind everything sent before. Raises FeedError."""
        record = (None, b"", [watermark_header(watermark_ms)])
        for topic in topics:
            for partition in range(await self.partitions(topic)):
                try:
                    self._unacknowledged.extend(await send_batches(self._producer, topic, partition, [record]))
                except KafkaError as error:
                    raise FeedError(f"topic {topic!r}: expected a watermark to be taken, found {error!r}.") from error

    async def flush(self) -> None:
        """Wait until everything is acknowledged. Raises FeedError."""
        await self._settle(0)

    async def _settle(self, left: int) -> None:
        while self._unacknowledged and (len(self._unacknowledged) > left or self._unacknowledged[0].done()):
            try:
                await self._unacknowledged.popleft()
            except KafkaError as error:
                raise FeedError(
                    f"a batch of events: expected all in-sync replicas to acknowledge it, found {error!r}. Check the brokers; "
                    "what was sent before is in the log, and sending it again does no harm to the labels."
                ) from error


class Pace:
    """When which event is due: by event time (`speed`), by count (`rate`), or at once (neither)."""

    def __init__(self, *, speed: float | None = None, rate: float | None = None) -> None:
        self._speed = speed
        self._rate = rate
        self._began = 0.0
        self._first_ms = 0

    def begin(self, first_ms: int) -> None:
        """The first event's time is now."""
        self._began = time.monotonic()
        self._first_ms = first_ms

    def due(self, times_ms: np.ndarray, position: int, sent: int, most: int) -> int:
        """Up to which position (exclusive) events may go now: at most `most` further.

        Args:
            times_ms: event times, never falling, of the block at hand.
            position: the next event of the block.
            sent: events sent before, in all.
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
