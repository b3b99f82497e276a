"""Work in threads of its own: one that gives way to the other threads of its process, one that isn't waited for too long."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["in_background", "within"]

log = logging.getLogger(__name__)

T = TypeVar("T")

# Niceness of the thread, of at most 19. Writing a version copies, hashes and writes gigabytes. A thread of niceness 10 that
# shares a core with a training thread gets a tenth of it: a version takes longer then, and training hardly notices.
NICENESS = 10


class _Work(Generic[T]):
    """One call in a thread of its own: what it returned or raised."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self.result: T
        self.error: BaseException | None = None

    def run(self) -> None:
        _lower_priority()
        try:
            self.result = self._call()
        except BaseException as error:  # it is raised again by `in_background`
            self.error = error


def in_background(call: Callable[[], T]) -> T:
    """Run `call` in a thread of low priority, and wait for it. Returns what it returns and raises what it raises.

    Linux keeps a priority for each thread, and a process without privileges can't raise one again: so the thread is made for
    this call. Threads that it starts, such as torch's, get its priority.
    """
    work = _Work(call)
    thread = threading.Thread(target=work.run, name="background", daemon=True)
    thread.start()
    thread.join()
    if work.error is not None:
        raise work.error
    return work.result


async def within(seconds: float | None, call: Callable[[], T]) -> T:
    """Run `call` in a thread, and wait for it at most so long; None: as long as it takes.

    A thread that takes longer goes on, and doesn't keep the process from ending.

    Raises:
        TimeoutError: it takes longer.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(done: Callable[[], None]) -> None:
        if not result.done():
            done()

    def run() -> None:
        try:
            value = call()
        except BaseException as error:
            failure = error
            done: Callable[[], None] = lambda: result.set_exception(failure)  # noqa: E731
        else:
            done = lambda: result.set_result(value)  # noqa: E731
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, done)

    threading.Thread(target=run, name="within", daemon=True).start()
    return await asyncio.wait_for(result, seconds)


def _lower_priority() -> None:
    """Lower the priority of the calling thread, where the system allows it. Elsewhere nothing changes."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except (AttributeError, OSError) as error:
        log.debug("the thread keeps its priority: %s", error)
