"""An operator's clock is wrong: who is alive, where a rollback by time goes, and what is deleted are as if it were right."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deploy.settings import Settings
from stream.errors import RegistryError
from stream.registry import kafka_clock
from stream.registry.heartbeat import HeartbeatReader, HeartbeatSender
from stream.registry.kafka_clock import KafkaClock
from stream.registry.requests import RollbackRequest
from stream.registry.skipping import AskedRange, Moment, TimeRange
from stream.registry.writer import RegistryWriter
from stream.topics.names import TopicNames
from tests.stream.registry.test_operations import operations, three_versions
from tests.stream.registry.test_operations import registry as registry_now
from tests.stream.registry.versions import announced, keep
from tests.stream.registry.versions import operations as with_store

HOUR_MS = 3_600_000
real_ns = time.time_ns


@contextmanager
def clock(ahead_ms: int) -> Iterator[None]:
    """This process's clock is ahead, or behind."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(time, "time_ns", lambda: real_ns() + ahead_ms * 1_000_000)
        yield


def test_kafkas_time_is_at_least_the_newest_timestamp(monkeypatch: pytest.MonkeyPatch) -> None:
    local, monotonic = [10_000_000], [500.0]
    monkeypatch.setattr(kafka_clock, "_local_ms", lambda: local[0])
    monkeypatch.setattr(kafka_clock, "_monotonic_ms", lambda: monotonic[0])

    def passes(ms: int) -> None:
        local[0], monotonic[0] = local[0] + ms, monotonic[0] + ms

    right = KafkaClock()
    assert right.now_ms() == 10_000_000 and not right.is_doubtful(1_000)
    right.note(9_999_400)
    assert right.now_ms() == 10_000_000 and not right.is_doubtful(1_000), "the last heartbeat is not older than usual"
    passes(30_000)
    assert right.now_ms() == 10_030_000
    right.note(10_029_990, prompt=True)
    assert right.now_ms() == 10_030_000 and right.ahead_ms == 10

    behind = KafkaClock()
    behind.note(local[0] + HOUR_MS)
    assert behind.now_ms() == local[0] + HOUR_MS and not behind.is_doubtful(1_000)
    passes(5_000)
    assert behind.now_ms() == local[0] + HOUR_MS

    ahead = KafkaClock()
    ahead.note(local[0] - HOUR_MS)
    assert ahead.is_doubtful(1_000) and ahead.now_ms() == local[0], "or nobody has sent one for an hour"
    ahead.note(local[0] - HOUR_MS + 500, prompt=True)
    assert not ahead.is_doubtful(1_000) and ahead.now_ms() == local[0] - HOUR_MS + 500


def test_how_long_ago_counts_from_the_operation() -> None:
    asked = AskedRange(Moment(600_000, ago=True), Moment(1_650_000_000_000))
    assert asked.at(1_650_000_000_500) == TimeRange(1_649_999_400_500, 1_650_000_000_000)


@pytest.mark.kafka
@pytest.mark.parametrize("ahead_ms", [HOUR_MS, 6_000, -HOUR_MS])
def test_who_is_alive_does_not_depend_on_the_clock_of_who_asks(
    topics: Settings, ahead_ms: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        names = TopicNames.of(topics.topics)
        sender = HeartbeatSender(topics.kafka, names, worker="s1", heartbeat_ms=200)
        await sender.start()

        async def beat() -> None:
            while True:
                await sender.send(3, 0, 1)
                await asyncio.sleep(0.2)

        beating = asyncio.ensure_future(beat())
        await asyncio.sleep(0.3)
        with clock(ahead_ms):
            async with HeartbeatReader(topics.kafka, names) as scorers:
                assert [each.worker for each in await scorers.live()] == ["s1"]
                assert scorers.silent() == []
                off_ms = await scorers.now_ms() - real_ns() // 1_000_000
                assert abs(off_ms) < 2_000
        assert re.search(
            rf"this machine's clock is [\d.]+ [hms] {'ahead of' if ahead_ms > 0 else 'behind'} Kafka's\.", caplog.text
        )
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        await sender.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())


@pytest.mark.kafka
@pytest.mark.parametrize("ahead_ms", [HOUR_MS, -HOUR_MS])
def test_a_rollback_by_time_goes_by_kafkas_clock(topics: Settings, ahead_ms: int) -> None:
    async def run() -> None:
        await three_versions(topics)
        with clock(ahead_ms), pytest.raises(RegistryError) as refused:
            await operations(topics).rollback(RollbackRequest("bad", back_ms=HOUR_MS // 2))
        said = datetime.datetime.fromisoformat(re.findall(r"a champion at (\S+),", str(refused.value))[0]).timestamp()
        assert abs(time.time() - 1_800 - said) < 60
        # A version that is named is put back, with Kafka's time.
        with clock(ahead_ms):
            await operations(topics).rollback(RollbackRequest("bad", to=1))
        assert abs((await registry_now(topics)).champion.at_ms - real_ns() // 1_000_000) < 60_000

    asyncio.run(run())


@pytest.mark.kafka
def test_a_plan_by_a_wrong_clock_is_not_carried_out(topics: Settings) -> None:
    """A plan writes nothing, and without heartbeats nothing shows Kafka's time. It is found out before anything is written."""

    async def run() -> None:
        await three_versions(topics)
        mine = operations(topics)
        second_ms = (await registry_now(topics)).versions[2].champion_at_ms[0]
        with clock(HOUR_MS):
            back_ms = time.time_ns() // 1_000_000 - second_ms
            plan = await mine.plan(RollbackRequest("bad", to=2))
            plan = dataclasses.replace(plan, request=RollbackRequest("bad", back_ms=back_ms))
            with pytest.raises(RegistryError, match=r"which is (1 h|60 m) ahead of it\. Nothing was changed\. .*--yes"):
                await mine.rollback(plan)
        assert (await registry_now(topics)).champion.version == 3

    asyncio.run(run())


@pytest.mark.kafka
def test_changes_by_an_operator_whose_clock_is_behind_have_kafkas_times(
    topics: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """By his clock the promotion would come before the trainer's, and `rollback --back` would go to what it never was."""

    async def run() -> None:
        await three_versions(topics)
        writer = RegistryWriter(topics.kafka, TopicNames.of(topics.topics), who="operator")
        with clock(-HOUR_MS):
            await writer.hold("sale")
            await writer.promote(1, "better")
        await writer.close()
        state = await registry_now(topics)
        now_ms = real_ns() // 1_000_000
        assert now_ms - 30_000 < state.champion.hold_at_ms <= state.champion.at_ms <= now_ms + 1_000
        assert state.versions[1].champion_at_ms[-1] == state.champion.at_ms
        assert re.search(r"this machine's clock is (1 h|60 m) behind Kafka's\. Kafka's clock is used", caplog.text)

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())


@pytest.mark.kafka
@pytest.mark.parametrize("ahead_ms", [HOUR_MS, -HOUR_MS])
def test_gc_by_hand_goes_by_kafkas_clock(topics: Settings, ahead_ms: int) -> None:
    async def run() -> None:
        await announced(topics, range(1, 7))
        young = keep(topics, keep_ms=600_000)
        with clock(ahead_ms):
            done = await with_store(topics).gc(young, "by hand")
        assert done.versions == [], "all are young by Kafka's clock"
        with clock(ahead_ms):
            done = await with_store(topics).gc(keep(topics), "by hand")
        assert done.versions == [1, 2, 3, 4]

    asyncio.run(run())
