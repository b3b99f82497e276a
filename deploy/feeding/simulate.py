"""Sending a simulated stream, paced by its own clock or as fast as it goes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from deploy.feeding.arrivals import AGAIN, BROKEN, FIRST, Sends, arrivals
from deploy.feeding.feed import Feed, Pace
from deploy.feeding.simulation import Batch, Simulation, TruthFile, generate
from deploy.settings import Settings
from stream.topics.names import TopicNames

__all__ = ["SimulationStats", "Simulator"]

_STEP = 1_000  # events handed over at once
_MARGIN_MS = 1_000  # of the last watermark beyond the last window


@dataclass(slots=True)
class SimulationStats:
    """Counts so far; safe to read from another thread."""

    impressions: int = 0  # distinct
    clicks: int = 0  # distinct
    duplicates: int = 0
    malformed: int = 0
    event_time_ms: int = -1
    watermark_ms: int = -1
    elapsed_s: float = 0.0

    @property
    def events(self) -> int:
        return self.impressions + self.clicks + self.duplicates + self.malformed

    @property
    def events_per_s(self) -> float:
        return self.events / self.elapsed_s if self.elapsed_s > 0 else 0.0


class Simulator:
    """One simulated stream.

    ```python
    simulator = Simulator(Simulation(rate=2_000, count=100_000, drift=0.5), settings)
    simulator.run()                        # or: await simulator.run_async()
    ```

    Args:
        paced: send each event when its time has come (by the simulation's own clock); else as fast as it goes.
        truth: file to write the true probabilities to.
        end_watermark: end with a watermark record beyond the last window.
        on_progress: called after every step.
    """

    def __init__(
        self,
        simulation: Simulation,
        settings: Settings,
        *,
        paced: bool = True,
        truth: TruthFile | None = None,
        end_watermark: bool = True,
        on_progress: Callable[[SimulationStats], None] | None = None,
    ) -> None:
        self.stats = SimulationStats()
        self._simulation = simulation
        self._settings = settings
        self._topics = TopicNames.of(settings.topics)
        self._pace = Pace(speed=1.0 if paced else None)
        self._truth = truth
        self._end_watermark = end_watermark
        self._on_progress = on_progress
        self._stop = threading.Event()

    def stop(self) -> None:
        """End early, watermark included; safe from any thread."""
        self._stop.set()

    def run(self) -> SimulationStats:
        """Send it all, in an event loop of its own. Raises as `run_async`."""
        return asyncio.run(self.run_async())

    async def run_async(self) -> SimulationStats:
        """Send it all.

        Raises:
            FeedError: Kafka or a topic is not there, or doesn't take the events.
            DeployError: the truth file can't be written.
        """
        began = time.monotonic()
        self._pace.begin(self._simulation.start_ms)
        latest_ms = -1
        try:
            async with Feed(self._settings.kafka) as feed:
                for sends in arrivals(self._batches(), self._simulation):
                    latest_ms = max(latest_ms, int(sends.event_times_ms.max()))
                    await self._send(feed, sends, began)
                    if self._stop.is_set():
                        break
                await feed.flush()
                if self._end_watermark and latest_ms >= 0:
                    join = self._settings.join
                    self.stats.watermark_ms = latest_ms + join.window_ms + join.lateness_ms + _MARGIN_MS
                    await feed.watermark((self._topics.impressions, self._topics.clicks), self.stats.watermark_ms)
                    await feed.flush()
        finally:
            if self._truth is not None:
                self._truth.close()
        self._report(began)
        return self.stats

    def _batches(self) -> Iterator[Batch]:
        for batch in generate(self._simulation):
            if self._truth is not None:
                self._truth.write(batch)
            yield batch

    async def _send(self, feed: Feed, sends: Sends, began: float) -> None:
        position = 0
        while position < len(sends.times_ms) and not self._stop.is_set():
            stop = self._pace.due(sends.times_ms, position, self.stats.events, _STEP)
            if stop == position:
                await asyncio.sleep(self._pace.pause_s(int(sends.times_ms[position]), self.stats.events))
                continue
            for topic, is_click in ((self._topics.impressions, False), (self._topics.clicks, True)):
                rows = (position + np.flatnonzero(sends.is_click[position:stop] == is_click)).tolist()
                await feed.send(topic, [sends.keys[row] for row in rows], [sends.values[row] for row in rows])
            what = sends.what[position:stop]
            clicks = sends.is_click[position:stop]
            self.stats.impressions += int(((what == FIRST) & ~clicks).sum())
            self.stats.clicks += int(((what == FIRST) & clicks).sum())
            self.stats.duplicates += int((what == AGAIN).sum())
            self.stats.malformed += int((what == BROKEN).sum())
            self.stats.event_time_ms = int(sends.times_ms[stop - 1])
            position = stop
            self._report(began)

    def _report(self, began: float) -> None:
        self.stats.elapsed_s = time.monotonic() - began
        if self._on_progress is not None:
            self._on_progress(self.stats)
