"""The envelopes that Kafka Connect's JsonConverter and Debezium put around an event, in JSON or in a decoded record.

| envelope | what it is | what is taken |
| --- | --- | --- |
| Connect | `{"schema": …, "payload": …}`: `schemas.enable=true`, the converter's default | `payload` |
| Debezium | `{"before": …, "after": …, "op": …, …}`, alone or as Connect's payload | `after`: the row after the change |

A value with an `impression_id` of its own is an event and no envelope, whatever other fields it has. So plain producers may
share a topic with a connector.
"""

from __future__ import annotations

import msgspec

from stream.formats.refused import RefusedError
from stream.formats.rows import json_row

__all__ = ["CONNECT", "DEBEZIUM", "envelope_of", "unwrapped", "unwrapped_row"]

CONNECT, DEBEZIUM = "c", "d"

_ABSENT = msgspec.Raw(b"")


class _Outer(msgspec.Struct):
    """The top-level fields by which an envelope and an event are told apart."""

    impression_id: msgspec.Raw = _ABSENT
    features: msgspec.Raw = _ABSENT
    schema: msgspec.Raw = _ABSENT
    payload: msgspec.Raw = _ABSENT
    before: msgspec.Raw = _ABSENT
    after: msgspec.Raw = _ABSENT
    op: msgspec.Raw = _ABSENT

    @property
    def kind(self) -> str:
        """`CONNECT`, `DEBEZIUM`, or "" for no envelope."""
        if bytes(self.impression_id):
            return ""
        if bytes(self.schema) and bytes(self.payload):
            return CONNECT
        return DEBEZIUM if bytes(self.op) and (bytes(self.after) or bytes(self.before)) else ""


_outer = msgspec.json.Decoder(_Outer).decode


def envelope_of(value: bytes) -> str:
    """The innermost envelope of a value: `CONNECT`, `DEBEZIUM`, or "" for none."""
    try:
        outer = _outer(value)
        if outer.kind != CONNECT:
            return outer.kind
        inner = bytes(outer.payload)
        return DEBEZIUM if inner.startswith(b"{") and _outer(inner).kind == DEBEZIUM else CONNECT
    except (msgspec.DecodeError, RecursionError):
        return ""


def unwrapped(value: bytes, form: str) -> bytes:
    """The bytes of the event in an envelope; `value` itself when it has no envelope of this form.

    A row without `features` is encoded again (`rows.py`).

    Raises:
        RefusedError: the envelope is empty: a delete, or a tombstone.
    """
    try:
        outer = _outer(value)
        kind, inner = outer.kind, value
        if kind == CONNECT:
            inner = bytes(outer.payload).strip()
            if inner == b"null":
                raise RefusedError("empty_value", "$.payload", "expected an event in Connect's envelope, found null")
            _require_object(inner, "$.payload", "Connect's envelope")
            outer = _outer(inner)
            kind = outer.kind
        if kind != DEBEZIUM:
            return _row(inner, outer) if inner is not value else value
        if form != DEBEZIUM:
            return value  # its dead letter names the envelope
        row = bytes(outer.after).strip()
        if row in (b"", b"null"):
            raise _no_row(msgspec.json.decode(bytes(outer.op)))
        _require_object(row, "$.after", "Debezium's envelope")
        return _row(row, _outer(row))
    except (msgspec.DecodeError, RecursionError):
        return value  # the check of the contract says what is wrong


def unwrapped_row(row: object, form: str) -> object:
    """The event in Debezium's envelope, for a record decoded from a frame. Connect never wraps frames.

    Raises:
        RefusedError: as `unwrapped`.
    """
    if form != DEBEZIUM or not isinstance(row, dict) or "impression_id" in row or "op" not in row:
        return row
    if "after" not in row and "before" not in row:
        return row
    if row.get("after") is None:  # Protobuf leaves out fields that aren't set
        raise _no_row(row["op"])
    return row["after"]


def _row(value: bytes, outer: _Outer) -> bytes:
    features = bytes(outer.features)
    if not value.startswith(b"{") or features[:1] == b"{":
        return value
    return json_row(value)


def _require_object(value: bytes, path: str, where: str) -> None:
    if not value.startswith(b"{"):
        found = "a string" if value.startswith(b'"') else "a list" if value.startswith(b"[") else "no object"
        do = "unwrap it in the connector (MongoDB's: ExtractNewDocumentState)" if path == "$.after" else "send the event itself"
        raise RefusedError("wrong_type", path, f"expected an object in {where}, found {found}: {do}")


def _no_row(op: object) -> RefusedError:
    what = " (a delete)" if op == "d" else ""
    return RefusedError("empty_value", "$.after", f"expected a row in Debezium's envelope, found op {op!r}{what} without one")
