"""Sees which part of a worker has work and makes no progress, says so on `/readyz`, and ends the process when that lasts.

Faust's rebalances can stall for ever (faust-streaming #175, #523), and a client library can lose a wake-up. A process that is
started again goes on from the log, so ending is the cure.

A part is what can stall by itself: a partition of a source, a partition that is being taken over, the way into the group. Its
progress is what counts for others: positions that are committed, offsets that a rebuild has read. That a loop goes round isn't.
"""

from __future__ import annotations

import asyncio
import faulthandler
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

__all__ = ["Part", "Watchdog"]

# Without progress for so long, a part is named on /readyz: more than a step, a commit and a batch take on a slow day.
TOLD_S = 30.0
# And the process ends: more than any deadline of a single wait (stream/kafka/clients.py), so that these speak first.
PATIENCE_S = 120.0
LOOK_EVERY_S = 1.0
# Counted at most between two looks: a process that was stopped (SIGSTOP, a suspended machine) has not been stalled meanwhile.
MAX_LOOK_S = 5.0


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a worker's work, now.

    waiting  what waits to be done, for people; None when nothing does
    outside  why it can't be done, when the reason lies outside of this process (Kafka is away): it is told, and never ends it
    """

    name: str
    progress: Any
    waiting: str | None
    outside: str | None = None


class Watchdog:
    """Looks every second.

    Args:
        parts: the parts as they are now; called on the event loop.
        end: ends the process.
    """

    def __init__(self, parts: Callable[[], Iterable[Part]], end: Callable[[str, BaseException], NoReturn]) -> None:
        self._parts, self._end = parts, end
        self._still: dict[str, tuple[Any, float]] = {}  # name → progress, and seconds without any
        self._looked_at: float | None = None
        self.stalled: str | None = None
        """Which parts have stalled, for /readyz; None when none has. Read by any thread."""

    async def run(self) -> None:
        """Look until cancelled. Where the event loop itself stands still for PATIENCE_S, every thread's stack is printed and
        the process ends with code 1."""
        try:
            while True:
                faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
                self.look(time.monotonic())
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def look(self, now_s: float) -> None:
        """Look once, at a moment of the monotonic clock."""
        elapsed_s = 0.0 if self._looked_at is None else min(now_s - self._looked_at, MAX_LOOK_S)
        self._looked_at = now_s
        before, self._still = self._still, {}
        told: list[str] = []
        for part in self._parts():
            if part.waiting is None:
                continue
            progress, still_s = before.get(part.name, (part.progress, -elapsed_s))
            still_s = still_s + elapsed_s if progress == part.progress else 0.0
            self._still[part.name] = (part.progress, still_s)
            if still_s < TOLD_S:
                continue
            what = f"{part.name}: no progress for {still_s:.0f} s with {part.waiting}"
            if part.outside is not None:
                told.append(f"{what} ({part.outside})")
            elif still_s < PATIENCE_S:
                told.append(what)
            else:
                self._end("watchdog", TimeoutError(what))
        self.stalled = "; ".join(told) or None
