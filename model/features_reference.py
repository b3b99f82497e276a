"""The reference decoder: one record at a time, in plain Python. It decides which records are good.

`FeatureDecoder` calls it for every record that its fast path isn't sure of. So the decoder accepts what these functions accept,
as long as the fast path never accepts more. They return canonical values: None, a string (categorical; an integer as its
decimal string), a float (numeric) or a list of strings.

`reference_row` defines what the model reads of such values: the keys and factors of all fields, value by value.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any, NamedTuple, NoReturn
from zoneinfo import ZoneInfo

import numpy as np

from model.clock import LATEST_MS
from model.errors import FeatureError
from model.hashing import cross_key, hash_bytes, missing_key, number_key
from model.schema import FeatureSchema, FieldSpec

__all__ = ["Impression", "ReferenceRow", "Request", "Value", "decode_impression", "decode_request", "parse", "reference_row"]

Value = str | float | list[str] | None

_EXACT_FLOAT = 2.0**53
"""Above this a float no longer identifies one integer, so it isn't accepted as a categorical value."""

_LONG_DIGITS = 20
"""Integers of more characters are read as floats. No 64-bit integer is longer, and no field takes larger integers exactly."""


@dataclass(frozen=True, slots=True)
class Impression:
    """Canonical values of the fields `FeatureSchema.sent`, and what the impression says of the answer that it was shown with.

    Scores are NaN if absent; `served_version`, `served_delta` and `shadow_version` are -1 if absent.
    """

    values: list[Value]
    served_score: float
    served_version: int
    served_delta: int
    shadow_score: float
    shadow_version: int


@dataclass(frozen=True, slots=True)
class Request:
    """Canonical values of the fields `FeatureSchema.asked` of each candidate, with values of the context where it has none.

    `deadline_ms` and `time_ms` are -1 if absent.
    """

    request_id: str
    candidate_ids: list[str]
    candidates: list[list[Value]]
    deadline_ms: int
    time_ms: int


def _reject(reason: str, path: str, message: str) -> NoReturn:
    raise FeatureError(f"{message} - at `{path}`", reason=reason, path=path)


def _kind(value: Any) -> str:
    """JSON's name for the type of a decoded value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names = {dict: "object", list: "array", str: "string", int: "integer", float: "number"}
    return names[type(value)]


def _wrong_type(expected: str, value: Any, path: str) -> NoReturn:
    reason = "nested" if isinstance(value, dict) else "wrong_type"
    _reject(reason, path, f"Expected {expected}, got {_kind(value)}")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONG_DIGITS else float(digits)


class _Constant(float):
    """NaN or an infinity, which Python's JSON reader accepts and JSON doesn't have."""


def _path_of_constant(record: Any) -> str:
    """The path of a `_Constant` in the record; `$` if there is none any more, since a repeated key has replaced it."""
    stack: list[tuple[str, Any]] = [("$", record)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, _Constant):
            return path
        if isinstance(value, dict):
            stack += [(f"{path}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list):
            stack += [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    return "$"


def parse(payload: bytes | None) -> dict[str, Any]:
    """The record's JSON object. Raises FeatureError if it is empty, not UTF-8, not JSON or not an object."""
    constants: list[_Constant] = []

    def constant(name: str) -> _Constant:
        constants.append(_Constant(name))
        return constants[-1]

    if not payload:
        _reject("malformed_json", "$", "Expected a JSON object, got an empty value")
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        _reject("bad_utf8", "$", f"Invalid UTF-8: {error.reason} (byte {error.start})")
    try:
        record = json.loads(text, parse_int=_integer, parse_constant=constant)
    except json.JSONDecodeError as error:
        _reject("malformed_json", "$", f"Malformed JSON: {error.msg} (character {error.pos})")
    except RecursionError:
        _reject("malformed_json", "$", "Malformed JSON: nested too deeply to read")
    if constants:
        _reject("not_finite", _path_of_constant(record), f"Expected a finite number, got {constants[0]}")
    if not isinstance(record, dict):
        _wrong_type("an object", record, "$")
    return record


def _string(value: Any, path: str, expected: str = "a string") -> str:
    if not isinstance(value, str):
        _wrong_type(expected, value, path)
    try:
        value.encode()
    except UnicodeEncodeError:
        _reject("bad_utf8", path, "Half of a surrogate pair stands alone in a string")
    return value


