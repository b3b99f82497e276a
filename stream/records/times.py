"""Event times: their bounds, the unit that a number is in, and lengths of time for people.

The client has the same rule of units for itself (`headrace/events.py`).
"""

from __future__ import annotations

import datetime

__all__ = ["MAX_AGE_MS", "MAX_TIMESTAMP_MS", "clock", "duration", "too_old", "unit_of", "wrong_unit"]

# The end of the year 9999, the last one that ISO 8601 writes in four digits.
MAX_TIMESTAMP_MS = 253_402_300_799_999
# How far an event may lie before its arrival. Logs of the past are replayed years later, and 40 years reach back to before
# there were click logs. A time in seconds, read as milliseconds, lies further back: in January 1970.
MAX_AGE_MS = 40 * 365 * 86_400_000


def unit_of(time: int, near_ms: int) -> str | None:
    """The unit in which `time` is within `MAX_AGE_MS` of the moment `near_ms`; None when no unit fits."""
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
    """The end of an error text: the unit other than milliseconds that the time looks like, or an empty string."""
    unit = unit_of(time, near_ms)
    return "" if unit in (None, "milliseconds") else f", which looks like {unit}"


def too_old(time: int, arrival_ms: int) -> str:
    """The error text for a time more than `MAX_AGE_MS` before the record's arrival."""
    expected = f"expected milliseconds since 1970, at most 40 years before the record's arrival at {arrival_ms}"
    return f"{expected}, found {time}{wrong_unit(time, arrival_ms)}"


def duration(span_ms: float) -> str:
    """A length of time for people: three digits and the largest unit that fits."""
    for unit, size_ms in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)):
        if span_ms >= size_ms:
            return f"{span_ms / size_ms:.3g} {unit}"
    return f"{span_ms:.0f} ms"


def clock(at_ms: int | None) -> str:
    """A time in UTC to the second, in the form that `--before` reads. A dash for never."""
    if not at_ms:
        return "-"
    return datetime.datetime.fromtimestamp(at_ms / 1_000, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
