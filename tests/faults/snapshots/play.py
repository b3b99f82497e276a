"""Plays one run of a kind of fault."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import msgspec
import torch

import state.pieces
from stream.deltas import reader
from stream.kafka.clients import admin_client
from stream.scorer import chain_follower, swap
from stream.topics.contract import topic_contracts
from stream.trainer import snapshots
from tests.faults.clusters import Skipped
from tests.faults.snapshots.run import TOPICS, Run
from tests.faults.snapshots.where import Where

__all__ = ["Kind", "Result", "create_topics", "play", "quick", "where_of"]

LIMIT_S = 150.0
# Waits of the product that only spread load, and the size of a version's files, so that a small version has several.
QUICK = (
    (chain_follower, "LOOK_S", 0.02),
    (chain_follower, "OVERDUE_S", 1.0),
    (chain_follower, "REREAD_S", 0.01),
    (chain_follower, "RETRY_S", 0.05),
    (chain_follower, "MAX_RETRY_S", 0.3),
    (swap, "RETRY_S", 0.05),
    (swap, "MAX_RETRY_S", 0.3),
    (swap, "PRELOAD_JITTER_S", 0.05),
    (reader, "UNFINISHED_S", 0.4),
    (reader, "RECONNECT_S", 0.1),
    (snapshots, "SEND_AGAIN_S", 0.1),
    (state.pieces, "PIECE_BYTES", 4_000),
)


class Result(msgspec.Struct):
    """The result of one run: a line of the results file."""

    kind: str
    seed: int
    problems: list[str]
    happened: list[str]
    heal_s: float | None
    """From the end of the fault until every scorer answers with what the trainer published after it."""
    points: int
    """Points that the replay computed."""
    answers: int
    """Answers that were computed again."""
    seconds: float
    skipped: str = ""
    code: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Args:
        play: makes a run's fault happen. Then the run settles, unless `settles` is false, and is checked.
    """

    name: str
    play: Callable[[Run], Awaitable[None]]
    settles: bool = True


def play(kind: Kind, where: Where, *, code: str = "") -> Result:
    """Play one run, whatever happens in it."""
    began, run, skipped = time.monotonic(), Run(where), ""
    where.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    try:
        with quick():
            asyncio.run(_play(kind, run))
    except Skipped as why:
        skipped = str(why)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        run.problems.append("".join(traceback.format_exception_only(error)).strip())
        (where.folder / "problem").write_text("".join(traceback.format_exception(error)))
    if not run.problems:
        shutil.rmtree(where.folder, ignore_errors=True)
    return Result(
        kind=kind.name,
        seed=where.seed,
        problems=[] if skipped else run.problems,
        happened=run.happened,
        heal_s=run.heal_s,
        points=run.checked.points,
        answers=run.checked.answers,
        seconds=time.monotonic() - began,
        skipped=skipped,
        code=code,
    )


async def _play(kind: Kind, run: Run) -> None:
    await create_topics(run.where)
    try:
        async with asyncio.timeout(LIMIT_S):
            await kind.play(run)
            if kind.settles:
                await run.settle()
            await run.check()
            if not run.happened:
                run.problems.append("nothing shows that the fault happened")
    finally:
        await run.close()


async def create_topics(where: Where, *only: str) -> None:
    """Create the topics of a run, by their contract."""
    from aiokafka.admin import NewTopic

    wanted = {where.prefix + name for name in only or TOPICS}
    contracts = [each for each in topic_contracts(where.topics) if each.name in wanted]
    async with admin_client(where.kafka) as admin:
        await admin.create_topics([NewTopic(each.name, 1, 1, topic_configs=each.configs) for each in contracts])
        while not wanted <= set(await admin.list_topics()):
            await asyncio.sleep(0.02)


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Shorten the product's waits."""
    with contextlib.ExitStack() as stack:
        for module, name, value in QUICK:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def where_of(servers: str, broker: Path, seed: int, folder: Path) -> Where:
    """A place for a run, with topics of its own."""
    prefix = f"f{seed}-{os.getpid()}-{time.time_ns() % 1_000_000_000}-"
    return Where(servers, broker, prefix, folder / prefix.strip("-"), seed)
