"""Files of versions that are damaged, missing or exchanged, and a store that fails."""

from __future__ import annotations

import asyncio
import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import state.blobs
from state.manifest import MANIFEST_FILE
from tests.faults.snapshots.kinds.base import flipped, kinds
from tests.faults.snapshots.kinds.deltas import HEAD, at
from tests.faults.snapshots.play import Kind
from tests.faults.snapshots.run import Run

__all__ = ["KINDS"]

KINDS: list[Kind] = []
kind = kinds(KINDS)


def folder(run: Run, version: int) -> Path:
    return run.where.store / f"v{version:010d}"


def some(run: Run, version: int, pattern: str) -> Path:
    """A file of a version, by a pattern of its name."""
    return run.drawn.choice(sorted(folder(run, version).glob(pattern)))


def flip(run: Run, version: int, pattern: str) -> None:
    path = some(run, version, pattern)
    data = path.read_bytes()
    path.write_bytes(flipped(data, run.drawn.randrange(8 * len(data))))


def cut(run: Run, version: int, pattern: str) -> None:
    path = some(run, version, pattern)
    data = path.read_bytes()
    path.write_bytes(data[: run.drawn.randrange(len(data))])


def remove(run: Run, version: int, pattern: str) -> None:
    some(run, version, pattern).unlink()


def exchange(run: Run, version: int, pattern: str) -> None:
    """Two pieces of a version change places."""
    first, second = run.drawn.sample(sorted(folder(run, version).glob(pattern)), 2)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def of_another(run: Run, version: int, pattern: str) -> None:
    """A file of the version before takes the place of this version's."""
    before = {path.name for path in folder(run, version - 1).glob(pattern)}
    path = run.drawn.choice([path for path in sorted(folder(run, version).glob(pattern)) if path.name in before])
    shutil.copy(folder(run, version - 1) / path.name, path)


def zero(run: Run, version: int, pattern: str) -> None:
    """A block that was never written, as after a power cut."""
    path = some(run, version, pattern)
    data = bytearray(path.read_bytes())
    start = run.drawn.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(bytes(data))


DAMAGES: dict[str, tuple[Callable[[Run, int, str], None], str]] = {
    "a bit flips in a piece": (flip, "serving-*"),
    "a bit flips in the dense weights": (flip, "dense*"),
    "a bit flips in the manifest": (flip, MANIFEST_FILE),
    "a bit flips in the trainer's state": (flip, "trainer*"),
    "a piece is cut short": (cut, "serving-*"),
    "a piece of the trainer's state is cut short": (cut, "trainer-*"),
    "the manifest is cut short": (cut, MANIFEST_FILE),
    "a piece is missing": (remove, "serving-*"),
    "the dense weights are missing": (remove, "dense*"),
    "the manifest is missing": (remove, MANIFEST_FILE),
    "two pieces are exchanged": (exchange, "serving-*"),
    "a piece of the version before": (of_another, "serving-*"),
    "the manifest of the version before": (of_another, MANIFEST_FILE),
    "a block of zeros in a piece": (zero, "serving-*"),
}


def damages(name: str, damage: Callable[[Run, int, str], None], pattern: str) -> None:
    @kind(f"{name} of the newest version; scorers and trainer restart")
    async def starts(run: Run) -> None:
        await run.begin(versions=2, scorers=1)
        damage(run, await run.newest(), pattern)
        run.happened.append("damaged")
        await run.start_scorer()
        await run.trainer.stop()
        await run.start_trainer()
        await run.trainer.delta(2)

    @kind(f"{name} of the version that would heal")
    async def heals(run: Run) -> None:
        await run.begin(versions=2)
        run.trainer.writer.mangle = lambda pieces: at(pieces, 0, flipped(pieces[0], run.drawn.randrange(8 * HEAD)))
        await run.trainer.delta(2)
        await run.refused()
        for scorer in run.scorers:
            scorer.hooks.load = slow(0.4)  # the damage comes before anybody has read it
        damage(run, await run.version(), pattern)
        await run.trainer.delta(2)
        await asyncio.sleep(0.6)
        for scorer in run.scorers:
            scorer.hooks.load = lambda version: None
        run.happened.append("damaged")


def slow(seconds: float) -> Callable[[int], None]:
    return lambda version: time.sleep(seconds)


