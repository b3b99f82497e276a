"""Plays one run of a kind of fault: makes cluster and stream, lets the fault happen, and reports what the ledger found."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from deploy.local_kafka.cluster import LocalKafka
from stream.topics.admin import create_topics
from tests.faults.clusters import Clusters, Skipped
from tests.faults.ledger import Ledger
from tests.faults.run import Run
from tests.faults.stream import WINDOW_MS, Stream, ordinary

__all__ = ["Kind", "Result", "play", "variant"]

Maker = Callable[[int, int, int], Stream]


class Result(msgspec.Struct):
    """The result of one run: a line of the results file."""

    kind: str
    seed: int
    lost: int
    doubled: int
    wrong: int
    recovery_s: float | None
    """From the end of the fault until every partition of `examples` has a new transaction; None where one had no more."""
    restarts: int
    """Of workers that ended without being asked to."""
    events: int
    seconds: float
    problems: list[str]
    hold_ms: int = 0
    negative_rate: float = 1.0
    skipped: str = ""
    """Why the fault can't be made on this machine; such a run counts for nothing."""
    code: str = ""
    """The code that the result is of; see `tests.faults.code`."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Args:
        play: makes the fault happen while the stream goes in; sends the stream itself where `sends` is false.
        cluster: `shared`, `alone`, `three` or `clock`.
        static: whether workers have an instance id; None draws.
        stream: makes the stream from a seed, the hold and the skew.
        sends: whether the run sends the stream while the fault plays.
        settles: whether every label must be there in the end. Otherwise the join stops for good, and nothing may be wrong.
        killed: how often a worker kills itself, exactly.
        crashes: how often workers may exit with 1, least and most: for faults that a worker must not survive.
    """

    name: str
    play: Callable[[Run], Awaitable[None]]
    cluster: str = "shared"
    static: bool | None = None
    stream: Maker = ordinary
    sends: bool = True
    settles: bool = True
    join: tuple[tuple[str, object], ...] = ()
    killed: int = 0
    crashes: tuple[int, int] = (0, 0)

    def unexpected(self, ended: list[int]) -> list[str]:
        """Problems with the exit codes of workers that were not asked to end."""
        killed, crashed = ended.count(-signal.SIGKILL), ended.count(1)
        least, most = self.crashes
        if killed == self.killed and least <= crashed <= most and killed + crashed == len(ended):
            return []
        return [f"expected {self.killed} kills and {least} to {most} ends with 1, found workers that ended with {ended}"]


def variant(name: str, seed: int) -> dict[str, Any]:
    """The hold, the rate and the skew of a run, drawn from its kind and seed."""
    draw = random.Random(f"variant of {name} {seed}")
    return {
        "hold_ms": draw.choice([0, 300, 3_000, WINDOW_MS]),
        "negative_rate": draw.choice([1.0, 1.0, 0.5, 0.1]),
        "negative_skew_ms": draw.choice([0, 0, 300]),
    }


@contextlib.contextmanager
def _ended(run: Run) -> Iterator[None]:
    """End every worker of the run at last, whatever happened."""
    try:
        yield
    finally:
        for worker in run.everyone:
            if worker.returncode is None:
                os.kill(worker.pid, signal.SIGCONT)
                worker.kill()
            worker.wait_stopped()


async def _play(kind: Kind, run: Run) -> Ledger:
    background: list[asyncio.Future[Any]] = [asyncio.ensure_future(run.supervise()), asyncio.ensure_future(run.watch())]

    async def act() -> Ledger:
        if kind.sends:
            sending = asyncio.ensure_future(run.send())
            background.append(sending)
        await kind.play(run)
        if not kind.settles:
            ledger = await run.ledger()
            ledger.lost, ledger.problems = 0, [problem for problem in ledger.problems if not problem.startswith("lost")]
            return ledger
        if kind.sends:
            await sending
        return await run.settle()

    acting = asyncio.ensure_future(act())
    try:
        await asyncio.wait([acting, *background], return_when=asyncio.FIRST_COMPLETED)
        for task in background[:2]:  # they end only by an error
            if task.done():
                task.result()
        return await acting
    finally:
        everything = [acting, *background]
        for task in everything:
            task.cancel()
        await asyncio.gather(*everything, return_exceptions=True)


def play(kind: Kind, seed: int, clusters: Clusters, folder: Path, *, code: str = "") -> Result:
    """One run of a kind; blocks. A run whose fault could not be made is an error, never a success."""
    chosen = {**variant(kind.name, seed), **dict(kind.join)}
    result = Result(
        kind=kind.name,
        seed=seed,
        lost=0,
        doubled=0,
        wrong=0,
        recovery_s=None,
        restarts=0,
        events=0,
        seconds=0.0,
        problems=[],
        hold_ms=chosen["hold_ms"],
        negative_rate=chosen["negative_rate"],
        code=code,
    )
    try:
        with clusters.use(kind.cluster) as kafka:
            _play_on(kafka, kind, seed, clusters, folder, chosen, result)
    except Skipped as reason:
        result.skipped = str(reason)
    except Exception as error:
        traceback.print_exc()
        result.problems.append(f"the run failed: {error!r}")
    return result


def _play_on(
    kafka: LocalKafka, kind: Kind, seed: int, clusters: Clusters, folder: Path, chosen: dict[str, Any], result: Result
) -> None:
    draw = random.Random(f"{kind.name} {seed}")
    slug = "".join(letter if letter.isalnum() else "-" for letter in kind.name)[:60]
    work = folder / f"{slug}-{seed}-{draw.randrange(1 << 24):06x}"
    work.mkdir(parents=True)
    static = draw.random() < 0.5 if kind.static is None else kind.static
    stream = kind.stream(seed, min(chosen["hold_ms"], chosen.get("window_ms", WINDOW_MS)), chosen["negative_skew_ms"])
    run = Run(seed, kafka, work, static=static, stream=stream, clusters=clusters, **chosen)
    create_topics(run.settings.kafka, run.settings.topics)
    began = time.monotonic()
    with _ended(run), run.logs:
        try:
            ledger = asyncio.run(_play(kind, run))
            result.lost, result.doubled, result.wrong = ledger.lost, ledger.doubled, ledger.wrong
            result.problems = ledger.problems[:20]
        except Skipped:
            raise
        except Exception as error:
            traceback.print_exc()
            result.problems = [f"the run failed: {error!r}; see {work}"]
    ended = [end for worker in run.everyone for end in worker.ended]
    result.problems += kind.unexpected(ended)
    result.recovery_s, result.restarts = run.recovery_s(), len(ended)
    result.events, result.seconds = len(stream.rows), round(time.monotonic() - began, 1)
    if not result.problems:
        shutil.rmtree(work)
