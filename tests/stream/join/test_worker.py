"""The join as a process, on the real Kafka: whatever happens to it, each impression gets its right label once."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.structs import TopicPartition

from deploy.demo.audit import Audit
from deploy.processes.workers import Worker
from deploy.settings import Settings
from state.join_state import JoinState, StateOptions
from stream.join.sampling import Sampling
from stream.join.takeover import transactional_id
from stream.kafka.clients import aiokafka_options
from stream.topics.names import TopicNames
from tests.stream.join.made_up import PATIENCE_S, end, join_settings, join_worker, made_up, send, settled, until

pytestmark = pytest.mark.kafka

Start = Callable[..., Worker]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts join workers; what a test leaves running is killed."""
    started: list[Worker] = []

    def one(settings: Settings, name: str = "join") -> Worker:
        started.append(join_worker(settings, tmp_path, name))
        started[-1].start()
        return started[-1]

    yield one
    for worker in started:
        if worker.returncode is None:
            worker.kill()
        worker.wait_stopped()


def total(worker: Worker, name: str) -> float:
    """The sum of a metric over its labels."""
    return sum(value for (sample, _), value in worker.metrics().items() if sample == name)


def pending(worker: Worker) -> dict[str, float]:
    """Impressions pending, by partition that it reports on."""
    gauge = "headrace_join_pending_impressions"
    return {labels[0]: value for (name, labels), value in worker.metrics().items() if name == gauge}


def test_each_impression_gets_its_label_once(topics, start):
    async def check() -> None:
        settings, events = join_settings(topics), made_up(8_000, seed=1)
        worker = start(settings)
        await send(settings, events.arriving)
        await settled(settings, events, worker)

    asyncio.run(check())


def test_labels_at_once_some_left_out_through_kill_9(topics, start):
    """Each impression has a label or is named as left out, those clicked later a correction besides; the disk is lost."""

    async def check() -> None:
        settings = join_settings(topics, hold_ms=0, negative_rate=0.5)
        events = made_up(3_000, seed=9)
        worker = start(settings)
        await asyncio.to_thread(worker.wait_ready)
        await send(settings, events.part(0.0, 0.6))
        await caught_up(settings, worker)
        worker.kill()
        shutil.rmtree(settings.state_dir)
        worker.start()
        await send(settings, events.part(0.6, 1.0))
        await end(settings, events)
        async with Audit(settings) as audit:
            deadline = time.monotonic() + PATIENCE_S
            while (await audit.read()).dead_letters != events.dead and time.monotonic() < deadline:
                worker.check()
                await asyncio.sleep(0.1)
            ledger = await audit.read()
        kept = {key for key in events.ids if Sampling(0.5).keeps(key)}
        assert ledger.problems() == []
        # Some clicks have their impression's own time: such labels are positive at once, whatever the hash says.
        labelled = kept | (events.positives - ledger.corrections.keys())
        assert ledger.labels == Counter(dict.fromkeys(labelled, 1))
        assert ledger.left_out.total() == len(events.ids) - len(labelled)
        assert set(ledger.positives) == events.positives
        assert ledger.corrections.keys() < events.positives
        assert set(ledger.corrections.values()) == {1}
        assert ledger.dead_letters == events.dead
        await until(lambda: pending(worker) == {"0": 0, "1": 0}, "nothing pending", worker)

    asyncio.run(check())


def test_kill_9_again_and_again(topics, start):
    """At any moment: while it starts, takes over, steps, commits. Once the disk is lost with it."""

    async def check() -> None:
        seed = 2
        settings, events, draw = join_settings(topics), made_up(4_000, seed), random.Random(seed)
        sending = asyncio.ensure_future(send(settings, events.arriving, over_s=12.0))
        worker = start(settings)
        for time_ in range(5):
            if draw.random() < 0.7:
                await asyncio.to_thread(worker.wait_ready)
                await asyncio.sleep(draw.uniform(0.0, 0.8))
            else:
                await asyncio.sleep(draw.uniform(0.8, 2.5))
            worker.kill()
            if time_ == 2:
                shutil.rmtree(settings.state_dir)
            worker.start()
        await sending
        await settled(settings, events, worker)

    asyncio.run(check())


