"""Events as bytes, checked before they are sent by the rules of the pipeline.

| event | fields |
| --- | --- |
| impression | `impression_id`, `timestamp`, `features`; optional: what the answer said, as below |
| click | `impression_id`, `timestamp` |
| score request | `request_id`, `context` (features shared by all), `candidates` [{`id`, `features`}]; optional: `deadline_ms` |

An impression of something that was scored carries `score`, `model_version` and `delta` of the answer, and `shadow_score` and
`shadow_version` if it has them.

Ids are non-empty strings. Times are integers in milliseconds since 1970-01-01 UTC, at most 40 years old (a time in seconds
looks older). A feature is a string, a finite number, a list of strings or None. An event that breaks these rules raises
InvalidEvent here, and would end in `dead-letters` otherwise.

A numpy scalar is sent as the Python number or string of exactly its value (np.float32(0.1) as 0.10000000149011612), and a
member of an enum of strings or integers as its value. All other types are rejected: booleans, arrays, sets, dates, decimals,
bytes. The message says what to pass.
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
    "plain",
    "shown",
]

FeatureValue = str | int | float | Sequence[str] | None
Features = Mapping[str, FeatureValue]
Candidate = tuple[str, Features]
"""An id and the features that are the candidate's own."""

WATERMARK_HEADER = "headrace-watermark"
"""Header of a watermark record: event time in ms as ASCII decimal digits."""

_LATEST_MS = 253_402_300_799_999  # the end of the year 9999: later times are microseconds or garbage
_MAX_AGE_MS = 40 * 365 * 86_400_000  # the join's limit. A time in seconds, read as milliseconds, is in January 1970
_INTEGERS = range(-(1 << 63), 1 << 64)  # what the pipeline reads without losing digits
_MAX_VERSION = (1 << 63) - 1

_PLAIN = frozenset({str, int, float, bool, type(None), list, tuple, dict})
_FEATURE = "a string, a number, a list of strings or None"
_ADVICE = {
    "ndarray": "For an array of strings, pass array.tolist()",
    "Series": "For a series of strings, pass series.tolist()",
    "set": "For a set of strings, pass sorted(value)",
    "frozenset": "For a set of strings, pass sorted(value)",
    "Decimal": "Pass float(value), or str(value) for a category",
    "datetime": "Pass when.timestamp() for a number, or when.isoformat() for a category",
    "date": "Pass when.isoformat() for a category",
    "UUID": "Pass str(value)",
    "bytes": "Pass value.decode()",
    "generator": "For strings, pass list(value)",
}

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
    delta: int | None = None,
    shadow_score: float | None = None,
    shadow_version: int | None = None,
    propensity: float | None = None,
) -> tuple[bytes, bytes]:
    """Key and value of an impression. Raises InvalidEvent."""
    name = _id(impression_id, "$.impression_id")
    event: dict[str, Any] = {
        "impression_id": name,
        "timestamp": check_time(timestamp_ms, "$.timestamp"),
        "features": _features(features, "$.features"),
    }
    versions = "a version number, 0 or more", "Take it from the answer as it is"
    _put_probability(event, "score", score, "Leave it out when nothing was served")
    _put_count(event, "model_version", model_version, *versions)
    _put_count(event, "delta", delta, "a number of deltas, 0 or more", "Take it from the answer as it is, 0 where it has none")
    _put_probability(event, "shadow_score", shadow_score, "Leave it out where the answer has none")
    _put_count(event, "shadow_version", shadow_version, *versions)
    _put_probability(event, "propensity", propensity, "Leave it out when it isn't known")
    if event.get("propensity") == 0:
        _refuse("$.propensity", "a probability above 0", propensity, "What was shown had some chance to be shown")
    return name.encode(), _encode(event)


def _put_probability(event: dict[str, Any], name: str, value: float | None, advice: str) -> None:
    if value is None:
        return
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= 1:
        _refuse(f"$.{name}", "a probability between 0 and 1", value, advice)
    event[name] = number


def _put_count(event: dict[str, Any], name: str, value: int | None, expected: str, advice: str) -> None:
    if value is None:
        return
    number = plain(value)
    if not _is_integer(number) or not 0 <= number <= _MAX_VERSION:
        _refuse(f"$.{name}", expected, value, advice)
    event[name] = number


def encode_click(impression_id: str, timestamp_ms: int) -> tuple[bytes, bytes]:
    """Key and value of a click. Raises InvalidEvent."""
    name = _id(impression_id, "$.impression_id")
    event = {"impression_id": name, "timestamp": check_time(timestamp_ms, "$.timestamp")}
    return name.encode(), _encode(event)


def encode_request(
    request_id: str,
    context: Features,
    candidates: Iterable[Candidate],
    deadline_ms: int | None = None,
    timestamp_ms: int | None = None,
) -> tuple[bytes, bytes]:
    """Key and value of a score request. Raises InvalidEvent. One bad candidate rejects the whole request."""
    listed: list[dict[str, Any]] = []
    if not isinstance(candidates, Iterable):
        _refuse("$.candidates", "pairs (id, features)", candidates, "Pass candidates as [(id, {name: value}), …]")
    for index, candidate in enumerate(candidates):
        path = f"$.candidates[{index}]"
        if not isinstance(candidate, tuple) or len(candidate) != 2:
            _refuse(path, "a pair (id, features)", candidate, "Pass candidates as [(id, {name: value}), …]")
        name, own = candidate
        listed.append({"id": _id(name, f"{path}.id"), "features": _features(own, f"{path}.features")})
    if not listed:
        _refuse("$.candidates", "at least one candidate", [], "Send no request when there is nothing to choose from")
    own_id = _id(request_id, "$.request_id")
    event: dict[str, Any] = {
        "request_id": own_id,
        "context": _features(context, "$.context"),
        "candidates": listed,
    }
    if deadline_ms is not None:
        event["deadline_ms"] = check_time(deadline_ms, "$.deadline_ms")
    if timestamp_ms is not None:
        event["timestamp"] = check_time(timestamp_ms, "$.timestamp")
    return own_id.encode(), _encode(event)


