"""What a replay and a simulation share: pacing, counts, an early stop, and a watermark at the end."""

from __future__ import annotations

import asyncio
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from deploy.feeding.feed import Feed, Pace
from deploy.feeding.stats import StreamStats
from deploy.settings import Settings
from stream.topics.names import TopicNames

__all__ = ["Sender"]

_MARGIN_MS = 1_000  # how far the last watermark lies beyond the end of the last window

StatsT = TypeVar("StatsT", bound=StreamStats)


class Sender(ABC, Generic[StatsT]):
    """Sends one stream; a subclass says what is in it.

    Args:
        stats: the counts to update.
        pace: when each event is due.
        end_watermark: end with a watermark record beyond the last window.
        on_progress: called after every step.
    """

    def __init__(
        self,
        settings: Settings,
        stats: StatsT,
        pace: Pace,
        *,
        end_watermark: bool,
        on_progress: Callable[[StatsT], None] | None,
    ) -> None:
        self.stats = stats
        self._settings = settings
        self._topics = TopicNames.of(settings.topics)
        self._pace = pace
        self._end_watermark = end_watermark
        self._on_progress = on_progress
        self._stop = threading.Event()
        self._began = 0.0

    def stop(self) -> None:
        """End early, after a watermark; safe from any thread."""
        self._stop.set()

    def run(self) -> StatsT:
        """Send the whole stream, in an event loop of its own. Raises as `run_async`."""
        return asyncio.run(self.run_async())

    async def run_async(self) -> StatsT:
        """Send the whole stream.

        Raises:
            FeedError: Kafka or a topic can't be reached, or Kafka doesn't accept the events.
            DeployError: as the subclass says.
        """
        self._began = time.monotonic()
        await self._send_all()
        self._report()
        return self.stats

    @abstractmethod
    async def _send_all(self) -> None:
        """Send every event, then call `_end`."""

    async def _send_paced(
        self, times_ms: npt.NDArray[np.int64], most: int, send_step: Callable[[slice], Awaitable[None]]
    ) -> None:
        """Call `send_step` with the events that are due, at most `most` at once, until all are sent or `stop` was called.

        Args:
            times_ms: when each event is due, never falling, (E,).
            send_step: sends a slice of the events and counts them.
        """
        position = 0
        while position < len(times_ms) and not self._stop.is_set():
            stop = self._pace.due(times_ms, position, self.stats.events, most)
            if stop == position:
                await asyncio.sleep(self._pace.pause_s(int(times_ms[position]), self.stats.events))
                continue
            await send_step(slice(position, stop))
            position = stop
            self._report()

    async def _end(self, feed: Feed, latest_ms: int) -> None:
        """Wait for all acknowledgements, then send the last watermark: beyond the window of an event at `latest_ms`, if any."""
        await feed.flush()
        if self._end_watermark and latest_ms >= 0:
            join = self._settings.join
            self.stats.watermark_ms = latest_ms + join.window_ms + join.lateness_ms + _MARGIN_MS
            await feed.watermark((self._topics.impressions, self._topics.clicks), self.stats.watermark_ms)
            await feed.flush()

    def _report(self) -> None:
        self.stats.elapsed_s = time.monotonic() - self._began
        if self._on_progress is not None:
            self._on_progress(self.stats)
