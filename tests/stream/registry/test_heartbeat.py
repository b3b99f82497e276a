"""Heartbeats and rollbacks over a real Kafka: who is alive, who confirmed, who did not."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest

from deploy.settings import Settings
from state.errors import SnapshotCorrupt
from state.manifest import Manifest
from state.registry import RegistryState
from state.settings import SnapshotSettings
from stream.errors import RegistryError, StreamError, TopicError
from stream.kafka.clients import aiokafka_options
from stream.records.heartbeat import Heartbeat, live_limit_ms
from stream.registry.follower import RegistryReader
from stream.registry.heartbeat import HeartbeatReader, HeartbeatSender
from stream.registry.operations import plan_rollback, roll_back
from stream.registry.writer import RegistryWriter, heartbeat
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.names import TopicNames
from tests.judged import JUDGED

pytestmark = pytest.mark.kafka

GATE = SnapshotSettings(first_examples=0, good_after_ms=0)


class Scorer:
    """As a scorer does it: follows the registry, swaps, says so."""

    def __init__(self, settings: Settings, worker: str, *, deaf: bool = False) -> None:
        names = TopicNames.of(settings.topics)
        self.reader = RegistryReader(settings.kafka, names, on_change=self.swap)
        self.sender = HeartbeatSender(settings.kafka, names, worker=worker, host=f"host-of-{worker}")
        self.deaf = deaf
        self.swaps: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Scorer:
        await self.sender.start()
        await self.reader.start()
        await asyncio.gather(*self.swaps)
        self.deaf_from_now = self.deaf
        return self

    deaf_from_now = False

    def swap(self, state: RegistryState) -> None:
        if not self.deaf_from_now:
            version = state.champion.version or -1
            self.swaps.append(asyncio.create_task(self.sender.send(version, 0, self.reader.position)))

    async def __aexit__(self, *exception: object) -> None:
        await self.reader.close()
        await asyncio.gather(*self.swaps)
        await self.sender.close()


async def three_versions(settings: Settings) -> None:
    writer = RegistryWriter(settings.kafka, TopicNames.of(settings.topics), who="trainer")
    epoch = await writer.take_trainer_epoch()
    for version in (1, 2, 3):
        metrics = {"window_examples": 1_000.0, "window_log_loss": 0.5, "window_calibration": 1.0}
        manifest = Manifest(version=version, epoch=epoch, created_at_ms=version, metrics=metrics, verdict=JUDGED)
        await writer.announce(manifest, gate=GATE)
    await writer.tag_good(1, 2)
    await writer.close()


def reach(settings: Settings) -> tuple[KafkaSettings, TopicNames]:
    return settings.kafka, TopicNames.of(settings.topics)


def test_every_live_scorer_confirms(topics: Settings) -> None:
    async def run() -> None:
        await three_versions(topics)
        async with Scorer(topics, "s1") as first, Scorer(topics, "s2"):
            plan = await plan_rollback(*reach(topics))
            assert (plan.previous, plan.version, plan.held_already) == (3, 2, False)
            assert [beat.worker for beat in plan.live] == ["s1", "s2"]
            assert all(beat.version == 3 for beat in plan.live)
            assert first.reader.state.champion.version == 3  # looking changed nothing
            done = await roll_back(*reach(topics), who="me", reason="bad")
            assert (done.previous, done.version, done.held) == (3, 2, True)
            assert sorted(each.worker for each in done.confirmed) == ["s1", "s2"] and done.unconfirmed == []
            assert done.rollback_ms < 5_000
            assert done.undo == "headrace snapshot promote 3 --reason 'undo of 2' --resume"
            assert first.reader.state.champion.version == 2

    asyncio.run(run())


def test_who_does_not_confirm_is_named(topics: Settings) -> None:
    """It serves the old version; or the right one by chance, without having read of the rollback."""

    async def run() -> None:
        await three_versions(topics)
        async with Scorer(topics, "s1"), Scorer(topics, "deaf", deaf=True):
            began = time.monotonic()
            done = await roll_back(*reach(topics), who="me", reason="bad", timeout_ms=700)
            assert 0.7 <= time.monotonic() - began < 5
            assert [each.worker for each in done.confirmed] == ["s1"]
            assert [(beat.worker, beat.host, beat.version) for beat in done.unconfirmed] == [("deaf", "host-of-deaf", 3)]

    asyncio.run(run())


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
            await sender.send(2, 0, 10)
            confirmed, missing = await scorers.wait_for_confirmations(10, 2, 5_000)
            assert [each.worker for each in confirmed] == ["s1"] and missing == []
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
    monkeypatch.setattr(heartbeat, "GRACE_MS", 0)

    async def run() -> None:
        names = TopicNames.of(topics.topics)
        sender = HeartbeatSender(topics.kafka, names, worker="s1", heartbeat_ms=100)
        await sender.start()
        await sender.send(3, 0, 1)
        async with HeartbeatReader(topics.kafka, names) as scorers:
            confirmed, missing = await scorers.wait_for_confirmations(9, 9, 800)
        assert confirmed == [] and [beat.worker for beat in missing] == ["s1"]
        await sender.close()

    asyncio.run(run())


def test_no_scorer_is_live(topics: Settings) -> None:
    async def run() -> None:
        await three_versions(topics)
        done = await roll_back(*reach(topics), who="me", reason="bad", to=1)
        assert (done.version, done.confirmed, done.unconfirmed) == (1, [], [])

    asyncio.run(run())


def test_a_version_that_fails_the_check_moves_nobody(topics: Settings) -> None:
    async def run() -> None:
        await three_versions(topics)

        def check(version: int) -> None:
            raise SnapshotCorrupt(f"version {version} is broken")

        with pytest.raises(SnapshotCorrupt, match="version 2 is broken"):
            await roll_back(*reach(topics), who="me", reason="bad", check=check)
        checked: list[int] = []
        done = await roll_back(*reach(topics), who="me", reason="bad", check=checked.append)
        assert (checked, done.previous, done.version) == ([2], 3, 2)
        with pytest.raises(RegistryError, match="version 9: expected an announced version"):
            await roll_back(*reach(topics), who="me", reason="bad", to=9)

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
