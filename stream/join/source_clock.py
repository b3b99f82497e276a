"""How far a source has come in event time. One producer with a wrong clock must not decide it.

The front of a source is the event time that its watermark follows, `lateness_ms` behind. These rules move the front:

- No event moves the front beyond the event's own arrival at the broker (the record's Kafka timestamp, `LogAppendTime`).
- The front is the largest of the smallest times of any five events in a row (`AGREEING`).
- An event moves the front at once to its own time if it took as long to arrive as the events that made the front, or at most
  `lateness_ms` less. So a live stream doesn't wait for four more events. In a replay of the past, this rule doesn't admit an
  event with a wrong time far ahead of the others, since it took years less to arrive than they did.

So a clock that is 59 minutes ahead moves the front at most to the moment of the event's arrival, and a single wrong event in a
replay doesn't move it. With events in order, the front is at the newest event in a live stream, and four events behind in a
replay.

Only the front is committed: a rebuild needs to know where the watermark was, not how it was found.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stream.join.events import Events

__all__ = ["AGREEING", "AHEAD_MS", "SourceClock"]

# Events in a row that must agree. If a share q of the events is wrong, at random, the share q^5 of events is the fifth wrong
# one in a row: at 10 % one in 100,000. bench/clocks.py compares two, three and five, and other rules.
AGREEING = 5
# An event this far ahead of its arrival comes from a clock that isn't synchronised: NTP keeps clocks within milliseconds.
AHEAD_MS = 1_000

Int64s = npt.NDArray[np.int64]
_NONE: Int64s = np.empty(0, np.int64)


class SourceClock:
    """The front of one source of one partition.

    Args:
        lateness_ms: how far out of order events usually come.
        front_ms: the front when the partition was taken over, or any number below zero.
    """

    def __init__(self, lateness_ms: int, front_ms: int) -> None:
        self._lateness_ms = lateness_ms
        self.front_ms = front_ms
        self.lag_ms: int | None = None
        """Time from event to arrival of the event that five agreed on; None before there was one."""
        self._confirmed_ms = front_ms
        self._times, self._lags = _NONE, _NONE  # of the last four events, to be joined with the next run's

    def read(self, events: Events) -> None:
        """Take a run, in the log's order, and set its `front_ms` and `ahead`."""
        if events.times_ms:
            arrived = np.array(events.arrivals_ms, np.int64)
            times = np.array(events.times_ms, np.int64)
            events.ahead = int(np.count_nonzero(times - arrived > AHEAD_MS))
            times = np.minimum(times, arrived)
            self._take(times, arrived - times)
        events.front_ms = self.front_ms

    def _take(self, times: Int64s, lags: Int64s) -> None:
        known, behind = np.concatenate((self._times, times)), np.concatenate((self._lags, lags))
        windows = len(known) - AGREEING + 1
        if windows > 0:
            agreed = known[:windows]
            for shift in range(1, AGREEING):
                agreed = np.minimum(agreed, known[shift : shift + windows])
            best = int(np.argmax(agreed))
            if agreed[best] > self._confirmed_ms or self.lag_ms is None:
                self._confirmed_ms = max(self._confirmed_ms, int(agreed[best]))
                self.lag_ms = int(behind[best + int(np.argmin(known[best : best + AGREEING]))])
        self._times, self._lags = known[1 - AGREEING :], behind[1 - AGREEING :]
        self.front_ms = max(self.front_ms, self._confirmed_ms)
        if self.lag_ms is not None:
            vouched = times[lags >= self.lag_ms - self._lateness_ms]
            if len(vouched):
                self.front_ms = max(self.front_ms, int(vouched.max()))
