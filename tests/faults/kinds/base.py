"""Helpers for writing kinds of faults."""

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

# How often workers may end with 1 during a fault of brokers. A worker ends if a transaction fails, and whether one is open when
# its broker fails is up to chance. A worker that starts while too few brokers answer ends, too, and is started again.
MAYBE = (0, 12)

Play = Callable[[Run], Awaitable[None]]
T = TypeVar("T")


def kinds(into: list[Kind]) -> Callable[..., Callable[[Play], Play]]:
    """A decorator that adds a function as a `Kind` to a list; its arguments are those of `Kind`."""

    def kind(name: str, **options: object) -> Callable[[Play], Play]:
        def add(play: Play) -> Play:
            into.append(Kind(name, play, **options))  # type: ignore[arg-type]
            return play

        return add

    return kind


async def ready(worker: FaultWorker) -> None:
    """Wait until the worker is ready."""
    while not await asyncio.to_thread(worker.is_ready):
        await asyncio.sleep(POLL_S)


def names_of(run: Run) -> TopicNames:
    return TopicNames.of(run.settings.topics)


def group_of(run: Run) -> str:
    return f"{run.settings.topics.prefix}{run.settings.join.group}"


async def ask(run: Run, what: Callable[[Admin], T]) -> T:
    """Send a request to the brokers, in another thread."""

    def asking() -> T:
        with Admin.of(run.settings) as admin:
            return what(admin)

    return await asyncio.to_thread(asking)
