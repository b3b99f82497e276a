"""A process that stood still answers nothing until it has read the registry again.

A rollback waits for scorers whose last heartbeat is recent (`live_limit_ms`), and for no others. A process that is stopped, or
whose machine is paused, for longer than that and goes on, knows nothing of it: it would answer what it holds with the weights
that were rolled back, until its follower gets the news. So a batch is scored, and answers are sent, only if

- the last heartbeat that Kafka has is recent, so that a rollback would have waited for this scorer; or
- the registry was read to its end since.

Answers that were computed before a standstill and not sent yet are computed again. Records that the Kafka client has taken by
then can't be taken back: a standstill between that and the socket, a millisecond or two, lets them out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from aiokafka.errors import KafkaError

from stream.errors import StreamError
from stream.records.times import duration

__all__ = ["Standstill", "limit_s", "now_s"]

log = logging.getLogger(__name__)

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now_s() -> float:
    """Seconds that go on while the machine sleeps, where the system has such a clock."""
    return time.clock_gettime(_CLOCK)


def limit_s(live_limit_ms: int, heartbeat_ms: int) -> float:
    """Age of the last heartbeat up to which a rollback is certain to wait for this scorer.

    A heartbeat is sent a little before the broker stamps it, so the age here is larger than that which a rollback sees. One
    interval is left for a rollback that is under way.
    """
    return (live_limit_ms - heartbeat_ms) / 1_000


class Standstill:
    """Notices that this process stood still.

    Args:
        read: reads the registry to its end as it is now, and has everybody know.
        limit_s: age of the last heartbeat from which on a rollback may not wait for this scorer.
        patience_s: longest wait for the registry. A scorer that can't read it answers on, and says that it is stale.
    """

    def __init__(
        self, read: Callable[[], Awaitable[None]], *, limit_s: float, patience_s: float, now_s: Callable[[], float] = now_s
    ) -> None:
        self._read, self._limit_s, self._patience_s, self._now_s = read, limit_s, patience_s, now_s
        self._known_s = now_s()
        self._reading: asyncio.Future[None] | None = None
        self.count = 0
        """Standstills so far: answers computed at another count are computed again."""
        self._due = False

    def look(self) -> float:
        """Notice a standstill. To be called before a heartbeat is sent, so that none hides it. Returns the time."""
        now_s = self._now_s()
        if now_s - self._known_s > self._limit_s and not self._due:
            self._due, self.count = True, self.count + 1
        return now_s

    def reported(self, sent_s: float) -> None:
        """Kafka has a heartbeat that was sent at a time of `look`."""
        if not self._due:
            self._known_s = max(self._known_s, sent_s)

    async def over(self) -> None:
        """Return once the registry was read since the last standstill, or can't be read."""
        self.look()
        if not self._due:
            return
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._read_again())
        await asyncio.shield(self._reading)

    async def _read_again(self) -> None:
        began_s = self._now_s()
        log.warning("no heartbeat for %s: reading the registry before anything is answered", duration(self._silent_ms(began_s)))
        known_s = began_s
        try:
            async with asyncio.timeout(self._patience_s):
                await self._read()
        except (KafkaError, StreamError, TimeoutError) as error:
            known_s = self._now_s()  # requests don't wait so long again and again
            log.error("the registry can't be read, answering on as it was known: %r", error)
        finally:
            self._due, self._known_s, self._reading = False, known_s, None

    def _silent_ms(self, now_s: float) -> float:
        return (now_s - self._known_s) * 1_000
