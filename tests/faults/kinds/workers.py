"""Workers that compete, and settings that change between two starts."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal

from tests.faults.kinds.base import kinds, ready
from tests.faults.play import Kind
from tests.faults.run import POLL_S, Run, happens

__all__ = ["KINDS"]

KINDS: list[Kind] = []
kind = kinds(KINDS)

# Errors in a worker's log if another worker has taken over its transactional id.
FENCED = ("ProducerFenced", "InvalidProducerEpoch")


@kind("stopped until fenced, then resumed", static=False)
async def _zombie(run: Run) -> None:
    run.hold()
    still = run.worker("still")
    await run.labels()
    await run.pause(0.0, 0.5)
    still.wanted = False  # once fenced it must end by itself, and isn't started again
    os.kill(still.pid, signal.SIGSTOP)
    run.over()
    await ready(run.worker("other"))  # it has taken over
    os.kill(still.pid, signal.SIGCONT)
    run.go_on()  # records that the resumed worker would label, too
    async with happens("the one that was stopped ends"):
        while still.returncode is None:
            await asyncio.sleep(POLL_S)
    log = still.log.read_text()
    assert still.returncode == 1 and any(word in log for word in FENCED), f"ended with {still.returncode}, not fenced:\n{log}"


@kind("workers join and leave under load", static=False)
async def _comings_and_goings(run: Run) -> None:
    run.worker("0")
    for number in range(1, 4):
        await run.pause(0.3, 1.5)
        run.worker(str(number))
        if run.draw.random() < 0.6:
            gone = run.draw.choice([worker for worker in run.workers.values() if worker.wanted])
            await run.pause(0.0, 1.5)
            if any(worker is not gone and worker.wanted for worker in run.workers.values()):
                await run.leave(gone)


@kind("a partition goes to another worker and comes back", static=False)
async def _there_and_back(run: Run) -> None:
    run.hold()
    first = run.worker("first")
    await run.labels()
    second = run.worker("second")
    await ready(second)
    run.go_on()
    await run.labels(run.draw.randrange(1, 30))
    await run.leave(second)
    await run.pause(1.0, 3.0)
    if run.draw.random() < 0.5:
        run.start(second)
    assert first.wanted


@kind("one state folder for two workers", static=False)
async def _one_folder(run: Run) -> None:
    """A partition's folder may be open in the other worker. Each worker needs its own, and may or may not find it again."""
    run.hold()
    shared = run.folder / "state-shared"
    one = run.worker("one", state=shared)
    await run.labels()
    two = run.worker("two", state=shared)
    await ready(two)
    run.go_on()
    await run.labels(run.draw.randrange(1, 30))
    for worker in run.draw.sample([one, two], run.draw.choice([1, 2])):
        await run.end(worker, run.draw.choice([signal.SIGTERM, signal.SIGKILL]))
        run.start(worker)
    run.over()


@kind("one instance_id for two workers", static=True)
async def _one_name(run: Run) -> None:
    """The second worker replaces the first one in the group. The first must end with an error that says so."""
    run.hold()
    first = run.worker("one")
    await run.labels()
    await run.pause(0.0, 0.5)
    first.wanted = False
    run.worker("two", instance="one")
    run.over()
    async with happens("the first ends"):
        while first.returncode is None:
            await asyncio.sleep(POLL_S)
    log = first.log.read_text()
    assert first.returncode == 1, f"expected it to end with 1, found {first.returncode}:\n{log[-3_000:]}"
    assert any(word in log for word in ("FencedInstanceId", "instance_id", *FENCED)), f"no reason in the log:\n{log[-3_000:]}"
    run.go_on()


@kind("settings changed between lives", static=True)
async def _settings(run: Run) -> None:
    """Hold, window, dedupe horizon and rate change, with the disk kept or lost. Pending impressions keep their old settings."""
    worker, draw = run.worker(), run.draw
    choices = {
        "hold_ms": [0, 300, 3_000, 10_000],
        "window_ms": [5_000, 10_000, 14_000],
        "dedupe_horizon_ms": [10_000, 15_000, 25_000],
        "negative_rate": [1.0, 0.5, 0.1],
    }
    for number in range(draw.randrange(1, 4)):
        await run.labels(draw.randrange(1, 40))
        if number:
            await ready(worker)
        await run.pause(0.0, 0.8)
        await run.end(worker, draw.choice([signal.SIGTERM, signal.SIGKILL]))
        if draw.random() < 0.5:
            shutil.rmtree(run.state_of("one"), ignore_errors=True)
        chosen = draw.sample(sorted(choices), draw.randrange(1, 4))
        await run.change(worker, **{name: draw.choice(choices[name]) for name in chosen})
        run.start(worker)
        run.over()
