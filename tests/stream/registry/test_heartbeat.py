"""Heartbeats and rollbacks over a real Kafka: who is alive, who confirmed, who did not."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest

from deploy.settings import Settings
from state.settings import SnapshotSettings
from stream.errors import StreamError, TopicError
from stream.kafka.clients import aiokafka_options
from stream.records import heartbeat as heartbeat_record
from stream.records.heartbeat import Heartbeat, live_limit_ms
from stream.registry import heartbeat
from stream.registry.heartbeat import HeartbeatReader, HeartbeatSender, Weights
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.names import TopicNames

pytestmark = pytest.mark.kafka

GATE = SnapshotSettings(first_examples=0, good_after_ms=0)


def test_an_old_or_stale_heartbeat_confirms_nothing(topics: Settings) -> None:
    async def run() -> None:
        names = TopicNames.of(topics.topics)
        sender = HeartbeatSender(topics.kafka, names, worker="s1")
        await sender.start()
        async with HeartbeatReader(topics.kafka, names) as scorers:
            for version, offset, stale in [(2, 9, False), (3, 10, False), (2, 10, True)]:
                await sender.send(version, 0, offset, stale=stale)
                confirmed, missing = await scorers.wait_for_confirmations(10, 2, 300)
                assert confirmed == [] and [beat.worker for beat in missing] == ["s1"]
            await sender.send(2, 0, 10, candidate=4)
            confirmed, missing = await scorers.wait_for_confirmations(10, 2, 300, alone=True)
            assert confirmed == [] and missing[0].candidate == 4, "a candidate still answers beside it"
            await sender.send(2, 0, 10)
            confirmed, missing = await scorers.wait_for_confirmations(10, 2, 5_000, alone=True)
            assert [each.worker for each in confirmed] == ["s1"] and missing == []
        await sender.close()

    asyncio.run(run())


def test_who_follows_the_chain_confirms_a_champion_that_is_followed_and_no_other(topics: Settings) -> None:
    async def run() -> None:
        names = TopicNames.of(topics.topics)
        sender = HeartbeatSender(topics.kafka, names, worker="s1")
        await sender.start()
        async with HeartbeatReader(topics.kafka, names) as scorers:
            for following, version in ((True, 3), (True, 2)):
                await sender.send(version, 0, 10, weights=Weights(following=following, chain="m/1/0"))
                confirmed, missing = await scorers.wait_for_confirmations(10, 2, 300)
                assert confirmed == [] and missing[0].following, "a pinned version is served exactly"
                confirmed, _ = await scorers.wait_for_confirmations(10, 2, 5_000, follows=True)
                assert [each.worker for each in confirmed] == ["s1"]
            await sender.send(2, 0, 10)  # it can't follow, and serves the champion as it is
            confirmed, _ = await scorers.wait_for_confirmations(10, 2, 5_000, follows=True)
            assert [each.worker for each in confirmed] == ["s1"]
        await sender.close()

    asyncio.run(run())


def test_the_dead_and_those_who_said_goodbye_are_not_waited_for(topics: Settings) -> None:
    async def run() -> None:
        names = TopicNames.of(topics.topics)
        left, silent = (HeartbeatSender(topics.kafka, names, worker=worker) for worker in ("left", "silent"))
        for sender in (left, silent):
            await sender.start()
            await sender.send(3, 0, 1)
        await left.close()
        async with HeartbeatReader(topics.kafka, names) as scorers:
            assert [beat.worker for beat in await scorers.live()] == ["silent"]
            assert await scorers.live(now_ms=time.time_ns() // 1_000_000 + 61_000) == []
            # A goodbye during the wait ends it.
            wait = asyncio.create_task(scorers.wait_for_confirmations(9, 9, 20_000))
            await asyncio.sleep(0.2)
            began = time.monotonic()
            await silent.close()
            assert await wait == ([], []) and time.monotonic() - began < 5

    asyncio.run(run())


def test_a_scorer_that_dies_while_it_is_waited_for_stays_unconfirmed(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat_record, "GRACE_MS", 0)

    async def run() -> None:
        names = TopicNames.of(topics.topics)
        sender = HeartbeatSender(topics.kafka, names, worker="s1", heartbeat_ms=100)
        await sender.start()
        await sender.send(3, 0, 1)
        sent_ms = time.time_ns() // 1_000_000
        async with HeartbeatReader(topics.kafka, names) as scorers:
            confirmed, missing = await scorers.wait_for_confirmations(9, 9, 800, now_ms=sent_ms)
        assert confirmed == [] and [beat.worker for beat in missing] == ["s1"]
        await sender.close()

    asyncio.run(run())


def test_a_scorer_that_stands_still_is_named_and_not_waited_for(topics: Settings) -> None:
    """By Kafka's clock its last heartbeat is 20 s old when the registry is changed. Long ago it is forgotten."""

    async def run() -> None:
        names = TopicNames.of(topics.topics)
        still, awake, left = (HeartbeatSender(topics.kafka, names, worker=worker) for worker in ("still", "awake", "left"))
        for sender in (still, awake, left):
            await sender.start()
            await sender.send(3, 0, 1)
        await left.close()
        changed_ms = time.time_ns() // 1_000_000 + 20_000
        async with HeartbeatReader(topics.kafka, names) as scorers:
            assert scorers.silent(changed_ms - 20_000) == []
            found = scorers.silent(changed_ms)
            assert [each.beat.worker for each in found] == ["awake", "still"]
            assert all(19_000 < each.for_ms < 25_000 and each.beat.version == 3 for each in found)
            assert scorers.silent(changed_ms + 10 * 60_000) == []
            assert await scorers.wait_for_confirmations(9, 2, 20_000, now_ms=changed_ms) == ([], []), "nobody is waited for"
        for sender in (still, awake):
            await sender.close()

    asyncio.run(run())