def check_time(value: Any, path: str) -> int:
    """The time as an integer. Raises InvalidEvent when the value is no time in milliseconds."""
    when = plain(value)
    if not _is_integer(when) or not 0 <= when <= _LATEST_MS:
        expected = "milliseconds since 1970-01-01 UTC as an integer, before the year 10000"
        _refuse(path, expected, value, _unit_advice(when) or "For a datetime, pass int(when.timestamp() * 1000)")
    if when < now_ms() - _MAX_AGE_MS:
        expected = "milliseconds since 1970-01-01 UTC, at most 40 years ago"
        _refuse(path, expected, value, _unit_advice(when) or "Events older than that are never joined")
    return int(when)


def plain(value: Any) -> Any:
    """The value as Python's own string, integer or float, where it is a numpy scalar or of a subclass of these.

    All other values come back unchanged. So do numpy's `longdouble`, dates and arrays, which would lose precision or meaning.
    """
    if type(value) in _PLAIN:
        return value
    if type(value).__name__ == "MaskedConstant":  # numpy's for a missing value, whose item is 0
        return value
    # numpy is no dependency of the client, and attributes need no import: kind "U" is text, "b" a boolean. A duration,
    # kind "m", is one of numpy's integers, and would lose its unit.
    if getattr(value, "ndim", None) == 0 and getattr(getattr(value, "dtype", None), "kind", "") in tuple("iufUb"):
        item = value.item()
        return item if type(item) in _PLAIN else value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, float) else value


def _unit_advice(value: Any) -> str:
    """What to do about a time in another unit: the unit by which it lies within 40 years of now. Empty when there is none."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LATEST_MS * 10**7:
        for unit, per_ms, how in (
            ("seconds", 0.001, "multiply by 1000"),
            ("microseconds", 1_000, "divide by 1000"),
            ("nanoseconds", 1_000_000, "divide by 1,000,000"),
        ):
            if abs(value / per_ms - now_ms()) <= _MAX_AGE_MS:
                return f"This looks like {unit}: {how}, and pass an integer"
    return ""


def _id(value: Any, path: str) -> str:
    name = plain(value)
    if not isinstance(name, str) or not name:
        advice = "For bytes, pass value.decode()" if isinstance(value, bytes) else "For a number, pass str(number)"
        _refuse(path, "a non-empty string", value, advice)
    return _text(name, path)


def _features(features: Any, path: str) -> dict[str, FeatureValue]:
    if not isinstance(features, Mapping):
        _refuse(path, "a mapping of names to values", features, "Pass {} when there are none")
    taken = {_name(name, path): _feature(value, path, name) for name, value in features.items()}
    if len(taken) != len(features):
        _refuse(path, "names that differ", list(features), "Two of them are the same text: rename one")
    return taken


def _name(name: Any, path: str) -> str:
    text = plain(name)
    if not isinstance(text, str) or not text:
        _refuse(path, "names that are non-empty strings", name, "Rename that feature")
    return _text(text, path)


def _feature(given: Any, parent: str, name: str) -> FeatureValue:
    value = plain(given)
    if value is None:
        return None
    path = f"{parent}.{name}"
    if isinstance(value, str):
        return _text(value, path)
    if isinstance(value, bool):
        _refuse(path, _FEATURE, given, "For a yes or no, pass 1 and 0, or two strings")
    if isinstance(value, int):
        if value not in _INTEGERS:
            _refuse(path, "an integer of at most 64 bits", given, "Pass longer ids as strings")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            _refuse(path, "a finite number", given, "Pass None for a missing value")
        return value
    if not isinstance(value, list | tuple):
        _refuse(path, _FEATURE, given, _ADVICE.get(type(value).__name__, "Features are flat: convert it before sending"))
    return [_item(item, path, index) for index, item in enumerate(value)]


def _item(given: Any, parent: str, index: int) -> str:
    path = f"{parent}[{index}]"
    value = plain(given)
    if not isinstance(value, str):
        _refuse(path, "a string", given, "Lists hold strings only")
    return _text(value, path)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(value: str, path: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        _refuse(path, "text that UTF-8 can hold", value, "It contains half of a surrogate pair: decode its source again")
    return value


def _refuse(path: str, expected: str, found: Any, advice: str) -> NoReturn:
    raise InvalidEvent(f"{path}: expected {expected}, found {shown(found)} ({type(found).__name__}). {advice}.", path=path)


def shown(value: Any) -> str:
    """A value for an error's text, on one line and cut at 80 characters, so that no log holds a customer's data in full."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of more than 4,300 digits, or an error of the object's own `__repr__`
        return "one that can't be written"
    return text if len(text) <= 80 else f"{text[:77]}..."
