"""Replaying dead letters: sending each letter's record to its source topic again, once.

`dead-letters` itself remembers what was replayed. One transaction writes the records to their source topics, and receipts that
name them to `dead-letters`. So a record and its receipt are both there or both missing, wherever a replay is killed. All
replays share one transactional id: the newer replay fences the older one, whose open transaction is aborted before the newer
one reads.

The order matters, as in `stream.join.takeover`:

1. the producer starts;
2. the end of `dead-letters` is taken, beyond every open transaction: a reader of committed records stops where another
   writer's open transaction begins, and would miss receipts after that offset;
3. receipts are read;
4. letters are read.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import IllegalOperation, KafkaError, MessageSizeTooLargeError, ProducerFenced

from stream.errors import Fenced, StreamError
from stream.kafka.batches import BATCH_BYTES, send_batches
from stream.kafka.clients import aiokafka_options
from stream.letters.log import LetterLog, Wanted
from stream.records.dead_letter import Letter, Origin
from stream.records.replay import receipt, replayed_record
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["Replay", "plan_replay", "replay_letters"]

# Letters and bytes in one transaction. It is open for well under a second, and readers of the source topics wait for that long.
# When a replay is killed, they wait for the timeout (the broker checks every 10 s).
MAX_LETTERS = 500
MAX_BYTES = 8 << 20
TRANSACTION_TIMEOUT_MS = 15_000


@dataclass(slots=True)
class Replay:
    """What a replay did, or with `plan_replay` would do. Letters are counted by source topic and reason."""

    fed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Records sent again."""
    done_before: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Letters that were replayed before, and other letters of the same records."""
    foreign: list[Letter] = field(default_factory=list)
    """Letters whose source is no topic of this prefix, or has no such partition now. They are never sent."""
    too_large: list[Letter] = field(default_factory=list)
    """Letters that the source topic rejected: a replay's header makes the record too large. They were not sent."""
    without_bytes: list[Letter] = field(default_factory=list)
    """Letters without their record's bytes (`too_large`, `unreadable`). They are never sent."""


async def plan_replay(kafka: KafkaSettings, names: TopicNames, wanted: Wanted) -> Replay:
    """What `replay_letters` would do. Writes nothing."""
    replay = Replay()
    async with LetterLog(kafka, names) as log:
        async for letter in _to_feed(log, wanted, replay):
            replay.fed[letter.origin.topic, letter.reason] += 1
    return replay


async def replay_letters(kafka: KafkaSettings, names: TopicNames, wanted: Wanted, *, who: str) -> Replay:
    """Send the wanted letters' records that were not replayed before to the topics and partitions that they came from.

    A replay may be repeated and killed: no record is sent twice.

    Raises:
        Fenced: another replay began meanwhile, and goes on from where this one stopped.
        StreamError: a topic is missing, or another writer's transaction stayed open.
        aiokafka.errors.KafkaError: Kafka can't be reached, or rejected a write.
    """
    replay = Replay()
    feeder = _Feeder(kafka, names, who, replay)
    try:
        await feeder.start()
        async with LetterLog(kafka, names) as log:
            await log.to_the_very_end()
            batch: list[Letter] = []
            size = 0
            async for letter in _to_feed(log, wanted, replay):
                batch.append(letter)
                size += letter.size
                if len(batch) == MAX_LETTERS or size > MAX_BYTES:
                    await feeder.feed(batch)
                    batch, size = [], 0
            await feeder.feed(batch)
    except (ProducerFenced, IllegalOperation) as error:  # IllegalOperation: aiokafka already knew of the fencing
        raise Fenced(
            "dead letters: expected to replay alone, found that another replay began after this one. What this one committed "
            f"({replay.fed.total():,} records) stays and isn't sent again; the other replay goes on with the rest."
        ) from error
    finally:
        await feeder.close()
    return replay


async def _to_feed(log: LetterLog, wanted: Wanted, replay: Replay) -> AsyncIterator[Letter]:
    """The wanted letters that were never replayed, one for each origin. The others are counted in `replay`."""
    done = await log.replayed()
    async for letter in log.letters(wanted):
        origin = letter.origin
        if origin in done:
            replay.done_before[origin.topic, letter.reason] += 1
        elif not letter.has_bytes:
            replay.without_bytes.append(letter)
        elif not 0 <= origin.partition < log.sources.get(origin.topic, 0):
            replay.foreign.append(letter)
        else:
            done.add(origin)  # the trainer and the scorer may write another letter of the same record
            yield letter


class _Feeder:
    """The writing side: transactions of records and receipts."""

    def __init__(self, kafka: KafkaSettings, names: TopicNames, who: str, replay: Replay) -> None:
        self._kafka, self._names, self._who, self._replay = kafka, names, who, replay
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        """Fence every other replay, and end its open transaction."""
        self._producer = AIOKafkaProducer(
            **aiokafka_options(self._kafka),
            transactional_id=f"{self._names.prefix}headrace-replay",
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            max_batch_size=BATCH_BYTES,
            max_request_size=1 << 30,  # the topics' limits decide
        )
        await self._producer.start()

    async def feed(self, letters: list[Letter]) -> None:
        """Send these letters' records in one transaction.

        When a record is rejected for its size, each half of the letters is tried alone, and so on down to that record.
        """
        if not letters:
            return
        try:
            await self._transaction(letters)
        except MessageSizeTooLargeError:
            await self._again()
            if len(letters) == 1:
                self._replay.too_large.extend(letters)
                return
            middle = len(letters) // 2
            await self.feed(letters[:middle])
            await self.feed(letters[middle:])
        else:
            self._replay.fed.update((letter.origin.topic, letter.reason) for letter in letters)

    async def _transaction(self, letters: list[Letter]) -> None:
        records: dict[tuple[str, int], list[Letter]] = defaultdict(list)
        receipts: dict[int, list[Origin]] = defaultdict(list)
        for letter in letters:
            records[letter.origin.topic, letter.origin.partition].append(letter)
            receipts[letter.partition].append(letter.origin)
        producer, topic = self._producer, self._names.dead_letters
        assert producer is not None
        await producer.begin_transaction()
        futures: list[asyncio.Future[Any]] = []
        try:
            for (source, number), group in records.items():
                is_example = source == self._names.examples
                outgoing = (replayed_record(each, topic, is_example=is_example) for each in group)
                futures += await send_batches(producer, source, number, outgoing)
            for number, origins in receipts.items():
                futures += await send_batches(producer, topic, number, [receipt(origins, self._who)])
        finally:
            # Every future is awaited before the commit (see `send_batches`). Its error is also the cause when a later send
            # failed.
            for answer in await asyncio.gather(*futures, return_exceptions=True):
                if isinstance(answer, BaseException):
                    raise answer
        async with asyncio.timeout(TRANSACTION_TIMEOUT_MS / 1_000):
            await producer.commit_transaction()

    async def _again(self) -> None:
        """Start another producer: after a rejected record, the sequence numbers of this one and of the broker differ."""
        await self.close()
        await self.start()

    async def close(self) -> None:
        if self._producer is not None:
            producer, self._producer = self._producer, None
            try:
                await producer.stop()
            except KafkaError as error:  # ProducerFenced, since stopping aborts the open transaction
                if not isinstance(error, ProducerFenced):
                    raise StreamError(f"dead letters: the replay's producer did not stop: {error!r}") from error
