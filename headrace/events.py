"""Events as bytes: what the pipeline takes, checked before it is sent.

| event | fields |
| --- | --- |
| impression | `impression_id`, `timestamp`, `features`; optional: `score` and `model_version` as served |
| click | `impression_id`, `timestamp` |
| score request | `request_id`, `context` (features shared by all), `candidates` [{`id`, `features`}]; optional: `deadline_ms` |

Ids are non-empty strings. Times are integers in milliseconds since 1970-01-01 UTC, at most 40 years old (a time in seconds
looks older). A feature is a string, a finite number, a list of strings or None. What breaks that raises InvalidEvent here,
instead of ending in `dead-letters` later.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import msgspec

from headrace.errors import InvalidEvent

__all__ = [
    "WATERMARK_HEADER",
    "Candidate",
    "FeatureValue",
    "Features",
    "check_time",
    "encode_click",
    "encode_impression",
    "encode_request",
    "now_ms",
]

FeatureValue = str | int | float | Sequence[str] | None
Features = Mapping[str, FeatureValue]
Candidate = tuple[str, Features]
"""An id and the features that are the candidate's own."""

WATERMARK_HEADER = "headrace-watermark"
"""Header of a watermark record: event time in ms as ASCII decimal digits."""

_LATEST_MS = 253_402_300_799_999  # the end of the year 9999: beyond lie microseconds and garbage
_MAX_AGE_MS = 40 * 365 * 86_400_000  # the join's own: before lie seconds (read as milliseconds, they are in January 1970)
_INTEGERS = range(-(1 << 63), 1 << 64)  # what the pipeline reads without losing digits
_MAX_VERSION = (1 << 63) - 1

_encode = msgspec.json.Encoder().encode


def now_ms() -> int:
    """Milliseconds since 1970-01-01 UTC by this machine's clock."""
    return time.time_ns() // 1_000_000


def encode_impression(
    impression_id: str,
    timestamp_ms: int,
    features: Features,
    score: float | None = None,
    model_version: int | None = None,
) -> tuple[bytes, bytes]:
    """Key and value of an impression. Raises InvalidEvent."""
    event = {
        "impression_id": _id(impression_id, "$.impression_id"),
        "timestamp": check_time(timestamp_ms, "$.timestamp"),
        "features": _features(features, "$.features"),
    }
    if score is not None:
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            _refuse("$.score", "a probability between 0 and 1", score, "Leave it out when nothing was served")
        event["score"] = score
    if model_version is not None:
        if not _is_integer(model_version) or not 0 <= model_version <= _MAX_VERSION:
            _refuse("$.model_version", "a version number, 0 or more", model_version, "Take it from the answer as it is")
        event["model_version"] = model_version
    return impression_id.encode(), _encode(event)


def encode_click(impression_id: str, timestamp_ms: int) -> tuple[bytes, bytes]:
    """Key and value of a click. Raises InvalidEvent."""
    event = {
        "impression_id": _id(impression_id, "$.impression_id"),
        "timestamp": check_time(timestamp_ms, "$.timestamp"),
    }
    return impression_id.encode(), _encode(event)


def encode_request(
    request_id: str, context: Features, candidates: Iterable[Candidate], deadline_ms: int | None = None
) -> tuple[bytes, bytes]:
    """Key and value of a score request. Raises InvalidEvent; one bad candidate refuses the whole request."""
    listed = []
    for index, candidate in enumerate(candidates):
        path = f"$.candidates[{index}]"
        if not isinstance(candidate, tuple) or len(candidate) != 2:
            _refuse(path, "a pair (id, features)", candidate, "Pass candidates as [(id, {name: value}), …]")
        name, own = candidate
        listed.append({"id": _id(name, f"{path}.id"), "features": _features(own, f"{path}.features")})
    if not listed:
        _refuse("$.candidates", "at least one candidate", [], "Send no request when there is nothing to choose from")
    event: dict[str, Any] = {
        "request_id": _id(request_id, "$.request_id"),
        "context": _features(context, "$.context"),
        "candidates": listed,
    }
    if deadline_ms is not None:
        event["deadline_ms"] = check_time(deadline_ms, "$.deadline_ms")
    return request_id.encode(), _encode(event)


def check_time(value: Any, path: str) -> int:
    """The time itself when it can be one. Raises InvalidEvent."""
    if not _is_integer(value) or not 0 <= value <= _LATEST_MS:
        expected = "milliseconds since 1970-01-01 UTC as an integer, before the year 10000"
        _refuse(path, expected, value, _unit_advice(value) or "For a datetime, pass int(when.timestamp() * 1000)")
    if value < now_ms() - _MAX_AGE_MS:
        expected = "milliseconds since 1970-01-01 UTC, at most 40 years ago"
        _refuse(path, expected, value, _unit_advice(value) or "Events older than that are never joined")
    return int(value)


def _unit_advice(value: Any) -> str:
    """What to do about a time in another unit, by which unit makes it a time of the last or next 40 years."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        for unit, per_ms, how in (
            ("seconds", 0.001, "multiply by 1000"),
            ("microseconds", 1_000, "divide by 1000"),
            ("nanoseconds", 1_000_000, "divide by 1,000,000"),
        ):
            if abs(value / per_ms - now_ms()) <= _MAX_AGE_MS:
                return f"This looks like {unit}: {how}, and pass an integer"
    return ""


def _id(value: Any, path: str) -> str:
    if not isinstance(value, str) or not value:
        _refuse(path, "a non-empty string", value, "For a number, pass str(number)")
    return _text(value, path)


def _features(features: Any, path: str) -> dict[str, FeatureValue]:
    if not isinstance(features, Mapping):
        _refuse(path, "a mapping of names to values", features, "Pass {} when there are none")
    return {_name(name, path): _feature(value, f"{path}.{name}") for name, value in features.items()}


def _name(name: Any, path: str) -> str:
    if not isinstance(name, str) or not name:
        _refuse(path, "names that are non-empty strings", name, "Rename that feature")
    return _text(name, path)


def _feature(value: Any, path: str) -> FeatureValue:
    if isinstance(value, str):
        return _text(value, path)
    if value is None or (_is_integer(value) and value in _INTEGERS):
        return value
    if _is_integer(value):
        _refuse(path, "an integer of at most 64 bits", value, "Pass longer ids as strings")
    if isinstance(value, float):
        if not math.isfinite(value):
            _refuse(path, "a finite number", value, "Pass None for a missing value")
        return value
    if not isinstance(value, list | tuple):
        expected = "a string, a number, a list of strings or None"
        _refuse(path, expected, value, "Features are flat: convert it before sending")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            _refuse(f"{path}[{index}]", "a string", item, "Lists hold strings only")
        _text(item, f"{path}[{index}]")
    return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: str, path: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        _refuse(path, "text that UTF-8 can hold", value, "It contains half of a surrogate pair: decode its source again")
    return value


def _refuse(path: str, expected: str, found: Any, advice: str) -> NoReturn:
    shown = repr(found)
    if len(shown) > 80:  # one line on a terminal, and no customer's data in full in a log
        shown = f"{shown[:77]}..."
    raise InvalidEvent(f"{path}: expected {expected}, found {shown} ({type(found).__name__}). {advice}.", path=path)
