"""State folders that are lost, old or of another worker, full and slow disks, and too few open files."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

from tests.faults.clusters import Skipped
from tests.faults.fault_worker import FaultWorker
from tests.faults.kinds.base import kinds, ready
from tests.faults.play import Kind
from tests.faults.run import POLL_S, Run, happens
from tests.faults.sender import Sender
from tests.faults.stream import CLICKS, ordinary
from tests.faults.worker import Fault

__all__ = ["KINDS"]

KINDS: list[Kind] = []
kind = kinds(KINDS)

HOUR_MS = 3_600_000


async def _with_state(run: Run, change: Callable[[FaultWorker], Awaitable[None]]) -> None:
    """End a worker, change its state folder, and start it again."""
    worker = run.worker()
    await run.labels(run.draw.randrange(1, 20))
    await run.pause(0.0, 0.8)
    await run.end(worker, run.draw.choice([signal.SIGTERM, signal.SIGKILL]))
    await change(worker)
    run.start(worker, Fault(flush_s=0.2))
    run.over()


@kind("state folder deleted")
async def _deleted(run: Run) -> None:
    async def change(worker: FaultWorker) -> None:
        shutil.rmtree(run.state_of("one"))

    await _with_state(run, change)


@kind("state folder of an older time")
async def _older(run: Run) -> None:
    older = run.folder / "older"

    async def change(worker: FaultWorker) -> None:
        shutil.copytree(run.state_of("one"), older)
        run.start(worker, Fault(flush_s=0.2))
        await run.labels(run.draw.randrange(1, 20))
        await run.pause(0.0, 0.5)
        await run.end(worker)
        shutil.rmtree(run.state_of("one"))
        shutil.copytree(older, run.state_of("one"))

    await _with_state(run, change)


@kind("state folder of another worker", static=False)
async def _of_another(run: Run) -> None:
    """Two workers swap their state folders, in half of the runs also with the names of the partitions swapped."""
    one, two = run.worker("one", Fault(flush_s=0.2)), run.worker("two", Fault(flush_s=0.2))
    states = run.state_of("one"), run.state_of("two")
    await run.labels()
    while not all(any(folder.glob("partition-?")) for folder in states):  # one may have both partitions at first
        await asyncio.sleep(POLL_S)
    await run.pause(0.3, 1.0)
    await run.end(one)
    await run.end(two)
    aside = run.folder / "aside"
    states[0].rename(aside)
    states[1].rename(states[0])
    aside.rename(states[1])
    if run.draw.random() < 0.5:
        for folder in states:
            for path in sorted(folder.glob("partition-?")):
                other = path.with_name(f"partition-{1 - int(path.name[-1])}")
                if not other.exists():
                    path.rename(other)
    run.start(one)
    run.start(two)
    run.over()


@kind(
    "a source stalled for hours, then the disk lost",
    sends=False,
    stream=partial(ordinary, every_ms=6_000),
    join=(("max_ahead_ms", 24 * HOUR_MS),),
)
async def _stalled(run: Run) -> None:
    """All impressions of 2.7 hours come without further clicks, so they all wait. Then the clicks come, without the disk."""
    worker, rows = run.worker(), run.stream.rows
    clicks, others = [row for row in rows if row.source == CLICKS], [row for row in rows if row.source != CLICKS]
    some = run.draw.randrange(1, 40)
    async with Sender(run.settings) as sender:
        await sender.send(sorted(clicks[:some] + others[:some], key=rows.index), over_s=0.1)
        await sender.send(others[some:], over_s=1.0)
    await ready(worker)
    await run.pause(0.5, 1.5)
    await run.end(worker)
    shutil.rmtree(run.state_of("one"))
    run.start(worker)
    run.over()
    async with Sender(run.settings) as sender:
        await sender.send(clicks[some:], over_s=1.0)


@kind("disk full", crashes=(1, 10))
async def _disk_full(run: Run) -> None:
    async with _small_disk(run.folder / "disk", size_mb=16) as disk:
        worker = run.worker("one", Fault(flush_s=0.1), state=disk / "state")
        await run.labels()
        await run.pause(0.0, 0.5)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 65_536)
        await run.died(worker, 1)
        await run.pause(0.5, 3.0)
        filler.unlink()
        run.over()
        await run.labels()
        await run.end(worker, signal.SIGTERM)
        shutil.copytree(disk / "state", run.state_of("one"))
    run.worker("one")


@contextlib.asynccontextmanager
async def _small_disk(folder: Path, *, size_mb: int) -> AsyncIterator[Path]:
    await asyncio.to_thread(folder.mkdir)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "headrace-faults", str(folder)]
    found = await asyncio.to_thread(subprocess.run, mount, capture_output=True, text=True, check=False)
    if found.returncode:
        raise Skipped(f"a full disk: expected to mount a small one (root), found {found.stderr.strip()}")
    try:
        yield folder
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", "-l", str(folder)], check=True)


@kind("slow disk", crashes=(0, 1))
async def _slow_disk(run: Run) -> None:
    """Every fsync of the worker takes 0.3 to 1 s longer, also when it takes over again."""
    if shutil.which("strace") is None:
        raise Skipped("a slow disk: expected strace (apt install strace), which delays fsync, found none")
    delay_us = run.draw.randrange(300_000, 1_000_000)
    calls = "fsync,fdatasync,sync_file_range"
    trace = ["-e", f"trace={calls}", "-e", f"inject={calls}:delay_enter={delay_us}", "-o", "/dev/null"]
    run.before = ("strace", "-D", "-f", "-q", "--seccomp-bpf", *trace)
    run.drains_late = True
    worker = run.worker("one", Fault(flush_s=0.1))
    await run.labels(run.draw.randrange(20, 100))
    await run.end(worker)
    run.start(worker, Fault(flush_s=0.1))
    run.over()


@kind("too few open files allowed", static=True, crashes=(1, 10))
async def _few_files(run: Run) -> None:
    """A start with too low a limit must end with an error that says so, and leave the folder as it is."""
    run.hold()
    worker = run.worker("one", Fault(flush_s=0.1))
    await run.labels(run.draw.randrange(1, 40))
    await run.pause(0.0, 0.5)
    await run.end(worker, run.draw.choice([signal.SIGTERM, signal.SIGKILL]))
    before = _folders(run.state_of("one"))
    assert before, "no state folder"
    run.start(worker, Fault(open_files=run.draw.choice([24, 40, 64])))
    async with happens("the worker ends without file descriptors"):
        while not worker.ended:
            await asyncio.sleep(POLL_S)
    worker.wanted = False
    if worker.returncode is None:
        worker.kill()
    worker.ended = worker.ended[:1]
    log = worker.log.read_text(errors="replace")
    assert "open files" in log or "RLIMIT_NOFILE" in log or "ulimit" in log, f"no reason in the log:\n{log[-3_000:]}"
    assert _folders(run.state_of("one")) == before, "the state folder was discarded"
    run.start(worker)
    run.over()
    run.go_on()
    await ready(worker)
    assert "throwing away" not in worker.log.read_text(errors="replace")


def _folders(state: Path) -> dict[str, int]:
    """The databases of a state folder, with their inodes: a database that was replaced has another inode."""
    return {path.name: path.stat().st_ino for path in sorted(state.glob("partition-*"))}
