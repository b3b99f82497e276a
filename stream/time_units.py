"""Which unit a time is in, judged by a moment that it should be near: milliseconds, or what somebody sent instead.

The client has the same rule for itself (`headrace/events.py`).
"""

from __future__ import annotations

__all__ = ["MAX_AGE_MS", "unit_of", "wrong_unit"]

# How far an event may lie before its arrival. Logs of the past are replayed years later, and 40 years reach back to before
# there were click logs. A time in seconds, read as milliseconds, lies further back: in January 1970.
MAX_AGE_MS = 40 * 365 * 86_400_000


def unit_of(time: int, near_ms: int) -> str | None:
    """The unit in which `time` is within `MAX_AGE_MS` of a moment; None where it is in none."""
    for unit, time_ms in (
        ("milliseconds", time),
        ("seconds", time * 1_000),
        ("microseconds", time // 1_000),
        ("nanoseconds", time // 1_000_000),
    ):
        if abs(near_ms - time_ms) <= MAX_AGE_MS:
            return unit
    return None


def wrong_unit(time: int, near_ms: int) -> str:
    """For the end of an error: which other unit the time looks like. Empty where it looks like none."""
    unit = unit_of(time, near_ms)
    return "" if unit in (None, "milliseconds") else f", which looks like {unit}"