for name, (damage, pattern) in DAMAGES.items():
    damages(name, damage, pattern)


@kind("all versions are damaged while scorers answer")
async def _all(run: Run) -> None:
    await run.begin(versions=2)
    for version in (1, 2):
        flip(run, version, "serving-*")
    run.happened.append("damaged")
    run.trainer.writer.mangle = lambda pieces: at(pieces, 0, flipped(pieces[0], run.drawn.randrange(8 * HEAD)))
    await run.trainer.delta(3)
    await run.refused()


@kind("the store is away while a version is written")
async def _away(run: Run) -> None:
    await run.begin()
    hidden = run.where.store.with_name("hidden")
    run.where.store.rename(hidden)
    run.where.store.write_text("no folder")
    announced = await run.trainer.version()
    run.expect(announced is None, "expected that no version is announced while the store is away")
    await run.trainer.delta(2)
    await run.caught_up()
    run.where.store.unlink()
    hidden.rename(run.where.store)
    run.happened.append("away")


@kind("the store is away while a scorer starts")
async def _away_at_start(run: Run) -> None:
    await run.begin(scorers=1)
    hidden = run.where.store.with_name("hidden")
    run.where.store.rename(hidden)
    scorer = await run.start_scorer()
    await run.trainer.delta(2)
    await asyncio.sleep(0.5)
    run.expect(scorer.served is None, "expected no weights without a store")
    hidden.rename(run.where.store)
    run.happened.append("away")


@kind("the store is away while scorers heal")
async def _away_at_healing(run: Run) -> None:
    await run.begin()
    run.trainer.writer.mangle = lambda pieces: []
    await run.trainer.delta(2)
    await run.refused("gap")
    hidden = run.where.store.with_name("hidden")
    for scorer in run.scorers:
        scorer.hooks.load = slow(0.3)
    await run.version()
    run.where.store.rename(hidden)
    await asyncio.sleep(0.8)
    hidden.rename(run.where.store)
    for scorer in run.scorers:
        scorer.hooks.load = lambda version: None
    run.happened.append("away")


@kind("the store is slow for scorers")
async def _slow(run: Run) -> None:
    await run.begin()
    read = state.blobs.LocalBlobs.read

    def slowly(self: Any, within: str, name: str) -> bytearray:
        time.sleep(0.15)
        return read(self, within, name)

    with mock.patch.object(state.blobs.LocalBlobs, "read", slowly):
        await run.start_scorer()
        for _ in range(5):
            await run.trainer.delta()
            await asyncio.sleep(0.05)
        await run.version()
        await run.trainer.delta(2)
        await run.caught_up()
    run.happened.append("slow")


def failing(name: str, number: int, after: int) -> None:
    """Writes fail with an error of the system, after some bytes of a version."""

    @kind(f"{name} after {after} files of a version")
    async def play(run: Run) -> None:
        await run.begin()
        write, seen = state.blobs._write_all, [0]

        def fail(file: Any, part: Any) -> None:
            seen[0] += 1
            if seen[0] > 2 * after:
                write(file, memoryview(part)[: len(part) // 2])
                run.happened.append(name)
                raise OSError(number, name)
            write(file, part)

        with mock.patch.object(state.blobs, "_write_all", fail):
            announced = await run.trainer.version()
            run.expect(announced is None, "expected that no version is announced")
            await run.trainer.delta(2)
            await run.caught_up()


for files in (0, 1, 4):
    failing("the disk is full", errno.ENOSPC, files)
failing("the disk fails", errno.EIO, 2)


@kind("a version's folder is there already")
async def _taken(run: Run) -> None:
    await run.begin()
    taken = folder(run, await run.newest() + 1)
    taken.mkdir()
    (taken / "dense.safetensors").write_bytes(b"another writer's")
    run.happened.append("taken")
    await run.version()


@kind("files of two versions have changed places")
async def _folders(run: Run) -> None:
    await run.begin(versions=3, scorers=1)
    first, second = folder(run, 2), folder(run, 3)
    hidden = run.where.store / "hidden"
    first.rename(hidden)
    second.rename(first)
    hidden.rename(second)
    run.happened.append("exchanged")
    await run.start_scorer()
    await run.trainer.stop()
    await run.start_trainer()
    await run.trainer.delta()
