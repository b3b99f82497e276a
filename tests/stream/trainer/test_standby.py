"""Several trainers as processes, on the real Kafka: one leads, the others stand by and take over."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
import torch

from deploy.local_kafka.cluster import LocalKafka
from deploy.settings import LocalKafkaSettings, Settings
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.registry.log import read_registry
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.admin import create_topics
from stream.topics.names import TopicNames
from tests.stream.trainer.factory import FIRST_MS, MODEL
from tests.stream.trainer.process import PATIENCE_S, Process, kept, newest, one_partition, send, until

pytestmark = pytest.mark.kafka

BY_COUNT = {"HEADRACE_TRAINER__MAX_BATCH_AGE_MS": "100000000"}
# Long enough for a busy machine, and as short as the tests that wait for it allow.
QUICK = {"HEADRACE_TRAINER__SESSION_TIMEOUT_MS": "5000"}
# A trainer that needs this session time-out to take over doesn't do so within the patience of a test.
SLOW = {"HEADRACE_TRAINER__SESSION_TIMEOUT_MS": "600000"}


def stands_by(process: Process) -> bool:
    return process.answer("/readyz").startswith("standby: ")


def leads(process: Process) -> bool:
    return process.answer("/readyz") == "ok\n" and process.metric("leading") == 1


async def epochs(settings: Settings) -> int:
    return (await read_registry(settings.kafka, TopicNames.of(settings.topics))).trainer.epoch


async def ended(process: Process) -> int:
    return await asyncio.to_thread(process.process.wait, PATIENCE_S)


async def until_learned(process: Process, settings: Settings, examples: int) -> None:
    """Wait until a version has all examples but those that wait for their batch to fill."""
    store = SnapshotStore(settings.snapshots)

    def learned() -> bool:
        numbers = store.versions()
        return bool(numbers) and store.manifest(numbers[-1]).examples_seen == examples

    await until(learned, process)


async def leader_and_standby(start, settings: Settings, **environment: str) -> tuple[Process, Process]:
    leader = start(settings, **environment)
    await until(lambda: leads(leader), leader)
    standby = start(settings, **environment)
    await until(lambda: stands_by(standby), standby)
    return leader, standby


async def test_the_standby_of_a_killed_leader_goes_on_bit_for_bit(settings, tmp_path, start):
    whole, killed = (one_partition(settings, name, tmp_path) for name in ("whole", "killed"))
    trained = 3_000 // MODEL.batch_rows * MODEL.batch_rows

    await send(whole, range(3_000))
    process = start(whole, **BY_COUNT)
    await until_learned(process, whole, trained)
    process.stop()

    await send(killed, range(1_300))
    leader, standby = await leader_and_standby(start, killed, **BY_COUNT, **QUICK)
    await until(lambda: standby.metric("standby_version") >= 1, standby)
    await send(killed, range(1_300, 2_100))
    await until(lambda: leader.metric("batches_total") * MODEL.batch_rows > 1_500, leader)
    assert standby.answer("/healthz") == "ok\n"
    assert standby.metric("leading") == 0
    assert 0 <= standby.metric("standby_age_seconds") < PATIENCE_S
    leader.kill()
    await send(killed, range(2_100, 3_000))
    await until(lambda: leads(standby), standby)
    await until_learned(standby, killed, trained)
    await until(lambda: standby.metric("catch_up_seconds") > standby.metric("takeover_seconds") > 0, standby)
    standby.stop()
    assert "caught up" in standby.log.read_text()

    stores = [SnapshotStore(each.snapshots) for each in (whole, killed)]
    ends = [await newest(each) for each in (whole, killed)]
    expected, found = (store.manifest(end) for store, end in zip(stores, ends, strict=True))
    assert found.examples_seen == expected.examples_seen == trained
    assert found.offsets == expected.offsets == {"0": trained}
    assert found.watermark_ms == FIRST_MS + trained - 1
    assert found.epoch == 2
    for read in (SnapshotStore.serving, SnapshotStore.trainer):
        theirs, ours = (read(store, end) for store, end in zip(stores, ends, strict=True))
        assert theirs.keys() - kept(theirs) == ours.keys() - kept(ours)
        for name in theirs:
            if not name.startswith("kept."):  # these say when and by whom, or are sums in other portions
                assert torch.equal(theirs[name], ours[name]), name


async def test_a_clean_stop_hands_over_without_the_session_time_out(topics, start):
    await send(topics, range(1_000), partitions=2)
    leader, standby = await leader_and_standby(start, topics, **SLOW)
    await until_learned(leader, topics, 1_000)
    leader.stop()
    await send(topics, range(1_000, 2_000), partitions=2)
    await until(lambda: leads(standby), standby)
    await until_learned(standby, topics, 2_000)
    standby.stop()
    assert await epochs(topics) == 2


async def test_a_leader_that_stood_still_ends_when_it_goes_on(topics, start):
    await send(topics, range(1_000), partitions=2)
    leader, standby = await leader_and_standby(start, topics, **QUICK)
    await until_learned(leader, topics, 1_000)
    leader.process.send_signal(signal.SIGSTOP)
    try:
        await send(topics, range(1_000, 2_000), partitions=2)
        await until_learned(standby, topics, 2_000)
    finally:
        leader.process.send_signal(signal.SIGCONT)
    assert await ended(leader) == 1
    log = leader.log.read_text()
    assert "expected to lead, found that" in log or "expected to be the only trainer that leads" in log
    await send(topics, range(2_000, 3_000), partitions=2)
    await until_learned(standby, topics, 3_000)
    standby.stop()
    assert await epochs(topics) == 2


class Supervisor:
    """Starts a trainer again whenever it ends, as compose or systemd do."""

    def __init__(self, start, settings: Settings, *options: str) -> None:
        self._start = lambda: start(settings, *options, **QUICK)
        self.now: Process = self._start()
        self.ends: list[int] = []
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while True:
            if (code := self.now.process.poll()) is not None:
                self.ends.append(code)
                self.now = self._start()
            await asyncio.sleep(0.2)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        self.now.stop()


async def test_under_supervisors_no_trainer_ends_but_those_that_are_killed(topics, start):
    one = Supervisor(start, topics)
    await until(lambda: leads(one.now), one.now)
    two = Supervisor(start, topics)
    await until(lambda: stands_by(two.now), two.now)
    sent = 0
    for kill in range(3):
        await send(topics, range(sent, sent + 500), partitions=2)
        sent += 500
        leader, other = (one, two) if leads(one.now) else (two, one)
        await until_learned(leader.now, topics, sent)
        killed = leader.now
        killed.kill()
        # Which of the two leads depends on who is first: the standby, or the supervisor's new process.
        await until(lambda leader=leader, killed=killed: leader.now is not killed, other.now)
        await until(lambda: {leads(one.now), leads(two.now)} == {True, False}, other.now)
        await until(lambda: stands_by(one.now) or stands_by(two.now), other.now)
        assert await epochs(topics) == kill + 2
    await send(topics, range(sent, sent + 500), partitions=2)
    await until_learned(one.now, topics, sent + 500)
    assert one.ends + two.ends == [-9, -9, -9]
    assert await epochs(topics) == 4
    await one.stop()
    await two.stop()


async def test_of_three_one_leads_whoever_ends(topics, start):
    await send(topics, range(500), partitions=2)
    leader, first = await leader_and_standby(start, topics, **QUICK)
    second = start(topics, **QUICK)
    await until(lambda: stands_by(second), second)
    assert leads(leader)
    await until_learned(leader, topics, 500)
    first.kill()  # a standby that is gone disturbs nobody
    await send(topics, range(500, 1_000), partitions=2)
    await until_learned(leader, topics, 1_000)
    third = start(topics, **QUICK)
    await until(lambda: stands_by(third), third)
    leader.stop()
    await until(lambda: leads(second) or leads(third), second)
    new, waiting = (second, third) if leads(second) else (third, second)
    assert stands_by(waiting)
    new.kill()
    await until(lambda: leads(waiting), waiting)
    await send(topics, range(1_000, 1_500), partitions=2)
    await until_learned(waiting, topics, 1_500)
    waiting.stop()
    assert await epochs(topics) == 3


async def test_take_over_is_for_one_start(topics, start):
    await send(topics, range(500), partitions=2)
    leader, standby = await leader_and_standby(start, topics, **QUICK)
    await until_learned(leader, topics, 500)
    new = start(topics, "--take-over", **QUICK)
    await until(lambda: leads(new), new)
    assert await ended(leader) == 1
    assert stands_by(standby)
    # A supervisor starts the old leader with the same option again.
    again = start(topics, "--take-over", **QUICK)
    await until(lambda: stands_by(again), again)
    assert "not taking over: expected a leader that has not itself taken over in the last 10 minutes" in again.log.read_text()
    model = start(topics, "--new-model", **QUICK)
    assert await ended(model) == 1
    assert "a new model: expected a leader that has not itself taken over" in model.log.read_text()
    assert leads(new)
    assert await epochs(topics) == 2


async def test_a_standby_outlives_a_kafka_that_is_away(tmp_path, start):
    chosen = LocalKafkaSettings(dir=tmp_path / "kafka", start_timeout_ms=120_000)
    with LocalKafka(chosen) as kafka:
        settings = Settings(
            kafka=KafkaSettings(bootstrap_servers=kafka.bootstrap_servers),
            topics=TopicSettings(prefix="away-", partitions=1, request_partitions=1),
            snapshots=SnapshotSettings(url=str(tmp_path / "snapshots")),
        )
        await asyncio.to_thread(create_topics, settings.kafka, settings.topics)
        await send(settings, range(500))
        leader, standby = await leader_and_standby(start, settings, **QUICK)
        await until_learned(leader, settings, 500)
        await asyncio.to_thread(kafka.stop)
        await until(lambda: not stands_by(standby), standby)  # it says that Kafka doesn't answer
        assert standby.answer("/healthz") == "ok\n"
        leader.kill()
        await asyncio.to_thread(kafka.start)
        await send(settings, range(500, 1_000))
        await until(lambda: leads(standby), standby)
        await until_learned(standby, settings, 1_000)
        standby.stop()
        assert await epochs(settings) == 2


async def test_a_standby_ends_at_once_when_asked_also_while_the_store_hangs(topics, start):
    await send(topics, range(500), partitions=2)
    leader, standby = await leader_and_standby(start, topics)
    await until_learned(leader, topics, 500)
    standby.stop()
    leader.stop()
    store = SnapshotStore(topics.snapshots)
    hang(Path(topics.snapshots.url) / f"v{store.versions()[-1]:010d}" / "manifest.json")
    waits = start(topics)
    await until(lambda: "http_port" in waits.log.read_text(), waits)
    assert waits.answer("/healthz") == "ok\n"
    waits.stop()


def hang(path: Path) -> None:
    """Make a file whose readers wait for ever."""
    path.unlink()
    os.mkfifo(path)
