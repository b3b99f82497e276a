"""Confluent's frame, which Schema Registry serializers put around a payload.

| bytes | what |
| --- | --- |
| 1 | zero |
| 4 | the schema's id, big-endian |
| … | Protobuf only: the message of the schema, as a list of indexes in zigzag variable-length integers |
| the rest | the payload: JSON, Avro's binary encoding, or Protobuf's |

JSON never begins with a zero byte, so a value is never both a frame and JSON.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["HEADER_BYTES", "schema_id", "schema_ids"]

HEADER_BYTES = 5


def schema_id(value: bytes | None) -> int | None:
    """The id of the schema in a frame; None when the value is no frame."""
    if not value or value[0] or len(value) < HEADER_BYTES:
        return None
    return int.from_bytes(value[1:HEADER_BYTES])


def schema_ids(values: Iterable[bytes | None]) -> set[int]:
    """The ids of all frames among these values. Without frames it takes some 30 ns a value."""
    frames = {value[1:HEADER_BYTES] for value in values if value and not value[0] and len(value) >= HEADER_BYTES}
    return {int.from_bytes(each) for each in frames}
