"""What the kinds are written with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from stream.topics.names import TopicNames
from tests.faults.admin import Admin
from tests.faults.fault_worker import FaultWorker
from tests.faults.play import Kind
from tests.faults.run import POLL_S, Run

__all__ = ["MAYBE", "ask", "group_of", "kinds", "names_of", "ready"]

# A worker ends when a transaction fails, and whether one is under way when its broker goes is up to chance; one that starts
# while too few brokers answer ends, too, and is started again.
MAYBE = (0, 12)

Play = Callable[[Run], Awaitable[None]]
T = TypeVar("T")


def kinds(into: list[Kind]) -> Callable[..., Callable[[Play], Play]]:
    """A decorator that adds what it decorates to a list, with `Kind`'s arguments."""

    def kind(name: str, **options: object) -> Callable[[Play], Play]:
        def add(play: Play) -> Play:
            into.append(Kind(name, play, **options))  # type: ignore[arg-type]
            return play

        return add

    return kind


async def ready(worker: FaultWorker) -> None:
    while not await asyncio.to_thread(worker.is_ready):
        await asyncio.sleep(POLL_S)


def names_of(run: Run) -> TopicNames:
    return TopicNames.of(run.settings.topics)


def group_of(run: Run) -> str:
    return f"{run.settings.topics.prefix}{run.settings.join.group}"


async def ask(run: Run, what: Callable[[Admin], T]) -> T:
    """Ask the brokers, in another thread."""

    def asking() -> T:
        with Admin.of(run.settings) as admin:
            return what(admin)

    return await asyncio.to_thread(asking)
