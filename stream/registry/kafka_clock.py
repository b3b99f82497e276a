"""Kafka's time, as far as the timestamps of records show it: the clock of a machine that asks may be wrong.

Each record was stamped by the broker before it was read, so Kafka's time is at least the newest timestamp. One that was read as
soon as it was written shows Kafka's time itself.
"""

from __future__ import annotations

import time

__all__ = ["KafkaClock"]

# A record that is read while somebody waits for it is at most this old: one fetch, on a machine whose cores are all busy.
PROMPT_MS = 1_000


class KafkaClock:
    """Kafka's time. Counts by the monotonic clock, so that this machine's may also jump.

    clock.note(record.timestamp)
    clock.is_doubtful(heartbeat_ms)     # wait for a record, then note it
    clock.now_ms()
    """

    def __init__(self) -> None:
        self._least_ms: float | None = None  # from the monotonic clock to Kafka's, at least
        self._is_known = False

    def note(self, timestamp_ms: int, *, prompt: bool = False) -> None:
        """A record of this timestamp was read just now.

        Args:
            prompt: as soon as it was written.
        """
        offset_ms = timestamp_ms - _monotonic_ms()
        if self._least_ms is None or offset_ms > self._least_ms:
            self._least_ms = offset_ms
        self._is_known |= prompt

    def is_doubtful(self, every_ms: int) -> bool:
        """Whether this machine's clock is further ahead of the newest record than records are apart.

        Either its clock is wrong, or no record has come for some time.

        Args:
            every_ms: how often somebody writes a record, if anybody does.
        """
        return not self._is_known and self._least_ms is not None and self.ahead_ms > every_ms + PROMPT_MS

    @property
    def ahead_ms(self) -> int:
        """By how much this machine's clock is ahead of the newest timestamp, counted on since then; negative: behind it."""
        return 0 if self._least_ms is None else round(_local_ms() - _monotonic_ms() - self._least_ms)

    def now_ms(self) -> int:
        """Kafka's time; this machine's as long as nothing contradicts it."""
        if self._least_ms is None:
            return _local_ms()
        kafka_ms = round(_monotonic_ms() + self._least_ms)
        return kafka_ms if self._is_known and abs(self.ahead_ms) > PROMPT_MS else max(kafka_ms, _local_ms())


def _monotonic_ms() -> float:
    return time.monotonic() * 1_000


def _local_ms() -> int:
    return time.time_ns() // 1_000_000
