"""Ends a process that has work and makes no progress. Before that, `/readyz` says which part of the work has stalled.

Faust's rebalances can stall for ever (faust-streaming #175, #523), and a client library can miss a wake-up. A process that is
started again goes on from the log, so ending the process is the cure.

A part is what can stall by itself: a partition of a source, a partition that is being taken over, the way into the group. Its
progress is what counts for others: positions that are committed, offsets that a rebuild has read. A loop that merely goes round
makes no progress.
"""

from __future__ import annotations

import asyncio
import faulthandler
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from faust.types import TP

from stream.kafka.cluster import ClusterWatch
from stream.kafka.transport import LogEnd

__all__ = ["Part", "Watchdog", "source_part"]

# A part without progress for this long is named on /readyz. A step, a commit and a batch take less even on a slow day.
REPORT_S = 30.0
# A part without progress for this long ends the process. It is longer than the deadline of any single wait
# (stream/kafka/clients.py), so that such a wait ends first and says what it waited for.
PATIENCE_S = 120.0
LOOK_EVERY_S = 1.0
# Most seconds counted between two looks: a process that was suspended (SIGSTOP, a sleeping machine) has not stalled meanwhile.
MAX_LOOK_S = 5.0
# A fetch older than this says nothing about the log's end: an idle partition's fetch is answered four times a second
# (stream/kafka/transport.py).
STALE_FETCH_MS = 10_000


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a worker's work, now.

    progress  any value; the part makes progress when it changes
    waiting   what waits to be done, for people; None when nothing does
    outside   why it can't be done, when the reason lies outside of this process (Kafka is away). Such a part is reported and
              never ends the process
    """

    name: str
    progress: Any
    waiting: str | None
    outside: str | None = None


def source_part(tp: TP, position: int, end: LogEnd | None, watch: ClusterWatch) -> Part:
    """A partition of a source. Records before `position` are processed and committed.

    The partition has work while its log goes on beyond the position. It also counts as having work while no fetch has been
    answered for 10 s, since nobody knows then where the log ends.

    Args:
        end: the end of the log by the last fetch, None before the first.
    """
    waiting = None
    if end is not None and end.offset > position:
        waiting = f"records from offset {position} to {end.offset} waiting"
    elif end is None or time.time() * 1000 - end.seen_at_ms > STALE_FETCH_MS:
        waiting = "no fetch answered"
    outside = None
    if (tp.topic, tp.partition) in watch.leaderless:
        outside = "no broker leads it"
    elif watch.unanswered_s:
        outside = f"Kafka has not answered for {watch.unanswered_s:.0f} s"
    return Part(f"{tp.topic}, partition {tp.partition}", position, waiting, outside)


class Watchdog:
    """Looks at all parts every second, reports those that have stalled, and in the end ends the process.

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
        """Look until cancelled. If the event loop itself stands still for PATIENCE_S, the stack of every thread is printed and
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
        stalled: list[str] = []
        for part in self._parts():
            if part.waiting is None:
                continue
            progress, still_s = before.get(part.name, (part.progress, -elapsed_s))
            still_s = still_s + elapsed_s if progress == part.progress else 0.0
            self._still[part.name] = (part.progress, still_s)
            if still_s < REPORT_S:
                continue
            what = f"{part.name}: no progress for {still_s:.0f} s with {part.waiting}"
            if part.outside is not None:
                stalled.append(f"{what} ({part.outside})")
            elif still_s < PATIENCE_S:
                stalled.append(what)
            else:
                self._end("watchdog", TimeoutError(what))
        self.stalled = "; ".join(stalled) or None
