"""A trainer in a process of its own, which kills itself at a named step."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch

import state.blobs
import state.version_writer
from stream.deltas.writer import DeltaWriter
from stream.errors import Fenced
from stream.registry.writer import RegistryWriter
from tests.faults.snapshots.trainer import Trainer
from tests.faults.snapshots.where import Where

__all__ = ["GOING_BACK", "SCRIPT", "STEPS", "Life", "begin", "step_names"]

SCRIPT = ("delta", "delta", "version", "delta", "version", "collect", "delta", "version", "collect", "delta")
"""What a trainer does in its life; it starts before that, and goes on from a version."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


class Step(NamedTuple):
    """Where a process dies: before or after a call of a method, or amid a transaction.

    owner   class or module
    method  its name
    when    `before`, `after`, or `amid`: half of the records are written
    """

    owner: Any
    method: str
    when: str


STEPS: dict[str, Step] = {
    "taking an epoch: before it": Step(RegistryWriter, "take_trainer_epoch", "before"),
    "taking an epoch: after it": Step(RegistryWriter, "take_trainer_epoch", "after"),
    "opening the log of deltas: before it": Step(DeltaWriter, "open", "before"),
    "opening the log of deltas: after it": Step(DeltaWriter, "open", "after"),
    "writing a delta: before its transaction": Step(DeltaWriter, "_commit", "before"),
    "writing a delta: amid its pieces": Step(DeltaWriter, "_commit", "amid"),
    "writing a delta: before its commit": Step(DeltaWriter, "_commit", "uncommitted"),
    "writing a delta: after its commit": Step(DeltaWriter, "_commit", "after"),
    "writing a version: before a file": Step(state.blobs.LocalBlobs, "create", "before"),
    "writing a version: amid a file": Step(state.blobs, "_write_all", "before"),
    "writing a version: a file is flushed and has no name": Step(os, "link", "before"),
    "writing a version: after a file": Step(state.blobs.LocalBlobs, "create", "after"),
    "writing a version: before the manifest": Step(state.version_writer._Writing, "finish", "before"),
    "writing a version: after the manifest": Step(state.version_writer._Writing, "finish", "after"),
    "announcing: before its transaction": Step(RegistryWriter, "_commit", "before"),
    "announcing: before its commit": Step(RegistryWriter, "_commit", "uncommitted"),
    "announcing: after its commit": Step(RegistryWriter, "_commit", "after"),
    "tagging: before it": Step(RegistryWriter, "tag_good", "before"),
    "deleting versions: before their records go": Step(RegistryWriter, "retire", "before"),
    "deleting versions: after their records are gone": Step(RegistryWriter, "retire", "after"),
    "deleting versions: before a file goes": Step(state.blobs.LocalBlobs, "delete", "before"),
    "deleting versions: after a file is gone": Step(state.blobs.LocalBlobs, "delete", "after"),
    "deleting versions: before a folder goes": Step(state.blobs.LocalBlobs, "delete_folder", "before"),
}


GOING_BACK: dict[str, Step] = {
    "before the new chain's first delta": Step(DeltaWriter, "_commit", "before"),
    "amid the new chain's first delta": Step(DeltaWriter, "_commit", "amid"),
    "before the commit of the new chain's first delta": Step(DeltaWriter, "_commit", "uncommitted"),
    "after the new chain's first delta": Step(DeltaWriter, "_commit", "after"),
    "before it says that it has gone back": Step(RegistryWriter, "rewound", "before"),
    "after it said that it has gone back": Step(RegistryWriter, "rewound", "after"),
    "before its first version after that is announced": Step(RegistryWriter, "announce", "before"),
    "after its first version after that is announced": Step(RegistryWriter, "announce", "after"),
}
"""Steps of a trainer that was sent back and goes."""


def step_names() -> list[str]:
    return list(STEPS)


