"""A record that a schema describes (Avro, Protobuf, a row of a table) → the contract's JSON.

| in the record | in the JSON |
| --- | --- |
| `features`, a record or a map | the same |
| `features`, a string that holds a JSON object (a JSON column of a table) | the object |
| no `features` | every field but the contract's own becomes a feature |
| integers, floats, booleans, strings, enums, null | the same; an enum is its symbol's name |
| decimals | a number with the same digits |
| timestamps, with and without a zone | milliseconds since 1970 |
| dates, times of day, UUIDs | text as in ISO 8601 |
| bytes | rejected: JSON has none |
| NaN and infinity | rejected: JSON has none |
"""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec

from stream.formats.refused import RefusedError

__all__ = ["json_row", "row_json"]

# Fields of an impression or a click that are no features.
CONTRACT = frozenset(
    (
        "impression_id",
        "timestamp",
        "features",
        "score",
        "model_version",
        "delta",
        "shadow_score",
        "shadow_version",
        "propensity",
    )
)

_EPOCH, _MILLISECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(milliseconds=1)

_encode = msgspec.json.Encoder(decimal_format="number").encode
_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def row_json(row: object) -> bytes:
    """The event of a decoded record, as JSON.

    Raises:
        RefusedError: JSON can't represent a value of the record, or `row` is no record.
    """
    if not isinstance(row, dict):
        raise RefusedError("wrong_type", "$", f"expected a record, found {_kind(row)}")
    try:
        return _encode(_event(_plain(row, "$")))
    except (OverflowError, ValueError, TypeError, RecursionError) as error:  # such as numbers that are too large
        raise RefusedError("malformed_frame", "$", f"expected a value that JSON has, found {error}") from error


def json_row(value: bytes) -> bytes:
    """The event of a row in JSON. Every field keeps its bytes.

    Raises:
        msgspec.DecodeError, RecursionError: `value` is no JSON object.
        RefusedError: see `row_json`.
    """
    row: dict[str, object] = dict(_object(value))
    features = bytes(row.get("features", b""))  # type: ignore[call-overload]  # msgspec.Raw
    if features[:1] == b'"':
        row["features"] = msgspec.json.decode(features, type=str)
    return _encode(_event(row))


def _event(row: dict[str, object]) -> dict[str, object]:
    """The row with its features in the field `features`."""
    if "features" not in row:
        features = {name: value for name, value in row.items() if name not in CONTRACT}
        return {name: value for name, value in row.items() if name in CONTRACT} | {"features": features}
    if isinstance(text := row["features"], str):
        try:
            row["features"] = _object(text)
        except (msgspec.DecodeError, RecursionError):
            message = f"expected a record, a map, or a string that holds a JSON object, found {text[:60]!r}"
            raise RefusedError("wrong_type", "$.features", message) from None
    return row


def _plain(value: Any, path: str) -> Any:
    """The value with types that JSON has."""
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is float:
        if math.isfinite(value):
            return value
        raise RefusedError("not_finite", path, f"expected a finite number, found {value}")
    if kind is dict:
        return {name: _plain(each, f"{path}.{name}") for name, each in value.items()}
    if kind is list:
        return [_plain(each, f"{path}[{index}]") for index, each in enumerate(value)]
    if kind is Decimal:
        return value
    if kind is datetime:
        return (value.replace(tzinfo=value.tzinfo or UTC) - _EPOCH) // _MILLISECOND
    if kind is date or kind is time:
        return value.isoformat()
    if kind is UUID:
        return str(value)
    raise RefusedError("wrong_type", path, f"expected a value that JSON has, found {_kind(value)}. Send a string or a number")


def _kind(value: object) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else f"a value of type {type(value).__name__}"
