"""A sample of the clicks learned since the last delta, by their arrival in Kafka. Scorers measure freshness with it."""

from __future__ import annotations

import numpy as np

from stream.trainer.columns import ExampleColumns, Int64Array

__all__ = ["MOST", "ArrivalSample"]

# Clicks of one sample. At 4 deltas a second, 64 give a scorer 256 clicks a second: 2.5 of them lie above the 99th percentile.
# As JSON they take 1 KB of a delta's header.
MOST = 64


class ArrivalSample:
    """A uniform sample of at most `MOST` clicks. For one thread.

        sample = ArrivalSample()
        sample.add(batch)     # once a batch that was learned
        sample.take()         # (1700000000123, …), and the sample begins again

    The clicks with the smallest hashes of their impressions' ids are kept, so a replay of the log draws the same sample.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._hashes: Int64Array = np.empty(0, np.int64)
        self._arrived_ms: Int64Array = np.empty(0, np.int64)

    def add(self, batch: ExampleColumns) -> None:
        """Take the clicks of a batch whose arrival is known."""
        if batch.arrived_ms is None:
            return
        rows = np.flatnonzero((batch.arrived_ms >= 0) & (batch.labels > 0.5))
        hashes = np.concatenate([self._hashes, batch.id_hashes[rows]])
        arrived_ms = np.concatenate([self._arrived_ms, batch.arrived_ms[rows]])
        if len(hashes) > MOST:
            kept = np.argpartition(hashes, MOST)[:MOST]
            hashes, arrived_ms = hashes[kept], arrived_ms[kept]
        self._hashes, self._arrived_ms = hashes, arrived_ms

    def take(self) -> tuple[int, ...]:
        """The arrivals of the sample (ms since epoch), earliest first. The next sample begins."""
        arrivals = tuple(sorted(self._arrived_ms.tolist()))
        self._begin()
        return arrivals
