"""Work that gives way to the other threads of its process."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["in_background"]

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


def _lower_priority() -> None:
    """Lower the priority of the calling thread, where the system allows it. Elsewhere nothing changes."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except (AttributeError, OSError) as error:
        log.debug("the thread keeps its priority: %s", error)
