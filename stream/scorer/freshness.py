"""Measures freshness: the time from a click's arrival in Kafka to the first answer by weights that have learned it.

A delta brings a sample of the arrivals that it has learned (`stream.records.delta`). They wait here until a batch that was
scored after the delta is acknowledged by the brokers. Clicks in deltas from before this scorer began to follow are left out:
other scorers have answered with them already. So are clicks of the time in which a pinned version answers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

__all__ = ["MAX_WAITING", "Freshness"]

# Most arrivals that wait for an answer. A delta brings at most 64, four times a second; a scorer without requests would collect
# them for ever. The newest are kept.
MAX_WAITING = 4_096


class Freshness:
    """For the event loop.

    ```python
    freshness.learned(header.arrivals)  # the delta is in the weights that answer
    known = freshness.take()  # right before a batch is scored
    freshness.answered(known)  # its answers are acknowledged
    ```

    Args:
        observe: called with the seconds of each click.
    """

    def __init__(self, observe: Callable[[float], None]) -> None:
        self._observe = observe
        self._waiting: deque[int] = deque(maxlen=MAX_WAITING)

    def learned(self, arrivals_ms: Iterable[int]) -> None:
        """Note the arrivals of clicks (ms since epoch) that the weights have learned. No answer knows them yet."""
        self._waiting.extend(arrivals_ms)

    def take(self) -> Sequence[int]:
        """The arrivals that the next batch is the first to know."""
        arrivals_ms = list(self._waiting)
        self._waiting.clear()
        return arrivals_ms

    def answered(self, arrivals_ms: Iterable[int]) -> None:
        """Count clicks whose first answer is acknowledged now."""
        now_ms = time.time_ns() // 1_000_000
        for arrived_ms in arrivals_ms:
            self._observe(max(now_ms - arrived_ms, 0) / 1_000)