def test_foreign_and_malformed_heartbeats_are_passed_over(topics: Settings) -> None:
    async def run() -> None:
        from aiokafka import AIOKafkaProducer

        names = TopicNames.of(topics.topics)
        async with AIOKafkaProducer(**aiokafka_options(topics.kafka)) as foreign:
            for value in (b"{", b"\xff", b'{"worker": 1}'):
                await foreign.send_and_wait(names.scorers, key=b"s1", value=value)
        sender = HeartbeatSender(topics.kafka, names, worker="s2")
        await sender.start()
        await sender.send(1, 0, 1)
        async with HeartbeatReader(topics.kafka, names) as scorers:
            assert [beat.worker for beat in await scorers.live()] == ["s2"]
        await sender.close()

    asyncio.run(run())


def test_a_long_topic_is_read_from_near_its_end(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        names = TopicNames.of(topics.topics)
        sender = HeartbeatSender(topics.kafka, names, worker="s1")
        await sender.start()
        for offset in range(50):
            await sender.send(1, 0, offset)
        monkeypatch.setattr(heartbeat, "TAIL_RECORDS", 5)
        async with HeartbeatReader(topics.kafka, names) as scorers:
            assert [beat.registry_offset for beat in await scorers.live()] == [49]
        await sender.close()

    asyncio.run(run())


def test_what_is_not_there(settings: Settings) -> None:
    names = TopicNames.of(settings.topics)

    async def read(kafka: KafkaSettings) -> None:
        async with HeartbeatReader(kafka, names):
            pass

    with pytest.raises(TopicError, match=rf"topic {names.scorers}: expected at .*found none.*`headrace topics create`"):
        asyncio.run(read(settings.kafka))
    nowhere = KafkaSettings(bootstrap_servers="127.0.0.1:1")
    attempts: list[Any] = [read(nowhere), HeartbeatSender(nowhere, TopicNames.of(TopicSettings()), worker="w").start()]
    for attempt in attempts:
        with pytest.raises(StreamError, match=r"Kafka at 127\.0\.0\.1:1 \(PLAINTEXT\): expected an answer about the scorers"):
            asyncio.run(attempt)


def test_a_scorer_lives_by_its_own_interval(topics: Settings) -> None:
    """One that beats every 30 s isn't dead after 10, and one that beats ten times a second is missed sooner than that."""

    async def run() -> None:
        names = TopicNames.of(topics.topics)
        senders = {
            name: HeartbeatSender(topics.kafka, names, worker=name, heartbeat_ms=interval_ms)
            for name, interval_ms in (("calm", 30_000), ("usual", 1_000), ("hasty", 100))
        }
        for sender in senders.values():
            await sender.start()
            await sender.send(1, 0, 1)
        now_ms = time.time_ns() // 1_000_000
        async with HeartbeatReader(topics.kafka, names) as scorers:
            for later_ms, alive in (
                (0, ["calm", "hasty", "usual"]),
                (3_500, ["calm", "usual"]),
                (10_000, ["calm"]),
                (60_000, ["calm"]),
                (100_000, []),
            ):
                assert [beat.worker for beat in await scorers.live(now_ms=now_ms + later_ms)] == alive
        for sender in senders.values():
            await sender.close()

    asyncio.run(run())


def test_a_heartbeat_that_does_not_say_its_interval_has_the_default() -> None:
    """As scorers of 0.1.0 send it."""
    old = b'{"worker":"s1","version":3,"since_ms":1,"host":"h","registry_offset":7,"at_ms":9,"stale":false}'
    beat = msgspec.json.decode(old, type=Heartbeat)
    assert (beat.heartbeat_ms, beat.fallback_of, live_limit_ms(beat)) == (1_000, None, 5_000)
    assert live_limit_ms(msgspec.structs.replace(beat, heartbeat_ms=30_000)) == 92_000
