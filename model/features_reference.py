"""The reference decoder: one record at a time, in plain Python. It decides which records are good.

`FeatureDecoder` calls it for every record that its fast path isn't sure of. So the decoder accepts what these functions accept,
as long as the fast path never accepts more. They return canonical values: None, a string (categorical; an integer as its
decimal string), a float (numeric) or a list of strings.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

from model.errors import FeatureError
from model.schema import FeatureSchema, FieldSpec

__all__ = ["Impression", "Request", "Value", "decode_impression", "decode_request", "parse"]

Value = str | float | list[str] | None

_EXACT_FLOAT = 2.0**53
"""Above this a float no longer identifies one integer, so it isn't accepted as a categorical value."""

_LONG_DIGITS = 20
"""Integers of more characters are read as floats. No 64-bit integer is longer, and no field takes larger integers exactly."""


@dataclass(frozen=True, slots=True)
class Impression:
    """Canonical values of the schema's fields, in order, and what the impression says of the answer that it was shown with.

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
    """Canonical values of each candidate, with values of the context where it has none; `deadline_ms` is -1 if absent."""

    request_id: str
    candidate_ids: list[str]
    candidates: list[list[Value]]
    deadline_ms: int


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


def _features(features: Any, schema: FeatureSchema, path: str) -> list[Value]:
    if not isinstance(features, dict):
        _wrong_type("an object", features, path)
    return [_value(features.get(field.name), field, f"{path}.{field.name}") for field in schema.fields]


def decode_impression(payload: bytes | None, schema: FeatureSchema) -> Impression:
    """Decodes one impression. Raises FeatureError."""
    record = parse(payload)
    if record.get("features") is None:
        _reject("missing_field", "$", "Object missing required field `features`")
    values = _features(record["features"], schema, "$.features")
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
    context: list[Value] = [None] * len(schema.fields)
    if record.get("context") is not None:
        context = _features(record["context"], schema, "$.context")
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
        own: list[Value] = [None] * len(schema.fields)
        if candidate.get("features") is not None:
            own = _features(candidate["features"], schema, f"{path}.features")
        candidates.append([ours if ours is not None else shared for ours, shared in zip(own, context, strict=True)])
    deadline_ms = _count(record.get("deadline_ms"), "milliseconds since the epoch", "$.deadline_ms")
    return Request(request_id, ids, candidates, deadline_ms)
