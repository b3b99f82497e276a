"""Workers that are killed: at random, at named steps, while they take over, between a match and its label."""

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
    """One to three, of a worker that is ready or one that isn't."""
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


async def _fall(step: str, run: Run, **fault: object) -> None:
    """Have a worker that takes over without its disk come to a step."""
    worker = run.worker()
    # Early clicks wait only once enough is under way.
    await run.labels(150 if "clicks" in step else run.draw.randrange(1, 6))
    await run.pause(0.0, 0.5)
    await run.end(worker)
    # With the disk lost, or of an older time, there is more to recover.
    shutil.rmtree(run.state_of("one"))
    after = 1 if "being read" in step else run.draw.randrange(1, 3)
    run.start(worker, Fault(step=step, after=after, **fault))  # type: ignore[arg-type]


async def _recovery(step: str, run: Run) -> None:
    await _fall(step, run)
    await run.died(run.workers["one"])
    run.over()


async def _revoke(step: str, run: Run) -> None:
    run.hold()  # by the time that another has joined, all else would have been labelled
    first = run.worker("one", Fault(step=step, after=2))  # once when it joins, without partitions
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
async def _told_to_stop(run: Run) -> None:
    """A worker that is told to stop while it rebuilds ends in order, and the next one begins where it has to."""
    run.hold()
    await _fall(run.draw.choice(sorted(RECOVERY)), run, signal=int(signal.SIGTERM))
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
        await _fall(run.draw.choice(sorted(RECOVERY)), run, memory_group=str(group))
        await run.died(run.workers["one"])
        run.over()


@contextlib.asynccontextmanager
async def _memory_limit(name: str, *, mb: int) -> AsyncIterator[Path]:
    """A control group whose members may have so much more memory: the file that takes their ids."""
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
    for _ in range(100):  # until the last member's memory is given back
        with contextlib.suppress(OSError):
            await asyncio.to_thread(group.rmdir)
            return
        await asyncio.sleep(POLL_S)


@kind("kill -9 and the disk lost between match and hold", join=(("hold_ms", WINDOW_MS),), static=True)
async def _matched(run: Run) -> None:
    """What is killed knows of clicks whose impressions' labels are still held."""
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
