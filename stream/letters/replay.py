"""Feeding dead letters again, each record once.

What was replayed is remembered in `dead-letters` itself: one transaction writes records to their source topics and, beside
their letters, receipts that name them. So a record and its receipt are there both or neither, wherever a replay is killed. All
replays share one transactional id: the newer fences the older, whose open transaction is aborted before the newer reads.

The order matters, as in `stream.join.takeover`: producer first, then the end of `dead-letters` past every open transaction
(another writer's would hide receipts that lie behind its beginning), then receipts, then letters.
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
from stream.letters.log import Letter, LetterLog, Origin, Wanted, receipt
from stream.records.dead_letter import REPLAY_HEADER
from stream.records.record import Header
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["Replay", "plan_replay", "replay_letters"]

# In the header `kind` of a replayed example that was `first`: its label has gone out already, and each impression has one.
KIND_FIRST, KIND_REPLAY = b"first", b"replay"
# Letters and bytes in one transaction. It is open for well under a second; readers of the sources wait for so long, and where a
# replay is killed for the timeout (the broker looks every 10 s).
MAX_LETTERS = 500
MAX_BYTES = 8 << 20
TRANSACTION_TIMEOUT_MS = 15_000


@dataclass(slots=True)
class Replay:
    """What a replay did, or with `plan_replay` would do. Counts of letters by source topic and reason."""

    fed: Counter[tuple[str, str]] = field(default_factory=Counter)
    done_before: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Replayed already, or another letter of a record that is."""
    foreign: list[Letter] = field(default_factory=list)
    """Their source is no topic of this prefix, or has no such partition now; never fed."""
    too_large: list[Letter] = field(default_factory=list)
    """The source topic refused them: the header of a replay is what they are too large by. Not fed."""
    without_bytes: list[Letter] = field(default_factory=list)
    """Letters that don't have their record's bytes (`too_large`, `unreadable`); never fed."""


async def plan_replay(kafka: KafkaSettings, names: TopicNames, wanted: Wanted) -> Replay:
    """What `replay_letters` would feed; writes nothing."""
    replay = Replay()
    async with LetterLog(kafka, names) as log:
        async for letter in _to_feed(log, wanted, replay):
            replay.fed[letter.origin.topic, letter.reason] += 1
    return replay


async def replay_letters(kafka: KafkaSettings, names: TopicNames, wanted: Wanted, *, who: str) -> Replay:
    """Feed the wanted letters' records to the topics and partitions they came from, those not replayed before.

    Safe to repeat and to kill: no record is fed twice.

    Raises:
        Fenced: another replay began meanwhile; it goes on from where this one was.
        StreamError: a topic is missing, or another writer's transaction stayed open.
        aiokafka.errors.KafkaError: Kafka can't be reached, or refused to write.
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
    except (ProducerFenced, IllegalOperation) as error:  # aiokafka's word where it noticed before this send
        raise Fenced(
            "dead letters: expected to replay alone, found that another replay began after this one. What this one committed "
            f"({replay.fed.total():,} records) stays and isn't fed again; the other goes on with the rest."
        ) from error
    finally:
        await feeder.close()
    return replay


async def _to_feed(log: LetterLog, wanted: Wanted, replay: Replay) -> AsyncIterator[Letter]:
    """The wanted letters that were never replayed, each origin once; the others are counted in `replay`."""
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
            done.add(origin)  # the trainer and the scorer may write a letter of one record again
            yield letter


class _Feeder:
    """The writing side: transactions of records and receipts."""

    def __init__(self, kafka: KafkaSettings, names: TopicNames, who: str, replay: Replay) -> None:
        self._kafka, self._names, self._who, self._replay = kafka, names, who, replay
        self._producer: Any = None

    async def start(self) -> None:
        """Fence any other replay, and settle its open transaction."""
        self._producer = AIOKafkaProducer(
            **aiokafka_options(self._kafka),
            transactional_id=f"{self._names.prefix}headrace-replay",
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            max_batch_size=BATCH_BYTES,
            max_request_size=1 << 30,  # the topics' limits decide
        )
        await self._producer.start()

    async def feed(self, letters: list[Letter]) -> None:
        """One transaction; where a record is refused for its size, two of half the letters each, down to that record alone."""
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
        await producer.begin_transaction()
        futures: list[asyncio.Future[Any]] = []
        try:
            for (source, number), group in records.items():
                outgoing = ((each.key, each.value, self._headers(each)) for each in group)
                futures += await send_batches(producer, source, number, outgoing)
            for number, origins in receipts.items():
                futures += await send_batches(producer, topic, number, [receipt(origins, self._who)])
        finally:
            # Every future is awaited before the commit (see `send_batches`), and what one says is why the next send failed.
            for answer in await asyncio.gather(*futures, return_exceptions=True):
                if isinstance(answer, BaseException):
                    raise answer
        async with asyncio.timeout(TRANSACTION_TIMEOUT_MS / 1_000):
            await producer.commit_transaction()

    def _headers(self, letter: Letter) -> list[Header]:
        """The original's own, and where the record comes from this time."""
        place = f"{self._names.dead_letters}/{letter.place}".encode()
        kept = [(name, value) for name, value in letter.headers if name != REPLAY_HEADER]
        if letter.origin.topic == self._names.examples:
            kept = [(name, KIND_REPLAY if (name, value) == ("kind", KIND_FIRST) else value) for name, value in kept]
        return [*kept, (REPLAY_HEADER, place)]

    async def _again(self) -> None:
        """Another producer: after a refused record this one's sequence numbers aren't the broker's any more."""
        await self.close()
        await self.start()

    async def close(self) -> None:
        if self._producer is not None:
            producer, self._producer = self._producer, None
            try:
                await producer.stop()
            except KafkaError as error:  # fenced, say: stopping aborts the open transaction
                if not isinstance(error, ProducerFenced):
                    raise StreamError(f"dead letters: the replay's producer did not stop: {error!r}") from error
