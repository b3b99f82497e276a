"""Reads deltas: the one partition of the topic `deltas`, committed records only, without a consumer group."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from stream.deltas.pieces import DeltaProblem, FoundDelta, Pieces
from stream.kafka.clients import answer, quietly_stopped, started, unreachable
from stream.kafka.cluster import describe_cluster
from stream.kafka.read_log import log_consumer, log_spans
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer, TopicPartition

__all__ = ["DeltaReader", "read_back"]

logger = logging.getLogger(__name__)

# Size of one answer. A delta of 100,000 rows has 8 MB; a reader holds two answers at most, and the delta that it joins.
FETCH_BYTES = 8 * 1024 * 1024
# One wait for records: while reading to a known end, and for ever. Records end the wait at once.
POLL_MS, FOLLOW_MS = 200, 1_000
# Wait before a new connection after an error that the client couldn't recover from.
RECONNECT_S = 1.0
# A delta is written in one transaction, so all its pieces are visible at once. Only a copy of the topic on another cluster may
# end in the middle of a delta, for as long as the copying takes.
UNFINISHED_S = 5.0
# How long `read_back` waits for a broker that sends nothing.
STALL_S = 20.0


class DeltaReader:
    """Reads deltas in the order of the log, each one whole, or a problem in its place.

    ```python
    reader = DeltaReader(settings.kafka, names, start=version.deltas_offset)
    await reader.open()
    async for found in reader:  # a FoundDelta or a DeltaProblem; goes on for ever
        ...
    ```

    A reader that is open goes on whatever happens to Kafka: it connects again, and continues at `position`. Where the log no
    longer has that offset, it reports the problem `log_gone` and continues at the log's first offset. A topic that was deleted
    and created again looks the same, unless the new log is as long as the old one already: then the sequence or the digest of
    the next delta is wrong.

    Args:
        start: the first offset to read; None: the end of the log at `open`.
    """

    def __init__(self, kafka: KafkaSettings, names: TopicNames, *, start: int | None) -> None:
        self._kafka, self._topic = kafka, names.deltas
        self._next = start
        self._pieces = Pieces()
        self._found: deque[FoundDelta | DeltaProblem] = deque()
        self._consumer: AIOKafkaConsumer = None
        self._partition: TopicPartition = None
        self._unfinished_since: float | None = None
        self._careful = False  # read one record at a time, to find a batch that is damaged

    @property
    def position(self) -> int:
        """The next offset to read: nothing at or above it has been returned. -1 before `open`."""
        if self._found:
            return self._found[0].offset
        started_at = self._pieces.started_at
        return (-1 if self._next is None else self._next) if started_at is None else started_at

    @property
    def at_end(self) -> bool:
        """Whether everything that the log was last seen to hold has been returned."""
        if self._consumer is None or self._found or self._next is None:
            return False
        stable = self._consumer.last_stable_offset(self._partition)
        return self._pieces.started_at is None and stable is not None and self._next >= stable

    @property
    def seen_end_at(self) -> float | None:
        """When (`time.monotonic()`) a broker last said where the log ends; None before, and while it can't be asked."""
        if self._consumer is None:
            return None
        fetched_at_ms = self._consumer.last_poll_timestamp(self._partition)
        return None if fetched_at_ms is None else time.monotonic() - max(0.0, time.time() - fetched_at_ms / 1_000)

    async def open(self) -> None:
        """Connect.

        Raises:
            TopicError: the topic doesn't exist.
            NoAnswer: Kafka can't be reached.
        """
        from aiokafka.errors import KafkaError

        await describe_cluster(self._kafka, (self._topic,))
        try:
            await self._connect()
        except KafkaError as error:
            raise unreachable(self._kafka, "an answer about deltas", error) from error

    async def next(self, *, timeout_s: float) -> FoundDelta | DeltaProblem | None:
        """The next delta or problem; None when nothing has come in time.

        Raises nothing, whatever happens to Kafka. It may take longer than `timeout_s` while it connects again.
        """
        deadline = time.monotonic() + timeout_s
        while not self._found:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            await self._read(left_s)
        return self._found.popleft()

    def __aiter__(self) -> AsyncIterator[FoundDelta | DeltaProblem]:
        return self._forever()

    async def _forever(self) -> AsyncIterator[FoundDelta | DeltaProblem]:
        while True:
            found = await self.next(timeout_s=FOLLOW_MS / 1_000)
            if found is not None:
                yield found

    async def until(self, end: int) -> AsyncIterator[FoundDelta | DeltaProblem]:
        """What begins below an offset of the log, to the last. A delta that is not whole there is a problem.

        Raises:
            NoAnswer: nothing has come for `STALL_S`.
        """
        seen, moved = self._next, time.monotonic()
        while self._found or self._next is None or self._next < end:
            found = await self.next(timeout_s=POLL_MS / 1_000)
            if found is not None:
                yield found
            if self._next != seen or found is not None:
                seen, moved = self._next, time.monotonic()
            elif time.monotonic() - moved > STALL_S:
                raise unreachable(self._kafka, f"deltas up to offset {end}", f"none after {self._next} for {STALL_S:.0f} s")
        for problem in self._pieces.give_up(end):
            yield problem

    async def end(self) -> int:
        """The end of the log as it is now: the last stable offset.

        Raises:
            NoAnswer: Kafka can't be reached.
        """
        from aiokafka.errors import KafkaError

        try:
            return (await log_spans(self._kafka, self._consumer, (self._partition,)))[self._partition].end
        except KafkaError as error:
            raise unreachable(self._kafka, "the end of deltas", error) from error

    async def close(self) -> None:
        """Disconnect."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await quietly_stopped(consumer.stop)

    async def _connect(self) -> None:
        from aiokafka.structs import TopicPartition

        consumer = log_consumer(self._kafka, max_partition_fetch_bytes=FETCH_BYTES)
        await started(self._kafka, consumer, "deltas")
        partition = TopicPartition(self._topic, 0)
        try:
            if self._next is None:
                ends = await answer(self._kafka, consumer.end_offsets([partition]), "the end of deltas")
                self._next = int(ends[partition])
        except BaseException:
            await quietly_stopped(consumer.stop)
            raise
        # No await between these: a fetch must not begin without a position.
        consumer.assign([partition])
        consumer.seek(partition, self._next)
        self._consumer, self._partition = consumer, partition

    async def _read(self, within_s: float) -> None:
        """Wait for records once, and look for deltas in them."""
        from aiokafka.errors import CorruptRecordException, OffsetOutOfRangeError

        try:
            if self._consumer is None:
                await self._connect()
            try:
                await self._fetch(min(int(within_s * 1_000) + 1, FOLLOW_MS))
            except OffsetOutOfRangeError:
                await self._go_on_at_start()
            except CorruptRecordException as error:
                await self._go_on_behind(error)
        except Exception as error:
            logger.warning("%s: lost at offset %s, connecting again: %s", self._topic, self._next, repr(error))
            await self.close()
            await asyncio.sleep(min(within_s, RECONNECT_S))

    async def _fetch(self, timeout_ms: int) -> None:
        most = 1 if self._careful else None
        fetched = (await self._consumer.getmany(self._partition, timeout_ms=timeout_ms, max_records=most)).get(self._partition)
        for record in fetched or ():
            self._careful = False
            self._found += self._pieces.add(record)
        self._next = int(await self._consumer.position(self._partition))
        if self._pieces.started_at is None or fetched:
            self._unfinished_since = None
        elif self._unfinished_since is None:
            self._unfinished_since = time.monotonic()
        elif time.monotonic() - self._unfinished_since > UNFINISHED_S:
            self._found += self._pieces.give_up(self._next)

    async def _go_on_at_start(self) -> None:
        """The log doesn't have the next offset: retention has deleted it, or the topic was deleted and created again."""
        assert self._next is not None
        span = (await log_spans(self._kafka, self._consumer, (self._partition,)))[self._partition]
        message = f"{self._topic}: expected offset {self._next}, found a log from {span.start} to {span.end}."
        self._found.append(self._pieces.broken_at("log_gone", message, self._next, span.start))
        self._consumer.seek(self._partition, span.start)
        self._next = span.start

    async def _go_on_behind(self, error: Exception) -> None:
        """A batch was damaged inside the cluster, and what was fetched before it is lost.

        Fetch again, a record at a time, to find the batch. Then go on one offset further: a batch of a delta has one record.
        """
        assert self._next is not None
        if self._careful:
            message = f"{self._topic}: expected a batch as it was written at offset {self._next}, found another: {error}."
            self._found.append(self._pieces.broken_at("checksum", message, self._next, self._next + 1))
            self._next += 1
        self._careful = True
        await self.close()  # aiokafka would go on silently behind the batch


async def read_back(kafka: KafkaSettings, names: TopicNames, start: int) -> AsyncIterator[FoundDelta | DeltaProblem]:
    """Every delta from an offset to the end of the log as it is now, and every problem; for a trainer that starts.

    Raises:
        TopicError: the topic doesn't exist.
        NoAnswer: Kafka can't be reached.
    """
    reader = DeltaReader(kafka, names, start=start)
    await reader.open()
    try:
        end = await reader.end()
        if start > end:  # a fetch says so too, but not before there is something to wait for
            await reader._go_on_at_start()
        async for found in reader.until(end):
            yield found
    finally:
        await reader.close()
