"""Wall clocks of brokers and workers that jump, by libfaketime."""

from __future__ import annotations

from tests.faults.clusters import Clock
from tests.faults.kinds.base import MAYBE, kinds, ready
from tests.faults.play import Kind
from tests.faults.run import Run

__all__ = ["KINDS"]

KINDS: list[Kind] = []
kind = kinds(KINDS)

JUMPS_S = (-7_200, -600, -5, 5, 600, 1_500)


@kind("the broker's clock jumps", cluster="clock", crashes=MAYBE)
async def _broker(run: Run) -> None:
    """The clock jumps ahead and back. The broker may end transactions because of it, and arrival times decrease."""
    clock = run.clusters.clock
    assert clock is not None
    worker = run.worker()
    try:
        for _ in range(run.draw.randrange(1, 4)):
            await run.labels(run.draw.randrange(1, 30))
            clock.set(run.draw.choice(JUMPS_S))
            await run.pause(1.0, 2.0)
        run.over()
        if run.draw.random() < 0.5:
            await run.end(worker)
            run.start(worker)
            await ready(worker)
    finally:
        clock.set(0)


@kind("the worker's clock jumps")
async def _worker(run: Run) -> None:
    clock = Clock(run.folder / "clock")
    run.environment = clock.environment
    worker = run.worker()
    for _ in range(run.draw.randrange(1, 4)):
        await run.labels(run.draw.randrange(1, 30))
        clock.set(run.draw.choice([*JUMPS_S, -86_400, 86_400]))
        await run.pause(1.0, 2.0)
        if run.draw.random() < 0.4:
            await run.end(worker)
            run.start(worker)
            await ready(worker)
    run.over()
