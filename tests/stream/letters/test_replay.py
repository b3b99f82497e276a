"""A replay feeds each record once, wherever it is killed, whoever else is writing, and however often it is repeated."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.structs import TopicPartition

from deploy.settings import Settings
from stream.errors import Fenced
from stream.kafka.clients import aiokafka_options
from stream.kafka.read_log import Span, high_watermarks, log_consumer, read_spans
from stream.letters import replay as letter_replay
from stream.letters.log import Wanted
from stream.letters.replay import Replay, plan_replay, replay_letters
from stream.records.dead_letter import DeadLetter, Origin
from stream.records.replay import REPLAY_HEADER, receipt
from stream.topics.names import TopicNames


class Scene:
    """The topics of one test."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.names = settings, TopicNames.of(settings.topics)

    @contextlib.asynccontextmanager
    async def producer(self, transactional_id: str | None = None) -> AsyncIterator[Any]:
        producer = AIOKafkaProducer(
            **aiokafka_options(self.settings.kafka), transactional_id=transactional_id, max_request_size=1 << 24
        )
        await producer.start()
        try:
            yield producer
        finally:
            await producer.stop()

    async def write(self, *letters: DeadLetter) -> None:
        async with self.producer() as producer:
            for letter in letters:
                await producer.send_and_wait(
                    self.names.dead_letters, letter.value, letter.key, partition=letter.partition, headers=letter.out_headers()
                )

    def letters(self, count: int, reason: str = "late_impression") -> list[DeadLetter]:
        origin = self.names.impressions
        return [
            DeadLetter(reason, "", "$", origin, index % 2, index, b"k%d" % index, b"v%d" % index, (("trace", b"%d" % index),))
            for index in range(count)
        ]

    async def replay(self, wanted: Wanted | None = None) -> Replay:
        return await replay_letters(self.settings.kafka, self.names, wanted or Wanted(), who="test")

    async def records(self, topic: str) -> list[Any]:
        """All committed records, also those whose commit marker is still on its way to their partition."""
        consumer = log_consumer(self.settings.kafka)
        await consumer.start()
        try:
            tps = [TopicPartition(topic, number) for number in (0, 1)]
            starts, ends = await consumer.beginning_offsets(tps), await high_watermarks(self.settings.kafka, tps)
            spans = {tp: Span(starts[tp], ends[tp]) for tp in tps}
            return [record async for _, run in read_spans(consumer, spans, stall_s=20) for record in run]
        finally:
            await consumer.stop()

    async def fed(self, topic: str | None = None) -> Counter[tuple[int, bytes]]:
        return Counter((record.partition, record.key) for record in await self.records(topic or self.names.impressions))


@pytest.fixture
def scene(topics: Settings) -> Scene:
    return Scene(topics)


def once(letters: list[DeadLetter]) -> Counter[tuple[int, bytes]]:
    return Counter((letter.partition, letter.key or b"") for letter in letters)


def test_as_received_to_where_it_came_from(scene: Scene) -> None:
    async def run() -> None:
        names = scene.names
        example = (("label", b"1"), ("kind", b"first"), ("source_offset", b"5"))
        letters = [
            DeadLetter("bad_utf8", "e", "$", names.clicks, 1, 3, None, b"\xff", (("reason", b"theirs"), ("none", None))),  # type: ignore[arg-type]
            DeadLetter("nested", "e", "$.x", names.examples, 0, 7, b"k", b"{}", example),
            DeadLetter("wrong_type", "e", "$", "elsewhere", 0, 0, b"k", b"v"),
            DeadLetter("wrong_type", "e", "$", names.clicks, 2, 0, b"k", b"v")._replace(partition=0, topic=f"{names.clicks}x"),
        ]
        await scene.write(*letters, letters[1])  # the trainer tells a letter again after a crash
        planned = await plan_replay(scene.settings.kafka, names, Wanted())
        assert await scene.records(names.clicks) == []
        done = await scene.replay()
        assert planned.fed == done.fed == Counter({(names.clicks, "bad_utf8"): 1, (names.examples, "nested"): 1})
        assert done.done_before == Counter({(names.examples, "nested"): 1})
        assert [letter.origin.topic for letter in done.foreign] == ["elsewhere", f"{names.clicks}x"]
        [click] = await scene.records(names.clicks)
        assert (click.partition, click.key, click.value) == (1, None, b"\xff")
        place = (REPLAY_HEADER, f"{names.dead_letters}/1/0".encode())
        assert click.headers == (("reason", b"theirs"), ("none", None), place)
        [fed] = await scene.records(names.examples)
        assert dict(fed.headers)["kind"] == b"replay", "each impression has one `first`"
        assert dict(fed.headers)["source_offset"] == b"5"
        # A record that fails again is a new letter, and names only its newest replay.
        await scene.write(DeadLetter.of(click, "bad_utf8", "$", "e"))
        assert (await scene.replay()).fed == Counter({(names.clicks, "bad_utf8"): 1})
        _, again = await scene.records(names.clicks)
        assert [name for name, _ in again.headers] == ["reason", "none", REPLAY_HEADER]
        assert again.headers[-1] != place
        assert (await scene.replay()).fed.total() == 0

    asyncio.run(run())


