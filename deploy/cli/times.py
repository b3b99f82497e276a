"""Durations and times as users type them."""

from __future__ import annotations

import datetime
import re
import time
from typing import Any

import click

from stream.records.times import clock, duration

__all__ = ["DURATION", "MOMENT", "TIME", "clock", "duration", "is_ago"]

_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


class _Duration(click.ParamType):
    """`10m` → 600,000 ms."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", str(value).strip())
        if match is None:
            self.fail(f"expected a number and a unit (500ms, 10s, 5m, 2h, 1d), found {value!r}", param, ctx)
        return int(float(match[1]) * _UNITS_MS[match[2]])


class _Time(click.ParamType):
    """`2024-05-01T12:00:00Z` → ms since epoch."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            moment = datetime.datetime.fromisoformat(str(value).strip())
        except ValueError:
            self.fail(f"expected a time such as 2024-05-01T12:00:00Z or 2024-05-01T14:00+02:00, found {value!r}", param, ctx)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        return int(moment.timestamp() * 1_000)


class _Moment(click.ParamType):
    """A time, or how long ago, such as `2h` → ms since epoch."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if is_ago(str(value)):
            return time.time_ns() // 1_000_000 - DURATION.convert(value, param, ctx)
        return TIME.convert(value, param, ctx)


def is_ago(text: str) -> bool:
    """Whether a moment is given as how long ago it was."""
    return re.fullmatch(r"[\d.]+[a-z]+", text.strip()) is not None


DURATION = _Duration()
TIME = _Time()
MOMENT = _Moment()
