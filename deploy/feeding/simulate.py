"""Sending a simulated stream, paced by its own clock or as fast as possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from deploy.feeding.arrivals import AGAIN, BROKEN, FIRST, Sends, arrivals
from deploy.feeding.ended_streams import overlap_ms
from deploy.feeding.feed import Feed, Pace
from deploy.feeding.sender import Sender
from deploy.feeding.simulation import Batch, Simulation, TruthFile, generate
from deploy.feeding.stats import SimulationStats
from deploy.settings import Settings

__all__ = ["Simulator"]

_STEP = 1_000  # events sent at once


class Simulator(Sender[SimulationStats]):
    """One simulated stream.

    ```python
    simulator = Simulator(Simulation(rate=2_000, count=100_000, drift=0.5), settings)
    simulator.run()                        # or: await simulator.run_async()
    ```

    Running it raises DeployError when the truth file can't be written.

    Args:
        paced: send each event when its time has come, by the simulation's own clock; otherwise as fast as possible.
        truth: file to write the true probabilities to.
        end_watermark: end with a watermark record beyond the last window.
        on_progress: called after every step.
        on_overlap: called at the start where the topics end with a stream that reaches beyond this one's beginning, with how
            far in ms. The join labels impressions up to there as they arrive. Without it nobody looks.
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
        on_overlap: Callable[[int], None] | None = None,
    ) -> None:
        pace = Pace(speed=1.0 if paced else None)
        super().__init__(settings, SimulationStats(), pace, end_watermark=end_watermark, on_progress=on_progress)
        self._simulation = simulation
        self._truth = truth
        self._on_overlap = on_overlap

    async def _send_all(self) -> None:
        self._pace.begin(self._simulation.start_ms)
        latest_ms = -1
        try:
            async with Feed(self._settings.kafka) as feed:
                if self._on_overlap is not None:
                    beyond_ms = await overlap_ms(self._settings.kafka, self._topics, self._simulation.start_ms)
                    if beyond_ms:
                        self._on_overlap(beyond_ms)
                for sends in arrivals(self._batches(), self._simulation):
                    latest_ms = max(latest_ms, int(sends.event_times_ms.max()))
                    await self._send_paced(sends.times_ms, _STEP, partial(self._send_step, feed, sends))
                    if self._stop.is_set():
                        break
                await self._end(feed, latest_ms)
        finally:
            if self._truth is not None:
                self._truth.close()

    def _batches(self) -> Iterator[Batch]:
        for batch in generate(self._simulation):
            if self._truth is not None:
                self._truth.write(batch)
            yield batch

    async def _send_step(self, feed: Feed, sends: Sends, step: slice) -> None:
        clicks, what = sends.is_click[step], sends.what[step]
        for topic, is_click in ((self._topics.impressions, False), (self._topics.clicks, True)):
            rows = (step.start + np.flatnonzero(clicks == is_click)).tolist()
            await feed.send(topic, [sends.keys[row] for row in rows], [sends.values[row] for row in rows])
        self.stats.impressions += int(((what == FIRST) & ~clicks).sum())
        self.stats.clicks += int(((what == FIRST) & clicks).sum())
        self.stats.duplicates += int((what == AGAIN).sum())
        self.stats.malformed += int((what == BROKEN).sum())
        self.stats.event_time_ms = int(sends.times_ms[step.stop - 1])