class Life:
    """A process that runs a trainer."""

    def __init__(self, process: BaseProcess) -> None:
        self.process = process

    async def ended(self, within_s: float = 60.0) -> int:
        """Wait for its end. Returns its exit code; it is negative after a signal."""
        deadline = time.monotonic() + within_s
        while self.process.exitcode is None:
            if time.monotonic() > deadline:
                await self.stop()
                raise TimeoutError(f"a trainer's process: expected its end within {within_s:g} s")
            await asyncio.sleep(0.02)
        return int(self.process.exitcode)

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    async def stop(self) -> None:
        """Kill it, if it is alive."""
        if self.process.exitcode is None:
            self.process.kill()
        await asyncio.to_thread(self.process.join, 10)


def begin(where: Where, *, step: str = "", number: int = 1, script: Sequence[str] = SCRIPT, ahead_s: float = 0.0) -> Life:
    """Start a trainer that dies at the `number`-th time that it comes to a step.

    Args:
        ahead_s: of its clock.
    """
    process = _context.Process(target=_live, args=(where, step, number, tuple(script), ahead_s), daemon=True)
    process.start()
    return Life(process)


def _live(where: Where, step: str, number: int, script: Sequence[str], ahead_s: float) -> None:
    from tests.faults.snapshots.play import quick

    torch.set_num_threads(1)
    if ahead_s:
        set_clock(ahead_s)
    if step:
        _die_at((STEPS | GOING_BACK)[step], number)
    code = 0
    with quick():
        try:
            asyncio.run(_run(where, script))
        except Fenced:
            code = 3
    os._exit(code)


async def _run(where: Where, script: Sequence[str]) -> None:
    trainer = await Trainer(where, "child").start()
    if trainer.chain.begins_with_a_version:
        await trainer.version()
    for what in script:
        await getattr(trainer, what)()
        await asyncio.sleep(0.01)
    await trainer.stop()


def set_clock(ahead_s: float) -> None:
    """Set the wall clock of this process ahead of the real one. Monotonic clocks aren't affected."""
    real, real_ns = _REAL
    time.time = lambda: real() + ahead_s
    time.time_ns = lambda: real_ns() + int(ahead_s * 1e9)


_REAL = (time.time, time.time_ns)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(step: Step, number: int) -> None:
    """Replace a method by one that dies at its `number`-th call."""
    original: Callable[..., Any] = getattr(step.owner, step.method)
    calls = [0]

    def due() -> bool:
        calls[0] += 1
        return calls[0] == number

    if step.when in ("amid", "uncommitted"):

        async def amid(self: Any, records: Any, *more: Any) -> Any:
            if not due():
                return await original(self, records, *more)
            records = list(records)
            await self._producer.begin_transaction()
            for record in records if step.when == "uncommitted" else records[: max(1, len(records) // 2)]:
                await _send(self, record)
            _die()
            return None

        setattr(step.owner, step.method, amid)
    elif asyncio.iscoroutinefunction(original):

        async def around(*args: Any, **kwargs: Any) -> Any:
            dies = due()
            if dies and step.when == "before":
                _die()
            found = await original(*args, **kwargs)
            if dies:
                _die()
            return found

        setattr(step.owner, step.method, around)
    else:

        def plain(*args: Any, **kwargs: Any) -> Any:
            dies = due()
            if dies and step.when == "before":
                with contextlib.suppress(IndexError, TypeError, AttributeError):
                    if step.method == "_write_all":  # half of it is on the disk
                        original(args[0], memoryview(args[1])[: len(args[1]) // 2])
                _die()
            found = original(*args, **kwargs)
            if dies:
                _die()
            return found

        setattr(step.owner, step.method, plain)


async def _send(writer: Any, record: Any) -> None:
    from state.registry import encode_record

    if isinstance(writer, DeltaWriter):
        await writer._producer.send_and_wait(writer._topic, record, partition=0)
    else:
        key, value = record
        await writer._producer.send_and_wait(writer._topic, encode_record(value), key=key.encode(), partition=0)
