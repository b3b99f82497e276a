"""Hours and weekdays of event times, in the time zone of the schema."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

import numpy as np

from model.batch import Int64Array

__all__ = ["LATEST_MS", "hours", "weekdays"]

LATEST_MS = 253_402_300_799_999
"""The last millisecond of the year 9999, as late as `datetime` goes. No event is later."""

_MINUTE_MS, _HOUR_MS, _DAY_MS = 60_000, 3_600_000, 86_400_000
_EPOCH_WEEKDAY = 3  # 1 January 1970 was a Thursday, and Monday is 0


def hours(times_ms: Int64Array, timezone: str) -> Int64Array:
    """Hour of the day, 0 to 23, of each time (N,), ms since 1970-01-01 UTC, from 0 to `LATEST_MS`."""
    return _local_ms(times_ms, timezone) // _HOUR_MS % 24


def weekdays(times_ms: Int64Array, timezone: str) -> Int64Array:
    """Day of the week, 0 (Monday) to 6, of each time (N,), ms since 1970-01-01 UTC, from 0 to `LATEST_MS`."""
    return (_local_ms(times_ms, timezone) // _DAY_MS + _EPOCH_WEEKDAY) % 7


def _local_ms(times_ms: Int64Array, timezone: str) -> Int64Array:
    """Times as a clock on the wall shows them: UTC plus the zone's offset, which is looked up once for each minute there is."""
    if timezone == "UTC" or not len(times_ms):
        return times_ms
    minutes, which = np.unique(times_ms // _MINUTE_MS, return_inverse=True)
    offsets = np.array([_offset_ms(minute, timezone) for minute in minutes.tolist()], np.int64)
    return times_ms + offsets[which.reshape(-1)]


# Event times come nearly in order, so most minutes are those of the batch before. A day has 1,440 of them.
@lru_cache(maxsize=1 << 14)
def _offset_ms(minute: int, timezone: str) -> int:
    """What the zone's clocks are ahead of UTC in a minute since 1970. Since 1973 all zones change theirs at whole minutes."""
    at = datetime.fromtimestamp(min(minute * 60, LATEST_MS // 1000 - _DAY_MS // 1000), UTC)
    offset = at.astimezone(ZoneInfo(timezone)).utcoffset()
    assert offset is not None  # of a time with a zone
    return offset // timedelta(milliseconds=1)
