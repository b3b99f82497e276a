"""Recognises values and keys that don't fit the contract, for the texts of their dead letters."""

from __future__ import annotations

import msgspec

from stream.formats.envelopes import CONNECT, DEBEZIUM, envelope_of
from stream.formats.frames import schema_id
from stream.formats.refused import Refused

__all__ = ["about_enveloped", "about_key", "about_unread", "about_wrapped_string"]

_SHOWN = 60
_KNOWN_STARTS = (
    (b"\xef\xbb\xbf", "a byte order mark before the JSON: write UTF-8 without it"),
    (b"\x1f\x8b", "gzip: let the producer compress its batches (compression.type) and send plain JSON"),
    (b"\x28\xb5\x2f\xfd", "zstd: let the producer compress its batches (compression.type) and send plain JSON"),
    (b"Obj\x01", "an Avro file with its schema: send JSON, or frames of a Schema Registry serializer"),
    (b"\xff\xfe", "UTF-16: write UTF-8"),
    (b"\xfe\xff", "UTF-16: write UTF-8"),
)


def about_unread(value: bytes) -> Refused | None:
    """The verdict on a value that was not opened and whose first bytes can't be JSON; None for other values."""
    number = schema_id(value)
    if number is not None:
        message = (
            f"a Schema Registry frame with schema id {number}: set schema_registry.url, or use a plain JSON serializer "
            "(docs/producers.md)"
        )
        return Refused("framed", "$", f"expected a JSON object, found {message}")
    if len(value) >= 18 and value[0] == 3 and value[1] in (0, 5):
        return Refused(
            "framed",
            "$",
            "expected a JSON object, found a frame of AWS Glue's registry, which isn't supported: use a plain JSON serializer",
        )
    for start, what in _KNOWN_STARTS:
        if value.startswith(start):
            utf8 = value.isascii() or start == b"\xef\xbb\xbf"
            return Refused("malformed_json" if utf8 else "bad_utf8", "$", f"expected a JSON object, found {what}")
    return None


def about_enveloped(value: bytes) -> Refused | None:
    """The verdict on a JSON object without the contract's fields: which envelope it is; None when it is none."""
    kind = envelope_of(value)
    if kind == CONNECT:
        return Refused(
            "enveloped",
            "$",
            'expected an event, found Kafka Connect\'s envelope (schema, payload) around one: set join.envelope = "connect", '
            "or schemas.enable=false in the connector's JsonConverter",
        )
    if kind == DEBEZIUM:
        return Refused(
            "enveloped",
            "$",
            'expected an event, found Debezium\'s envelope (before, after, op) around a row: set join.envelope = "debezium", '
            "or let the connector unwrap it (ExtractNewRecordState)",
        )
    return None


def about_wrapped_string(value: bytes) -> str:
    """The end of a text about a value that is no object: empty, unless it is a JSON string that holds JSON."""
    try:
        text = msgspec.json.decode(value, type=str).lstrip()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    if text[:1] in ("{", "[", '"'):
        return ": a JSON string that holds JSON. The event was encoded twice; send the object itself"
    return ""


def about_key(key: bytes | None, impression_id: str) -> str:
    """For a key that isn't the event's id: what it is, and what to do about it."""
    if key is None:
        return "no key: send the id as the key too, so that both topics choose the same partition for it"
    number = schema_id(key)
    if number is not None:
        return (
            f"a Schema Registry frame with schema id {number} as the key: use a plain string serializer for keys. The schema's "
            "id differs between the topics, so framed keys of one id lie in different partitions"
        )
    shown = repr(key[:_SHOWN])
    if key.startswith(b'"'):
        try:
            if msgspec.json.decode(key, type=str) == impression_id:
                return f"{shown}: the id as a JSON string. Use a plain string serializer for keys"
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass
    if key.startswith(b"{"):
        return f"{shown}: a JSON object. Send the id alone (Kafka Connect: ExtractField$Key and a StringConverter for keys)"
    return shown
