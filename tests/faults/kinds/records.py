"""Streams that are difficult by themselves, with workers killed meanwhile."""

from __future__ import annotations

from functools import partial

from tests.faults.kinds.base import kinds
from tests.faults.kinds.killed import random_kills
from tests.faults.play import Kind
from tests.faults.run import Run
from tests.faults.stream import large, quiet, returning, wrong_clocks

__all__ = ["KINDS"]

KINDS: list[Kind] = []
kind = kinds(KINDS)

MINUTE_MS = 60_000

kind("ids used again", stream=partial(returning, again=True))(random_kills)
kind("records that come late", stream=partial(returning, again=False))(random_kills)
kind("large and compressed records", stream=large)(random_kills)
kind("one client's clock ahead", stream=partial(wrong_clocks, ahead_ms=30 * MINUTE_MS))(random_kills)


@kind("sources silent, idle timeout as shipped", stream=quiet, join=(("idle_timeout_ms", 5_000),))
async def _silent(run: Run) -> None:
    """One or two kills, at any time."""
    worker = run.worker()
    await run.labels()
    for _ in range(run.draw.randrange(1, 3)):
        await run.pause(1.0, 8.0)
        await run.end(worker)
        run.start(worker)
        run.over()