def content(settings: Settings, number: int) -> dict[str, Any]:
    """What a stopped worker's state holds."""
    state = JoinState(settings.state_dir / f"partition-{number}", StateOptions())
    try:
        meta = state.meta()
        assert meta is not None
        # Below this an id can be forgotten at any time: chunks are forgotten as a whole, and a rebuild cuts them otherwise.
        bound = meta.watermark_ms - settings.join.window_ms - 2 * settings.join.dedupe_horizon_ms
        keys = list(state.ids.keys())
        return {
            "ids": {key: entry for key, entry in zip(keys, state.entries(keys), strict=True) if entry and entry[0] >= bound},
            "pending": list(state.pending_between((0, 0), (1 << 60, 0))),
            "early": sorted(state.early_clicks()),
            "positions": (meta.impressions_position, meta.clicks_position),
            "watermarks": (meta.watermark_ms, meta.impressions_seen_ms, meta.clicks_seen_ms),
        }
    finally:
        state.close()


async def caught_up(settings: Settings, worker: Worker) -> None:
    """Wait until the join has committed everything that was sent, and has expired all that is due by it."""
    names = TopicNames.of(settings.topics)
    places = [TopicPartition(topic, number) for topic in (names.impressions, names.clicks) for number in (0, 1)]
    admin = AIOKafkaAdminClient(**aiokafka_options(settings.kafka))
    await admin.start()
    try:
        async with AIOKafkaConsumer(**aiokafka_options(settings.kafka)) as consumer:
            ends = await consumer.end_offsets(places)
        deadline, last, since = time.monotonic() + PATIENCE_S, None, time.monotonic()
        while True:
            found = await admin.list_consumer_group_offsets(f"{names.prefix}{settings.join.group}", partitions=places)
            if (now := [found[place] for place in places]) != last:
                last, since = now, time.monotonic()
            # A partition steps every tick of 0.1 s: what stands still for several has nothing due.
            if all(found[place].offset == ends[place] for place in places) and time.monotonic() - since > 0.7:
                return
            worker.check()
            assert time.monotonic() < deadline, f"committed {found} of {ends}"
            await asyncio.sleep(0.05)
    finally:
        await admin.close()


def test_the_state_is_what_the_log_says(topics, start):
    """Rebuilt from nothing, or from any older copy of itself, it is the state that was there; and work goes on from it."""

    async def check() -> None:
        settings, events = join_settings(topics), made_up(4_000, seed=5)
        older = settings.state_dir.with_name("older")

        async def go_on(begin: float, finish: float) -> None:
            """Join this part of the stream, and stop cleanly."""
            worker = start(settings)
            await asyncio.to_thread(worker.wait_ready)
            await send(settings, events.part(begin, finish))
            await caught_up(settings, worker)
            worker.ask_to_stop()
            await asyncio.to_thread(worker.wait_stopped)
            assert worker.returncode == 0, worker.log.read_text()[-4_000:]

        await go_on(0.0, 0.3)
        shutil.copytree(settings.state_dir, older)
        await go_on(0.3, 0.7)
        there = [content(settings, number) for number in (0, 1)]
        for each in there:
            assert len(each["ids"]) > len(each["pending"]) > 0
            assert any(clicked for _, _, clicked in each["ids"].values())
            assert each["early"]
        for back in (None, older):
            shutil.rmtree(settings.state_dir)
            if back is not None:
                shutil.copytree(back, settings.state_dir)
            await go_on(0.7, 0.7)
            assert [content(settings, number) for number in (0, 1)] == there
        # The older state once more, then the rest of the stream.
        shutil.rmtree(settings.state_dir)
        shutil.copytree(older, settings.state_dir)
        worker = start(settings)
        await send(settings, events.part(0.7, 1.0))
        await settled(settings, events, worker)

    asyncio.run(check())


