"""Which of a partition's two sources are idle: an idle source no longer holds the watermark back."""

from __future__ import annotations

import time

from stream.kafka.transport import LogEnd

__all__ = ["IdleSources"]


class IdleSources:
    """A source is idle once its position has been at the end of its log, by recent fetches, for `join.idle_timeout_ms`.

    ```python
    sources = IdleSources(5_000)
    sources.observe("clicks", 1_200, LogEnd(1_200, now_ms, 1_200))    # once a step
    sources.is_idle("clicks")                                         # by the last observation; True after 5 s
    sources.has_records("clicks")                                     # not idle any more; the time starts again
    ```
    """

    def __init__(self, timeout_ms: int) -> None:
        self._timeout_ms = timeout_ms
        self._since: dict[str, float] = {}  # topic → since when its position is at the end of the log (monotonic)
        self._idle: set[str] = set()

    def has_records(self, topic: str) -> None:
        """Note that records of a source have been read."""
        self._since.pop(topic, None)
        self._idle.discard(topic)

    def observe(self, topic: str, position: int, end: LogEnd | None) -> None:
        """Note a source's position and the end of its log by the last fetch, None before the first.

        A source stopped at an open transaction is not idle: its records are still to come. So `highwater` counts here, the end
        of all that is written. A fetch longer ago than the time-out says nothing, and the time starts again after it.
        """
        now_s = time.monotonic()
        recent = end is not None and time.time() * 1000 - end.seen_at_ms < self._timeout_ms
        if end is None or not recent or position < end.highwater:
            self.has_records(topic)
        elif now_s - self._since.setdefault(topic, now_s) >= self._timeout_ms / 1000:
            self._idle.add(topic)

    def is_idle(self, topic: str) -> bool:
        """Whether a source was idle by the last observation."""
        return topic in self._idle
