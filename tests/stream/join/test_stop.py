"""A partition's loop ends when it is told to, whatever comes in at that moment."""

from __future__ import annotations

import asyncio

import pytest

from tests.stream.join.test_commit import NAMES, Bench


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("earlier_runs", [0, 1])
def test_a_run_that_comes_as_the_loop_is_cancelled(turns, earlier_runs):
    """So many turns of the event loop lie between the two; a loop that missed the cancellation would step on for good."""

    async def check() -> None:
        bench = Bench()
        task = asyncio.ensure_future(bench.partition.run())
        for _ in range(earlier_runs):  # with one, the loop is gathering more for the same step
            await bench.partition.put(bench.run(NAMES.clicks, [(b"a", 1)]))
        await asyncio.sleep(0.01)
        assert await bench.partition.put(bench.run(NAMES.impressions, [(b"a", 1)]))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=3.0)
        assert done
        assert task.cancelled()

    asyncio.run(check())
