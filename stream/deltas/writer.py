"""Writes deltas: one transaction each, by one writer at a time.

All writers share one transactional id, which works as the lock, and each has the epoch of its trainer. Two rules keep the log
in order:

1. Starting a producer (InitProducerId) ends the former producer's open transaction, and lets none of its commits succeed.
2. After each such start, a writer reads the newest epoch in the registry. If that is newer than its own, the writer ends.

A trainer takes its epoch before it opens its writer. So once a newer writer has started its producer, an older one writes
nothing more: when it starts a producer again, rule 2 ends it. By that it may fence the newer writer, which then starts its
producer again.

After a failure a writer can't know whether its transaction was committed: perhaps only the answer was lost. It starts a
producer, which settles the transaction, and looks for the delta in the log, from the former end on.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from model.rows import ModelDelta
from stream.errors import DeltaTooLarge, Fenced, NoAnswer, TopicError, Unsettled
from stream.kafka.batches import send_batches
from stream.kafka.clients import aiokafka_options, quietly_stopped, started, unreachable, written
from stream.kafka.cluster import describe_cluster
from stream.kafka.read_log import Span, log_consumer, log_spans, read_spans
from stream.kafka.transactional import dropped, is_fencing, retrieve
from stream.records.delta import DeltaDamaged, DeltaHeader, encode_delta, read_piece
from stream.registry.log import read_registry
from stream.settings import KafkaSettings
from stream.topics.limits import max_message_bytes
from stream.topics.names import TopicNames

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

__all__ = ["DeltaWriter", "Sent", "deltas_transactional_id"]

logger = logging.getLogger(__name__)

# Limit for one attempt, and what a large delta gets in addition: a delta of 100,000 rows has 8 MB, one of all 10 M rows 800 MB.
ATTEMPT_TIMEOUT_S = 20.0
SLOWEST_BYTES_S = 10e6
# The broker ends the open transaction of a dead writer after this, or when the next one opens. Nobody else writes to the topic,
# so nobody waits for it in vain. Longer than an attempt, and no longer than what `headrace doctor` reports as hanging.
TRANSACTION_TIMEOUT_MS = 60_000
# Longest wait before an attempt. The wait is random, so that two writers don't keep fencing each other in step.
MAX_BACKOFF_S = 1.0
# How often a writer may be fenced in one operation although its epoch is the newest. More often means two writers of one epoch.
MAX_FENCED = 8
# How long an operation is tried while Kafka doesn't answer.
GIVE_UP_S = 60.0
# Larger records don't get faster. A writer and its readers hold a few at once.
MAX_LIMIT_BYTES = 4 * 1024 * 1024
# Longest wait in which no broker sends anything, while the end of the log is read.
STALL_S = 10.0

T = TypeVar("T")
_Name = tuple[int, int, int]  # epoch, ordinal, sequence


@dataclass(frozen=True, slots=True)
class Sent:
    """A delta that is in the log: the offset of its first record, the offset after its last one, and its arrival.

    arrived_ms  by the broker's clock (ms since epoch)
    size        bytes of its records' values
    """

    offset: int
    next_offset: int
    arrived_ms: int
    size: int


class DeltaWriter:
    """Writes deltas to the topic `deltas`.

    ```python
    writer = DeltaWriter(settings.kafka, names, epoch=epoch)  # an epoch that the registry has given out
    await writer.open()                                       # older writers can write no more; `position` is the log's end
    sent = await writer.publish(header, learner.take_delta())
    await writer.close()
    ```

    Every method raises:

    - `Fenced` when a newer trainer has taken over. The writer is of no more use.
    - `NoAnswer` when Kafka can't be reached, and `TopicError` when the topic doesn't exist or was created again. Nothing was
      written then, but for `Unsettled`.
    """

    def __init__(self, kafka: KafkaSettings, names: TopicNames, *, epoch: int) -> None:
        self._kafka, self._names, self._topic, self._epoch = kafka, names, names.deltas, epoch
        self._transactional_id = deltas_transactional_id(names)
        self._producer: AIOKafkaProducer = None
        self._topic_id = ""
        self._unsettled: _Name | None = None  # a delta of which nobody knows whether it is written
        self._lock = asyncio.Lock()
        self.position = 0
        """The end of the log as this writer knows it: the offset after its own last delta, at least."""
        self.limit = 0
        """Largest batch in bytes that the topic takes: the last argument of `encode_delta`."""

    async def open(self) -> None:
        """Fence every older writer, and find the end of the log."""
        async with self._lock:
            found = await describe_cluster(self._kafka, (self._topic,))
            self._topic_id = found.topic_ids[self._topic]
            await self._read_limit()
            await self._tried(self._begin, "the end of deltas", size=0)

    async def publish(self, header: DeltaHeader, delta: ModelDelta) -> Sent:
        """Encode a delta in a thread, and send it; once more if the topic's limit was lowered meanwhile.

        Raises:
            Unsettled: as `send`. The same delta must then be published again.
            ValueError: as `encode_delta`.
        """
        try:
            return await self.send(await asyncio.to_thread(encode_delta, header, delta, self.limit))
        except DeltaTooLarge as error:
            logger.info("%s", error)
        return await self.send(await asyncio.to_thread(encode_delta, header, delta, self.limit))

    async def send(self, pieces: Sequence[bytes]) -> Sent:
        """Write a delta in one transaction: readers see all of it or nothing.

        After a failure the delta is looked for in the log, and sent again if it isn't there, for `GIVE_UP_S`.

        Args:
            pieces: of one delta of this writer's epoch, as `encode_delta` returns them.

        Raises:
            Unsettled: Kafka didn't answer for so long. The delta may have been written. Send the same delta again: it won't be
                in the log twice. Another one is rejected with a ValueError until then.
            DeltaTooLarge: the topic takes smaller records only. Nothing was written; `limit` has the topic's limit now.
        """
        first = read_piece(pieces[0])
        name, size = (first.epoch, first.ordinal, first.sequence), sum(map(len, pieces))
        if first.epoch != self._epoch:
            raise ValueError(
                f"expected a delta of epoch {self._epoch}, found {first.name}. Each epoch has a writer of its own."
            )

        async def attempt() -> Sent:
            if self._producer is None:
                await self._take_over()
                if self._unsettled is not None and (found := await self._find(name)) is not None:
                    return found
            self._unsettled = name
            return await self._commit(pieces)

        async with self._lock:
            if self._unsettled not in (None, name):
                raise ValueError(f"expected the delta that isn't settled, {self._unsettled}, again, found {name}.")
            sent = await self._tried(attempt, first.name, size=size)
            self._unsettled, self.position = None, sent.next_offset
            return sent

    async def close(self) -> None:
        """Disconnect."""
        async with self._lock:
            await self._drop()

    async def _tried(self, attempt: Callable[[], Awaitable[T]], what: str, *, size: int) -> T:
        """Try an operation until it succeeds, can't succeed, or the time is up. A producer is only kept after a success."""
        from aiokafka.errors import KafkaError, MessageSizeTooLargeError

        deadline, fenced, failures = time.monotonic() + GIVE_UP_S, 0, 0
        while True:
            try:
                async with asyncio.timeout(ATTEMPT_TIMEOUT_S + size / SLOWEST_BYTES_S):
                    return await attempt()
            except MessageSizeTooLargeError as error:
                await self._drop()
                before = self.limit
                await self._read_limit()
                self._unsettled = None  # dropping the producer has aborted the transaction, or the next one to start will
                raise DeltaTooLarge(
                    f"topic {self._topic}: expected to take records of {before:,} bytes, found a limit of {self.limit:,}."
                ) from error
            except (KafkaError, NoAnswer, TimeoutError, _CommitFailed) as error:
                failure: BaseException = error.__cause__ or error
                await self._drop()
            except BaseException:
                await self._drop()
                raise
            failures += 1
            fenced += is_fencing(failure)
            logger.info("%s: attempt %d failed, starting over: %r", what, failures, failure)
            if fenced > MAX_FENCED:
                raise Fenced(
                    f"{self._topic}: expected to be the only writer of epoch {self._epoch}, found another one {fenced} times. "
                    "Two trainers must not have one epoch."
                ) from failure
            if time.monotonic() > deadline:
                gone = unreachable(self._kafka, f"an answer about {what}", failure)
                raise (gone if self._unsettled is None else Unsettled(f"{gone} It may have been written.")) from failure
            await asyncio.sleep(random.uniform(0, min(MAX_BACKOFF_S, 0.05 * 2**failures)))

    async def _begin(self) -> None:
        await self._take_over()
        async with self._reader() as (consumer, partition):
            self.position = (await log_spans(self._kafka, consumer, (partition,)))[partition].end

    async def _take_over(self) -> None:
        """Start a producer, then read whether a newer trainer has taken an epoch, in this order: see the rules above."""
        from aiokafka import AIOKafkaProducer

        found = (await describe_cluster(self._kafka, (self._topic,), retry=False)).topic_ids[self._topic]
        if found != self._topic_id:
            raise TopicError(
                f"topic {self._topic}: expected the topic with id {self._topic_id}, found {found}: it was deleted and made "
                "anew. Start the trainer again; it opens a new chain."
            )
        producer = AIOKafkaProducer(
            **aiokafka_options(self._kafka),
            transactional_id=self._transactional_id,
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            max_batch_size=self.limit,
        )
        self._producer = producer
        await producer.start()
        trainer = (await read_registry(self._kafka, self._names)).trainer
        if trainer.epoch > self._epoch:
            raise Fenced(
                f"{self._topic}: expected the trainer's epoch {trainer.epoch} (taken by {trainer.who}), found {self._epoch}: "
                "another trainer has taken over. Run one at a time."
            )

    async def _commit(self, pieces: Sequence[bytes]) -> Sent:
        """Write the pieces in one transaction, each in a batch of its own."""
        from aiokafka.errors import MessageSizeTooLargeError

        producer = self._producer
        try:
            await producer.begin_transaction()
            futures = []
            for piece in pieces:
                futures += await send_batches(producer, self._topic, 0, [(None, piece, ())])
                futures[-1].add_done_callback(retrieve)
            # All of them before the commit, since aiokafka also commits when a record has failed.
            metadata = await written(self._kafka, futures, "a delta")
            await producer.commit_transaction()
        except MessageSizeTooLargeError:
            raise
        except Exception as error:
            # Whatever the error is: once the producer is started again, the log shows whether the commit took effect.
            raise _CommitFailed from error
        if min(each.offset for each in metadata) < 0:  # a batch that was sent twice, and of which the broker forgot the offset
            raise _CommitFailed
        return Sent(metadata[0].offset, metadata[-1].offset + 1, metadata[-1].timestamp, sum(map(len, pieces)))

    async def _find(self, name: _Name) -> Sent | None:
        """The delta, where it is in the log at or after `position`."""
        async with self._reader() as (consumer, partition):
            spans = await log_spans(self._kafka, consumer, (partition,))
            start, end = spans[partition]
            offset, expected, size = -1, 0, 0
            async for _, records in read_spans(consumer, {partition: Span(max(start, self.position), end)}, stall_s=STALL_S):
                for record in records:
                    try:
                        piece = read_piece(record.value)
                    except DeltaDamaged:
                        continue
                    if (piece.epoch, piece.ordinal, piece.sequence) != name:
                        continue
                    if piece.piece == 0:
                        offset, expected, size = record.offset, 0, 0
                    expected = expected + 1 if piece.piece == expected else -1
                    size += len(record.value or b"")
                    if expected == piece.pieces:
                        return Sent(offset, record.offset + 1, record.timestamp, size)
        return None

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[tuple[AIOKafkaConsumer, TopicPartition]]:
        from aiokafka.structs import TopicPartition

        consumer = await started(self._kafka, log_consumer(self._kafka), "the end of deltas")
        try:
            yield consumer, TopicPartition(self._topic, 0)
        finally:
            await quietly_stopped(consumer.stop)

    async def _read_limit(self) -> None:
        self.limit = min(await max_message_bytes(self._kafka, self._topic), MAX_LIMIT_BYTES)

    async def _drop(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await dropped(producer)


class _CommitFailed(Exception):
    """A transaction failed, or seemed to. The cause is aiokafka's error."""


def deltas_transactional_id(names: TopicNames) -> str:
    """The transactional id that all trainers of one track share: `<prefix>headrace-deltas`, and the track's name."""
    return f"{names.prefix}headrace-deltas{names.suffix}"
