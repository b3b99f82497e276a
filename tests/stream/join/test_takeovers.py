"""Takeovers and rebalances: one that is under way goes on while its partition stays, and ends when it goes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP
from prometheus_client import CollectorRegistry

from stream.errors import Abandoned
from stream.join import worker as module
from stream.join.rebuild_progress import RebuildProgress
from stream.join.worker import JoinWorker
from stream.kafka.cluster import Cluster
from stream.settings import JoinSettings, KafkaSettings, SchemaRegistrySettings, TopicSettings
from stream.topics.names import TopicNames

NAMES = TopicNames.of(TopicSettings())
TOPICS = (NAMES.impressions, NAMES.clicks, NAMES.examples, NAMES.dead_letters)
CLUSTER = Cluster("c", dict.fromkeys(TOPICS, "id"), dict.fromkeys(TOPICS, 4))


class Bench:
    """A join worker without Kafka, whose takeovers end when they are told to."""

    def __init__(self, folder: Path) -> None:
        self.worker: Any = JoinWorker(
            kafka=KafkaSettings(),
            settings=JoinSettings(),
            schema_registry=SchemaRegistrySettings(),
            names=NAMES,
            cluster=CLUSTER,
            state_dir=folder,
            prometheus=CollectorRegistry(),
        )
        self.begun, self.ended, self.closed = Counter[int](), dict[int, str](), list[int]()
        self.events: dict[int, asyncio.Event] = {}
        self.worker._take = self._take
        self.worker.app.consumer = SimpleNamespace(assignment=lambda: self.assigned, stop_flow=lambda: None)
        self.assigned: set[TP] = set()

    async def _take(self, number: int, still_ours: Callable[[], bool]) -> Any:
        self.begun[number] += 1
        self.worker._rebuilds[number] = RebuildProgress(number)
        event = self.events.setdefault(number, asyncio.Event())
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.ended[number] = "given up"
            raise
        self.ended[number] = "taken"
        del self.worker._rebuilds[number]

        async def run() -> None:
            await asyncio.Event().wait()

        async def close() -> None:
            self.closed.append(number)

        return SimpleNamespace(number=number, run=run, close=close, reset=lambda: None)

    def rebalance(self, *numbers: int) -> asyncio.Task[None]:
        """The next generation, with these partitions."""
        self.worker.app.consumer_generation_id += 1
        self.assigned = {TP(topic, number) for topic in TOPICS[:2] for number in numbers}
        return asyncio.ensure_future(self.worker._rebalanced())


def check(folder: Path, monkeypatch: pytest.MonkeyPatch, scene: Callable[[Bench], Awaitable[None]]) -> None:
    monkeypatch.setattr(module, "GENERATION_LOOK_S", 0.01)

    async def run() -> None:
        bench = Bench(folder)
        async with asyncio.timeout(20.0):
            await scene(bench)
            await bench.worker.drain()

    asyncio.run(run())


async def begun(bench: Bench, *numbers: int) -> None:
    while any(not bench.begun[number] for number in numbers):
        await asyncio.sleep(0)


def test_a_takeover_outlives_rebalances_that_leave_it_its_partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, every rebalance began it anew: a long one never ended while workers came and went."""

    async def scene(bench: Bench) -> None:
        first = bench.rebalance(0, 1)
        await begun(bench, 0, 1)
        second = bench.rebalance(0, 2)
        with pytest.raises(Abandoned):
            await first
        await begun(bench, 2)
        assert bench.ended == {1: "given up"}
        assert "1 of" not in (bench.worker.ready() or "")
        for number in (0, 2):
            bench.events[number].set()
        await second
        assert bench.begun == {0: 1, 1: 1, 2: 1}
        assert bench.worker.partitions.keys() == bench.worker._loops.keys() == {0, 2}
        assert bench.worker.ready() is None
        await bench.rebalance(0)
        assert bench.closed == [2]

    check(tmp_path, monkeypatch, scene)


def test_a_rebalance_that_completes_while_the_steps_end_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the worker takes over a partition that has gone to another worker, and fences that worker's producer."""

    async def scene(bench: Bench) -> None:
        step_ends = asyncio.Event()

        async def step() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await step_ends.wait()  # its transaction
                raise

        bench.events = {number: asyncio.Event() for number in (0, 1)}
        for event in bench.events.values():
            event.set()
        await bench.rebalance(0)
        bench.worker._loops[0].cancel()
        bench.worker._loops[0] = asyncio.ensure_future(step())
        await asyncio.sleep(0)
        earlier = bench.rebalance(0, 1)
        await asyncio.sleep(0.05)
        later = bench.rebalance(0)
        step_ends.set()
        await asyncio.gather(earlier, later, return_exceptions=True)
        assert bench.begun == {0: 1} and bench.worker._loops.keys() == {0}

    check(tmp_path, monkeypatch, scene)


def test_one_that_fails_fails_the_rebalance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(bench: Bench) -> None:
        async def fails(number: int, still_ours: Callable[[], bool]) -> None:
            raise ValueError(f"partition {number}")

        bench.worker._take = fails
        with pytest.raises(ValueError, match="partition 3"):
            await bench.rebalance(3)

    check(tmp_path, monkeypatch, scene)


def test_draining_gives_them_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(bench: Bench) -> None:
        waiting = bench.rebalance(0, 1)
        await begun(bench, 0, 1)
        await bench.worker.drain()
        assert bench.ended == {0: "given up", 1: "given up"}
        with pytest.raises(Abandoned):
            await waiting
        assert bench.worker.partitions == {}

    check(tmp_path, monkeypatch, scene)
