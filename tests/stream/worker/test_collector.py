"""Python's cyclic garbage collector is kept out of the way, and the hot path of the join needs none: it makes no cycles."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest

from state.join_state import JoinState, StateOptions
from stream.worker.collector import YOUNG_OBJECTS, tame_collector
from tests.stream.join.test_commit import NAMES, Bench


@pytest.fixture
def collector() -> Iterator[None]:
    """As it was, after the test."""
    before = gc.get_threshold()
    yield
    gc.enable()
    gc.unfreeze()
    gc.set_threshold(*before)


def test_once_a_worker_is_ready_what_it_began_with_is_left_out(collector, monkeypatch):
    monkeypatch.setattr("stream.worker.collector.FREEZE_LOOK_S", 0.001)

    async def check() -> None:
        answers = iter(["not yet", "not yet", None])
        frozen: list[int] = []

        def ready() -> str | None:
            frozen.append(gc.get_freeze_count())
            return next(answers)

        await tame_collector(ready)
        assert frozen == [0, 0, 0]

    asyncio.run(check())
    assert gc.get_threshold()[0] == YOUNG_OBJECTS
    assert gc.get_freeze_count() > 10_000


def test_steps_of_the_join_make_no_cycles(collector, tmp_path):
    """Through the partition's own loop, with positives, negatives and steps of nothing: hundreds of records and of labels."""

    async def check() -> tuple[int, int]:
        bench = Bench()
        bench.partition._state = bench.producer.state = JoinState(tmp_path / "0", StateOptions(8))  # type: ignore[assignment]
        loop = asyncio.ensure_future(bench.partition.run())

        async def feed(rounds: range) -> None:
            for number in rounds:
                partition, ids = bench.partition, [b"%d-%d" % (number, index) for index in range(20)]
                steps = partition.steps
                await partition.put(bench.run(NAMES.impressions, [(key, 100 * number) for key in ids]))
                await partition.put(bench.run(NAMES.clicks, [(key, 100 * number + 5) for key in ids[::3]]))
                while partition.steps == steps or not partition._queue.empty():
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.01)

        await feed(range(1, 4))
        gc.disable()
        began, found = bench.partition.steps, []
        for first in (4, 14, 24):  # threads that other tests left in this process make some in one round, but not in all
            gc.collect()
            await feed(range(first, first + 10))
            found.append(gc.collect())
        loop.cancel()
        await asyncio.wait([loop])
        return min(found), bench.partition.steps - began

    found, steps = asyncio.run(check())
    assert steps >= 10
    assert found == 0
