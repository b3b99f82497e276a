"""A score request: a record on `score-requests`. Key: the request's id. Value: JSON, which docs/events.md describes.

`model.requests` and `model.features` decode the features. This module reads what it can of a request that can't be scored.
"""

from __future__ import annotations

import contextlib

import msgspec

from stream.records.record import Record

__all__ = ["deadline_ms", "request_id"]

_UNREADABLE = (UnicodeDecodeError, msgspec.DecodeError, RecursionError)


class _Id(msgspec.Struct):
    request_id: str


class _Deadline(msgspec.Struct):
    deadline_ms: int | None = None


_decode_id = msgspec.json.Decoder(_Id).decode
_decode_deadline = msgspec.json.Decoder(_Deadline).decode


def request_id(record: Record) -> str | None:
    """The id to answer under: the record's key, else the id in the value; None when neither can be read."""
    if record.key:
        with contextlib.suppress(UnicodeDecodeError):
            return record.key.decode()
    try:
        return _decode_id(record.value or b"").request_id or None
    except _UNREADABLE:
        return None


def deadline_ms(record: Record) -> int | None:
    """The time after which the sender does not wait for the answer any more; None when it is absent or can't be read."""
    try:
        return _decode_deadline(record.value or b"").deadline_ms
    except _UNREADABLE:
        return None
