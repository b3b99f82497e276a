"""Workers that are killed: at random times, at named steps, while they take over, and between a match and its label."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

from tests.faults.clusters import Skipped
from tests.faults.kinds.base import kinds, ready
from tests.faults.play import Kind
from tests.faults.run import POLL_S, Run, happens
from tests.faults.stream import WINDOW_MS
from tests.faults.worker import RECOVERY, REVOKE, STEPS, Fault

__all__ = ["KINDS", "random_kills"]

KINDS: list[Kind] = []
kind = kinds(KINDS)


async def random_kills(run: Run) -> None:
    """One to three kills, of a worker that is ready or still starting."""
    worker = run.worker()
    for _ in range(run.draw.randrange(1, 4)):
        if run.draw.random() < 0.7:
            await ready(worker)
            await run.pause(0.0, 0.8)
        else:
            await run.pause(0.3, 2.0)
        await run.end(worker)
        run.start(worker)
        run.over()


kind("kill -9 at random moments")(random_kills)


async def _step(step: str, run: Run) -> None:
    after = run.draw.randrange(1, 3 if step == "in a flush" else 12)
    worker = run.worker("one", Fault(step=step, after=after, flush_s=0.2))
    await run.died(worker)
    run.over()


async def _fault_in_takeover(step: str, run: Run, **fault: object) -> None:
    """Start a worker with a lost disk and a fault at a step of taking over."""
    worker = run.worker()
    # There are only early clicks to be read once enough events are sent.
    await run.labels(150 if "clicks" in step else run.draw.randrange(1, 6))
    await run.pause(0.0, 0.5)
    await run.end(worker)
    # Without its disk, the worker has more to recover.
    shutil.rmtree(run.state_of("one"))
    after = 1 if "being read" in step else run.draw.randrange(1, 3)
    run.start(worker, Fault(step=step, after=after, **fault))  # type: ignore[arg-type]


async def _recovery(step: str, run: Run) -> None:
    await _fault_in_takeover(step, run)
    await run.died(run.workers["one"])
    run.over()


async def _revoke(step: str, run: Run) -> None:
    run.hold()  # otherwise everything would be labelled before the second worker has joined
    first = run.worker("one", Fault(step=step, after=2))  # the first time is when it joins, without partitions
    await run.labels()
    await run.pause(0.0, 0.5)
    run.worker("two")
    await run.died(first)
    run.over()
    run.go_on()


KINDS += [Kind(f"kill -9 {step}", partial(_step, step), killed=1) for step in STEPS]
KINDS += [Kind(f"kill -9 {step}", partial(_recovery, step), static=True, killed=1) for step in RECOVERY]
KINDS += [Kind(f"kill -9 {step}", partial(_revoke, step), static=False, killed=1) for step in REVOKE]


@kind("SIGTERM in a takeover", static=True)
async def _asked_to_stop(run: Run) -> None:
    """A worker that gets SIGTERM while it rebuilds ends in order, and the next worker begins at the right position."""
    run.hold()
    await _fault_in_takeover(run.draw.choice(sorted(RECOVERY)), run, signal=int(signal.SIGTERM))
    worker = run.workers["one"]
    worker.wanted = False
    async with happens("the worker ends"):
        while worker.returncode is None:
            await asyncio.sleep(POLL_S)
    assert worker.returncode == 0, f"expected it to end with 0, found {worker.returncode}"
    run.go_on()
    run.start(worker)
    run.over()


@kind("the kernel's OOM killer in a takeover", static=True, killed=1)
async def _out_of_memory(run: Run) -> None:
    async with _memory_limit(f"headrace-faults-{os.getpid()}-{id(run)}", mb=32) as group:
        await _fault_in_takeover(run.draw.choice(sorted(RECOVERY)), run, memory_group=str(group))
        await run.died(run.workers["one"])
        run.over()


@contextlib.asynccontextmanager
async def _memory_limit(name: str, *, mb: int) -> AsyncIterator[Path]:
    """A control group whose members may use so much more memory; gives the file to which members write their pid."""
    for root, limit in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")):
        group = root / name
        try:
            await asyncio.to_thread(group.mkdir)
        except OSError:
            continue
        try:
            (group / limit).write_text(str(mb << 20))
            yield group / "cgroup.procs"
        except FileNotFoundError:
            continue
        finally:
            await _removed(group)
        return
    raise Skipped("the OOM killer: expected a memory control group that can be made (root, cgroups v1 or v2), found none")


async def _removed(group: Path) -> None:
    for _ in range(100):  # until the memory of its last member is released
        with contextlib.suppress(OSError):
            await asyncio.to_thread(group.rmdir)
            return
        await asyncio.sleep(POLL_S)


@kind("kill -9 and the disk lost between match and hold", join=(("hold_ms", WINDOW_MS),), static=True)
async def _matched(run: Run) -> None:
    """The worker that is killed has matched clicks with impressions whose labels are still held."""
    worker = run.worker()
    run.hold()
    await run.labels(run.draw.randrange(1, 40))
    await run.pause(0.0, 0.5)
    await run.end(worker)
    held = [use for use in (await run.ledger()).uses.values() if use.clicks_read and not use.found]
    assert held, "the fault did not happen: no click waits for a label"
    shutil.rmtree(run.state_of("one"))
    run.start(worker)
    run.over()
    run.go_on()
