"""The text of a dead letter about one field of an event: what the contract expects, what was found, and what to do."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import msgspec

from stream.records.times import unit_of, wrong_unit

__all__ = ["about_field"]

_SHOWN = 60
_WHOLE = re.compile(r"-?[0-9]{1,40}")
_ABSENT = msgspec.Raw(b"")
_TIME = "expected milliseconds since 1970 as an integer"


class _Fields(msgspec.Struct):
    impression_id: msgspec.Raw = _ABSENT
    timestamp: msgspec.Raw = _ABSENT


_fields = msgspec.json.Decoder(_Fields).decode


def about_field(value: bytes, path: str, arrival_ms: int) -> str:
    """The text about a field of a wrong type or out of range; empty for other fields.

    Args:
        value: the event, as valid JSON.
        path: of the field, like `$.timestamp`.
        arrival_ms: when the record arrived. Its event time should be near.
    """
    try:
        fields = _fields(value)
    except (msgspec.DecodeError, RecursionError):
        return ""
    if path == "$.timestamp":
        return _about_time(bytes(fields.timestamp), arrival_ms)
    if path == "$.impression_id":
        found = bytes(fields.impression_id)
        if found == b'""':
            return "expected an id, found an empty string"
        return f"expected a string, found {_shown(found)}{_quoted(found)}"
    return ""


def _about_time(found: bytes, arrival_ms: int) -> str:
    text, shown = found.decode(), _shown(found)
    if text.startswith('"'):
        return f"{_TIME}, found the string {shown}{_in_a_string(msgspec.json.decode(found, type=str), arrival_ms)}"
    if text in ("null", "true", "false") or text[:1] in ("{", "["):
        return f"{_TIME}, found {shown}"
    try:
        number = float(text)
        whole = int(text) if _WHOLE.fullmatch(text) else int(number)
    except (ValueError, OverflowError):
        return f"{_TIME}, found {shown}"
    if text.lstrip("-").isdigit():
        return f"{_TIME}, found {shown}{wrong_unit(whole, arrival_ms)}"
    unit = unit_of(whole, arrival_ms)
    if unit == "seconds":
        return f"{_TIME}, found {shown}: seconds with a fraction. Multiply by 1,000 and round"
    return f"{_TIME}, found {shown}: {'milliseconds' if unit == 'milliseconds' else 'a number'} with a fraction. Round it"


def _in_a_string(text: str, arrival_ms: int) -> str:
    """The end of the text about a time in a string."""
    if _WHOLE.fullmatch(text):
        return f": a number in quotes{wrong_unit(int(text), arrival_ms)}. Send it without them"
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return ""
    if moment.tzinfo is None:
        return ": a time in ISO 8601 without a zone. Send milliseconds since 1970 UTC"
    try:
        return f": a time in ISO 8601. Send {round(moment.astimezone(UTC).timestamp() * 1_000)}"
    except (OverflowError, ValueError):
        return ": a time in ISO 8601. Send milliseconds since 1970 UTC"


def _quoted(found: bytes) -> str:
    return ". Put the id in quotes, and send the same digits as the key" if found[:1].isdigit() else ""


def _shown(found: bytes) -> str:
    text = found.decode()
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
