"""Trainers that are killed, stand still, or compete; clocks that jump; versions that are deleted while they are read."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from unittest import mock

import state.blobs
from stream.deltas.writer import Sent
from stream.errors import Fenced
from stream.registry.writer import RegistryWriter
from tests.faults.snapshots import child
from tests.faults.snapshots.child import STEPS, Life
from tests.faults.snapshots.kinds.base import kinds
from tests.faults.snapshots.kinds.deltas import write
from tests.faults.snapshots.play import Kind
from tests.faults.snapshots.run import Run

__all__ = ["KINDS"]

KINDS: list[Kind] = []
kind = kinds(KINDS)

FENCED = 3  # exit code of a child that was replaced
# Steps that come so often in a life that dying at the first one would always be at the start.
OFTEN = (
    "writing a delta",
    "writing a version",
    "announcing",
    "deleting versions: before a file",
    "deleting versions: after a file",
)


def spawn(run: Run, **options: Any) -> Life:
    life = child.begin(run.where, **options)
    run._opened.append(life)
    return life


def killed(step: str) -> None:
    @kind(f"kill -9: {step}")
    async def play(run: Run) -> None:
        await run.begin()
        await run.trainer.stop()
        most = 3 if step.startswith(OFTEN) else 1
        code = await spawn(run, step=step, number=run.drawn.randint(1, most)).ended()
        run.expect(code == -signal.SIGKILL, f"expected the trainer to be killed, found exit code {code}")
        run.happened.append("killed")
        if run.drawn.random() < 0.4:  # and once more, at another moment
            again = run.drawn.choice(list(STEPS))
            run.happened.append(f"then {again}: {await spawn(run, step=again).ended()}")
        await run.start_trainer()
        await run.trainer.collect()


for step in STEPS:
    killed(step)


@kind("kill -9 of a trainer at a random moment")
async def _random(run: Run) -> None:
    await run.begin()
    await run.trainer.stop()
    for _ in range(2):
        life = spawn(run)
        await asyncio.sleep(0.1 + run.drawn.random())
        await life.stop()
    run.happened.append("killed")
    await run.start_trainer()


@kind("a new model's trainer is killed before its first version is announced")
async def _first(run: Run) -> None:
    code = await spawn(run, step="announcing: before its commit", number=2).ended()
    run.expect(code == -signal.SIGKILL, f"expected the trainer to be killed, found exit code {code}")
    for _ in range(2):
        await run.start_scorer()
    await run.start_trainer()
    await run.version()
    run.happened.append("killed")


# Of two trainers


@kind("a second trainer takes over, and the first goes on")
async def _second(run: Run) -> None:
    await run.begin()
    first = run.trainer
    await run.start_trainer("second")
    await run.trainer.delta(2)
    for what in run.drawn.sample([first.delta, first.version], 2):
        try:
            await what()
            run.problems.append(f"expected the first trainer to be fenced, found that {what.__name__} succeeded")
        except Fenced:
            run.happened.append("fenced")
    await run.trainer.delta()
    await run.caught_up()


@kind("a trainer stands still in a transaction while another takes over")
async def _stands_still(run: Run) -> None:
    await run.begin()
    first, go = run.trainer, asyncio.Event()

    async def wait(pieces: list[bytes], commit: Callable[[Sequence[bytes]], Awaitable[Sent]]) -> Sent:
        producer: Any = first.writer._producer
        await producer.begin_transaction()
        await producer.send_and_wait(run.where.names.deltas, pieces[0], partition=0)
        await go.wait()
        for piece in pieces[1:]:
            await producer.send_and_wait(run.where.names.deltas, piece, partition=0)
        await producer.commit_transaction()
        run.problems.append("expected that the old trainer can't commit, found that it has")
        return await commit(pieces)

    first.writer.around = wait
    task = asyncio.ensure_future(_with_failures(first))
    await asyncio.sleep(0.2)
    await run.start_trainer("second")
    await run.trainer.delta(2)
    go.set()
    run.happened.append(await task)
    await run.trainer.delta()
    await run.caught_up()


async def _with_failures(first: Any) -> str:
    from stream.deltas import writer

    # The hurt commit fails as aiokafka's would, so the writer starts over, and learns that it was replaced.
    commit = first.writer._commit

    async def failing(pieces: Sequence[bytes]) -> Sent:
        try:
            return await commit(pieces)  # type: ignore[no-any-return]
        except Exception as error:
            raise writer._CommitFailed from error

    first.writer._commit = failing
    try:
        await first.delta()
    except Fenced:
        return "fenced"
    return "not fenced"


@kind("a version is still being written when another trainer takes over")
async def _late_version(run: Run) -> None:
    await run.begin()
    first, blocked, go = run.trainer, threading.Event(), threading.Event()
    create = state.blobs.LocalBlobs.create

    def wait(self: Any, folder: str, name: str, parts: Any) -> None:
        if not go.is_set() and name.startswith("serving-00001"):
            blocked.set()
            go.wait(20)
        return create(self, folder, name, parts)

    with mock.patch.object(state.blobs.LocalBlobs, "create", wait):
        task = asyncio.ensure_future(first.version())
        await run.until(blocked.is_set, "the version is being written")
        await run.start_trainer("second")
        await run.trainer.delta(2)
        go.set()
        with contextlib.suppress(Fenced):
            announced = await task
            run.problems.append(f"expected that the old trainer can't announce, found {announced}")
    run.happened.append("late")


@kind("two trainers under supervisors that restart both")
async def _supervisors(run: Run) -> None:
    await run.begin()
    await run.trainer.stop()
    for _ in range(2):
        lives = [spawn(run) for _ in range(2)]
        codes = [await life.ended() for life in lives]
        run.expect(set(codes) <= {0, FENCED}, f"expected each to end or to be fenced, found exit codes {codes}")
        run.happened.append(f"exit codes {codes}")
    await run.start_trainer()


@kind("a trainer is stopped until another has taken over, and goes on")
async def _stopped(run: Run) -> None:
    await run.begin()
    await run.trainer.stop()
    before = run.trainer.chain.name
    life = spawn(run, script=("delta",) * 300)
    await run.until(lambda: all(each.point and each.point.chain != before for each in run.scorers), "it publishes")
    await asyncio.sleep(0.1 * run.drawn.random())
    life.signal(signal.SIGSTOP)
    await run.start_trainer()
    await run.trainer.delta(2)
    life.signal(signal.SIGCONT)
    code = await life.ended()
    run.expect(code == FENCED, f"expected the old trainer to be fenced, found exit code {code}")
    run.happened.append("fenced")
    await run.trainer.delta()
    await run.caught_up()


@kind("a delta of a replaced trainer comes after the fork")
async def _after_fork(run: Run) -> None:
    await run.begin()
    first, kept = run.trainer, list[bytes]()

    def keep(pieces: list[bytes]) -> list[bytes]:
        kept[:] = pieces
        return []

    first.writer.mangle = keep
    await first.delta()
    await run.start_trainer("second")
    await run.trainer.delta()
    await write(run, kept)
    await run.trainer.delta()
    await run.caught_up()
    run.expect(all("old_chain" in each.outcomes() for each in run.scorers), "expected the old chain's delta to be noticed")
    run.happened.append("passed over")


# Of clocks


def clock(name: str, ahead_s: float) -> None:
    @kind(f"all clocks jump {name}")
    async def everybody(run: Run) -> None:
        await run.begin()
        try:
            child.set_clock(ahead_s)
            await run.trainer.delta(2)
            await run.version()
            await run.start_scorer()
            await run.trainer.delta(2)
            await run.trainer.collect()
            await run.caught_up()
        finally:
            child.set_clock(0)
        run.happened.append("jumped")

    @kind(f"the trainer's clock is {name}")
    async def of_the_trainer(run: Run) -> None:
        await run.begin()
        await run.trainer.stop()
        code = await spawn(run, ahead_s=ahead_s).ended()
        run.expect(code == 0, f"expected the trainer to end, found exit code {code}")
        await run.start_scorer()
        await run.start_trainer()
        run.happened.append("jumped")


clock("an hour ahead", 3_600)
clock("an hour back", -3_600)


# Of deletion


@kind("versions are deleted while a scorer reads one")
async def _gc_during_load(run: Run) -> None:
    await run.begin(versions=2, scorers=1)
    blocked, go = threading.Event(), threading.Event()
    read = state.blobs.LocalBlobs.read

    def wait(self: Any, folder: str, name: str) -> bytearray:
        if not go.is_set() and name.startswith("serving-00001"):
            blocked.set()
            go.wait(20)
        return read(self, folder, name)

    with mock.patch.object(state.blobs.LocalBlobs, "read", wait):
        await run.start_scorer()
        await run.until(blocked.is_set, "a version is being read")
        for _ in range(4):
            await run.version()
        await run.trainer.collect()
        gone = not (run.where.store / "v0000000002").exists()
        run.expect(gone, "expected version 2 to be deleted")
        go.set()
        await run.trainer.delta()
        await run.caught_up()
    run.happened.append("deleted")


@kind("versions come and go, with rollbacks in between")
async def _come_and_go(run: Run) -> None:
    await run.begin(versions=2)
    writer = RegistryWriter(run.where.kafka, run.where.names, who="operator")
    try:
        for _ in range(3):
            newest = await run.version()
            await run.trainer.collect()
            await run.trainer.delta()
            await run.caught_up()
            await writer.rollback(newest - 1, "test")
            await run.trainer.delta(2)
            await run.trainer.collect()
            await run.until(
                lambda: all(each.served is not None and each.served.version == newest - 1 for each in run.scorers),  # noqa: B023
                "the rollback takes effect",
            )
            await asyncio.sleep(0.1)
            await writer.promote(newest, "test", hold=False)
            await run.caught_up()
    finally:
        await writer.close()
    run.happened.append("rolled back")


@kind("two processes delete versions at once")
async def _two_collect(run: Run) -> None:
    await run.begin(versions=5, scorers=1)
    other = RegistryWriter(run.where.kafka, run.where.names, who="operator")
    try:
        from stream.registry.collect import collect_by_itself

        args = (run.where.kafka, run.where.names, other, run.trainer.store, run.where.snapshots)
        await asyncio.gather(run.trainer.collect(), collect_by_itself(*args))
    finally:
        await other.close()
    run.happened.append("deleted")


@kind("somebody deletes versions from the store by hand")
async def _by_hand(run: Run) -> None:
    await run.begin(versions=3, scorers=1)
    for version in run.drawn.sample([1, 2, 3], 2):
        shutil.rmtree(run.where.store / f"v{version:010d}")
    run.happened.append("deleted")
    await run.start_scorer()
    await run.trainer.stop()
    await run.start_trainer()