def test_partitions_move_to_a_second_worker_and_back(topics, start):
    async def check() -> None:
        quick = join_settings(topics, session_timeout_ms=3_000, instance_id=None, hold_ms=500)
        away = quick.model_copy(update={"state_dir": quick.state_dir.with_name("away")})
        events = made_up(6_000, seed=7)
        first = start(quick, "first")
        await send(quick, events.part(0.0, 0.4))
        await until(lambda: total(first, "headrace_join_examples_total") > 0, "the first labels", first)
        second = start(away, "second")
        await until(lambda: len(pending(second)) == 1, "the second has one", first, second)
        sending = asyncio.ensure_future(send(quick, events.part(0.4, 1.0), over_s=10.0))
        await until(lambda: total(second, "headrace_join_examples_total") > 100, "labels by the second worker", first, second)
        before = total(first, "headrace_join_examples_total")
        await until(lambda: total(first, "headrace_join_examples_total") > before, "labels by both", first, second)
        second.kill()
        await until(lambda: len(pending(first)) == 2, "the first has both again", first)
        second.start()
        await until(lambda: len(pending(second)) == 1, "the second has one again", first, second)
        second.ask_to_stop()
        await asyncio.to_thread(second.wait_stopped)
        assert second.returncode == 0, second.log.read_text()[-4_000:]
        await sending
        await settled(quick, events, first)

    asyncio.run(check())


def test_a_worker_that_stood_still_while_another_had_its_partitions_does_no_harm(topics, start):
    async def check() -> None:
        quick = join_settings(topics, session_timeout_ms=2_000, instance_id=None, hold_ms=500)
        away = quick.model_copy(update={"state_dir": quick.state_dir.with_name("away")})
        events = made_up(4_000, seed=8)
        still = start(quick, "still")
        await asyncio.to_thread(still.wait_ready)  # before anything is sent: the other is to find most of it
        sending = asyncio.ensure_future(send(quick, events.arriving, over_s=10.0))
        await until(lambda: total(still, "headrace_join_examples_total") > 0, "the first labels", still)
        os.kill(still.pid, signal.SIGSTOP)
        other = start(away, "other")
        await until(lambda: total(other, "headrace_join_examples_total") > 200, "labels by the other worker", other)
        os.kill(still.pid, signal.SIGCONT)
        await sending
        # Either it was told of the rebalance in time, or its first transaction was refused and it has ended by itself.
        still.ask_to_stop()
        await asyncio.to_thread(still.wait_stopped)
        assert still.returncode in (0, 1)
        await settled(quick, events, other)

    asyncio.run(check())


def test_a_worker_that_is_fenced_ends_and_writes_nothing_more(topics, start):
    async def check() -> None:
        settings, events = join_settings(topics), made_up(3_000, seed=9)
        names = TopicNames.of(settings.topics)
        worker = start(settings)
        await send(settings, events.part(0.0, 0.5))
        await until(lambda: total(worker, "headrace_join_examples_total") > 100, "the first labels", worker)
        thief = AIOKafkaProducer(**aiokafka_options(settings.kafka), transactional_id=transactional_id(names, settings.join, 0))
        await thief.start()
        await thief.stop()
        written = await examples_end(settings, 0)
        await send(settings, events.part(0.5, 1.0))
        await until(lambda: worker.returncode is not None, "the fenced worker's end")
        assert worker.returncode == 1
        assert "The process ends" in worker.log.read_text()
        assert await examples_end(settings, 0) == written
        worker.start()
        await settled(settings, events, worker)

    asyncio.run(check())


async def examples_end(settings: Settings, number: int) -> int:
    """The end of an `examples` partition, records of open and aborted transactions included."""
    tp = TopicPartition(TopicNames.of(settings.topics).examples, number)
    async with AIOKafkaConsumer(**aiokafka_options(settings.kafka)) as consumer:
        return (await consumer.end_offsets([tp]))[tp]