def _whole(value: Any) -> int | None:
    """The 64-bit integer that a JSON number (`17`, `17.0`) means, else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 64:
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT_FLOAT:
        return int(value)
    return None


def _count(value: Any, expected: str, path: str) -> int:
    """The whole number from 0 to 2^63 - 1, -1 if it is absent."""
    if value is None:
        return -1
    whole = _whole(value)
    if whole is None or not 0 <= whole < 1 << 63:
        _wrong_type(expected, value, path)
    return whole


def _number(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _wrong_type("a number", value, path)
    number = float(value)
    if not math.isfinite(number):
        _reject("not_finite", path, "Expected a finite number, got one beyond the range of a double")
    return number


def _probability(value: Any, path: str) -> float:
    """A score; NaN where there is none."""
    if value is None:
        return math.nan
    score = _number(value, path)
    if not 0 <= score <= 1:
        _reject("out_of_range", path, f"Expected a probability, got {score}")
    return score


def _value(value: Any, field: FieldSpec, path: str) -> Value:
    if value is None:
        return None
    if field.kind == "numeric":
        return _number(value, path)
    if field.kind == "list":
        if not isinstance(value, list):
            _wrong_type("an array of strings", value, path)
        return [_string(item, f"{path}[{index}]") for index, item in enumerate(value)]
    whole = _whole(value)
    if whole is not None:
        return str(whole)
    if isinstance(value, float) and not math.isfinite(value):
        _reject("not_finite", path, "Expected a string or an integer, got a number beyond the range of a double")
    return _string(value, path, "a string or an integer")


def _features(features: Any, fields: Sequence[FieldSpec], path: str) -> list[Value]:
    if not isinstance(features, dict):
        _wrong_type("an object", features, path)
    return [_value(features.get(field.name), field, f"{path}.{field.name}") for field in fields]


def decode_impression(payload: bytes | None, schema: FeatureSchema) -> Impression:
    """Decodes one impression. Raises FeatureError."""
    record = parse(payload)
    if record.get("features") is None:
        _reject("missing_field", "$", "Object missing required field `features`")
    values = _features(record["features"], schema.sent, "$.features")
    served_score = _probability(record.get("score"), "$.score")
    served_version = _count(record.get("model_version"), "a version number, 0 or more", "$.model_version")
    served_delta = _count(record.get("delta"), "a number of deltas, 0 or more", "$.delta")
    shadow_score = _probability(record.get("shadow_score"), "$.shadow_score")
    shadow_version = _count(record.get("shadow_version"), "a version number, 0 or more", "$.shadow_version")
    return Impression(values, served_score, served_version, served_delta, shadow_score, shadow_version)


def decode_request(payload: bytes | None, schema: FeatureSchema) -> Request:
    """Decodes one score request. Raises FeatureError, for one bad candidate too: no answer is partial."""
    record = parse(payload)
    for name in ("request_id", "candidates"):
        if record.get(name) is None:
            _reject("missing_field", "$", f"Object missing required field `{name}`")
    request_id = _string(record["request_id"], "$.request_id")
    context: list[Value] = [None] * len(schema.asked)
    if record.get("context") is not None:
        context = _features(record["context"], schema.asked, "$.context")
    if not isinstance(record["candidates"], list):
        _wrong_type("an array of candidates", record["candidates"], "$.candidates")
    ids, candidates = [], []
    for index, candidate in enumerate(record["candidates"]):
        path = f"$.candidates[{index}]"
        if not isinstance(candidate, dict):
            _reject("wrong_type", path, f"Expected an object, got {_kind(candidate)}")
        if candidate.get("id") is None:
            _reject("missing_field", path, "Object missing required field `id`")
        ids.append(_string(candidate["id"], f"{path}.id"))
        own: list[Value] = [None] * len(schema.asked)
        if candidate.get("features") is not None:
            own = _features(candidate["features"], schema.asked, f"{path}.features")
        candidates.append([ours if ours is not None else shared for ours, shared in zip(own, context, strict=True)])
    deadline_ms = _count(record.get("deadline_ms"), "milliseconds since the epoch", "$.deadline_ms")
    time_ms = _count(record.get("timestamp"), "milliseconds since the epoch", "$.timestamp")
    if time_ms > LATEST_MS:
        _reject("out_of_range", "$.timestamp", f"Expected milliseconds since the epoch up to the year 9999, got {time_ms}")
    return Request(request_id, ids, candidates, deadline_ms, time_ms)


class ReferenceRow(NamedTuple):
    """What the model reads of an example: keys and factors of the single-valued fields, and the keys of each list."""

    keys: list[int]
    scales: list[float]
    lists: list[list[int]]


def reference_row(values: Sequence[Value], schema: FeatureSchema, time_ms: int, *, served: bool = False) -> ReferenceRow:
    """What the model reads of canonical values: of the fields `sent`, or of those `asked` when it is served."""
    sent = schema.asked if served else schema.sent
    value_of = dict(zip((field.name for field in sent), values, strict=True))
    keys_of: dict[str, list[int]] = {}
    scale_of: dict[str, float] = {}
    for field in schema.fields:
        if field.kind == "cross":
            continue
        value: Value = value_of.get(field.name)
        if served and field.serve_as is not None:
            value = _constant(field)
        elif field.kind in ("hour", "weekday"):
            at = _local(time_ms, schema.timezone)
            value = str(at.hour if field.kind == "hour" else at.weekday())
        keys_of[field.name], scale_of[field.name] = _keys(value, field)
    for field in schema.fields:
        if field.kind == "cross":
            combinations = product(*(keys_of[name] for name in field.of))
            keys_of[field.name] = [cross_key(each, field.hash_space) for each in combinations]
            scale_of[field.name] = 1.0
    return ReferenceRow(
        [keys_of[field.name][0] for field in schema.singles],
        [scale_of[field.name] for field in schema.singles],
        [keys_of[field.name] for field in schema.lists],
    )


def _constant(field: FieldSpec) -> Value:
    if isinstance(field.serve_as, tuple):
        return list(field.serve_as)
    if field.kind == "numeric":
        assert isinstance(field.serve_as, int | float)
        return float(field.serve_as)
    return str(field.serve_as)


def _local(time_ms: int, timezone: str) -> datetime:
    """The time on clocks of the zone, without the zone."""
    utc = datetime(1970, 1, 1) + timedelta(milliseconds=time_ms)
    if timezone == "UTC":
        return utc
    at = min(utc, datetime(9999, 12, 30, 23, 59, 59)).replace(tzinfo=UTC).astimezone(ZoneInfo(timezone))
    offset = at.utcoffset()
    assert offset is not None
    try:
        return utc + offset
    except OverflowError:  # the year 10000, which `datetime` doesn't have; a week before has the same hours and weekdays
        return utc - timedelta(days=7) + offset


def _keys(value: Value, field: FieldSpec) -> tuple[list[int], float]:
    """The keys of a value, one or those of a list, and its factor."""
    space = field.hash_space
    if value is None or value == []:
        return [missing_key(space)], 1.0
    if isinstance(value, list):
        return [hash_bytes(each.encode(), space) for each in value], 1.0
    if isinstance(value, str):
        return [hash_bytes(value.encode(), space)], 1.0
    if field.buckets == "scaled":
        return [number_key(0, space)], float(np.float32(np.copysign(np.log1p(abs(value)), value)))
    if field.buckets == "standard":
        scale = min(max((value - field.mean) / field.deviation, -10.0), 10.0)
        return [number_key(0, space)], float(np.float32(scale))
    return [number_key(_bucket(value, field), space)], 1.0


def _bucket(value: float, field: FieldSpec) -> int:
    if field.buckets == "linear":
        quotient = value / field.width
        largest = 1 << 62
        return (
            max(-largest, min(largest, math.floor(quotient))) if math.isfinite(quotient) else largest * (1 if value > 0 else -1)
        )
    mantissa, exponent = math.frexp(1 + abs(value))
    edges = [2.0 ** (step / field.per_octave - 1) for step in range(1, field.per_octave)]
    bucket = (exponent - 1) * field.per_octave + bisect.bisect_right(edges, mantissa)
    return ~bucket if value < 0 else bucket