def test_repeated_and_by_parts(scene: Scene) -> None:
    async def run() -> None:
        letters = [*scene.letters(6), *(each._replace(offset=each.offset + 50) for each in scene.letters(4, "wrong_type"))]
        await scene.write(*letters)
        for wanted, fed in (
            (Wanted(reasons={"wrong_type"}), 4),
            (Wanted(reasons={"wrong_type"}), 0),
            (Wanted(names={"0/0"}), 1),
            (Wanted(), 5),
            (Wanted(), 0),
        ):
            assert (await scene.replay(wanted)).fed.total() == fed
        assert await scene.fed() == once(letters)

    asyncio.run(run())


class Killed(Exception):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_a_commit(scene: Scene, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second transaction's commit never begins, or is the last thing that happens."""

    class Feeder(letter_replay._Feeder):
        commits = 0

        async def start(self) -> None:
            await super().start()
            commit = self._producer.commit_transaction

            async def counted() -> None:
                Feeder.commits += 1
                if Feeder.commits == 2 and when == "before":
                    raise Killed
                await commit()
                if Feeder.commits == 2:
                    raise Killed

            self._producer.commit_transaction = counted

        async def close(self) -> None:
            """As killed: nothing is aborted, only the connections go."""
            producer, self._producer = self._producer, None
            if producer is not None:
                if Feeder.commits == 2:
                    producer._txn_manager = None
                    producer._sender._txn_manager = None
                await producer.stop()

    monkeypatch.setattr(letter_replay, "MAX_LETTERS", 3)

    async def run() -> None:
        letters = scene.letters(10)
        await scene.write(*letters)
        with monkeypatch.context() as patched:
            patched.setattr(letter_replay, "_Feeder", Feeder)
            with pytest.raises(Killed):
                await scene.replay()
        assert (await scene.replay()).fed.total() == (7 if when == "before" else 4)
        assert await scene.fed() == once(letters)

    asyncio.run(run())


def test_receipts_behind_another_writers_open_transaction_are_seen(scene: Scene) -> None:
    """Readers of committed records see nothing behind the beginning of an open transaction, committed or not."""

    async def run() -> None:
        letters = scene.letters(4)
        await scene.write(*letters)
        topic, clicks = scene.names.dead_letters, scene.names.clicks
        orphans = [DeadLetter("orphan_click", "", "$", clicks, number, 99, b"late", b"v") for number in (0, 1)]
        async with scene.producer(f"{scene.names.prefix}join") as join, scene.producer() as earlier:

            async def open_transaction(letters: list[DeadLetter]) -> None:
                await join.begin_transaction()
                for letter in letters:
                    headers = letter.out_headers()
                    await join.send_and_wait(topic, letter.value, letter.key, partition=letter.partition, headers=headers)

            await open_transaction(orphans)
            for number in (0, 1):
                origins = [Origin(each.topic, each.partition, each.offset) for each in letters if each.partition == number]
                key, value, headers = receipt(origins, "an earlier replay")
                await earlier.send_and_wait(topic, value, key, partition=number, headers=headers)
            replay = asyncio.ensure_future(scene.replay(Wanted(reasons={"late_impression"})))
            await asyncio.sleep(0.7)
            assert not replay.done(), "it can't know what lies behind"
            await join.commit_transaction()
            done = await replay
            assert (done.fed.total(), done.done_before.total()) == (0, 4)
            # What is aborted meanwhile is never fed.
            await open_transaction([letter._replace(offset=100) for letter in orphans])
            replay = asyncio.ensure_future(scene.replay())
            await asyncio.sleep(0.3)
            await join.abort_transaction()
            assert (await replay).fed == Counter({(clicks, "orphan_click"): 2})
        assert (await scene.fed()).total() == 0
        assert await scene.fed(clicks) == once(orphans)

    asyncio.run(run())


def test_two_at_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer fences the older; together they feed everything once."""
    monkeypatch.setattr(letter_replay, "MAX_LETTERS", 5)

    async def run() -> None:
        letters = scene.letters(60)
        await scene.write(*letters)
        both = await asyncio.gather(scene.replay(), scene.replay(), return_exceptions=True)
        done = [each for each in both if isinstance(each, Replay)]
        assert done and all(isinstance(each, Replay | Fenced) for each in both), both
        await scene.replay()
        assert await scene.fed() == once(letters)

    asyncio.run(run())


def test_a_record_that_the_replays_header_makes_too_large(scene: Scene) -> None:
    async def run() -> None:
        letters = scene.letters(5)
        limit = scene.settings.topics.max_message_bytes
        huge = letters[2]._replace(value=b"x" * (limit - 60 - len(letters[2].key or b"")))
        await scene.write(*letters[:2], huge, *letters[3:])
        done = await scene.replay()
        assert [letter.value for letter in done.too_large] == [huge.value]
        assert done.fed.total() == 4
        again = await scene.replay()
        assert (again.fed.total(), len(again.too_large), again.done_before.total()) == (0, 1, 4)
        assert await scene.fed() == once([*letters[:2], *letters[3:]])

    asyncio.run(run())
