"""Avro: a function from a frame's payload to Python objects, for the schema that it was written with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import fastavro
import fastavro.read

from stream.formats.refused import RefusedError

__all__ = ["avro_decoder"]


def _in_ms(per_ms: int, number: int, writer: object = None, reader: object = None) -> int:
    return number // per_ms


# Logical types removed from the schema, so that the decoder gives the number as it was written: the contract has milliseconds.
_AS_WRITTEN = ("timestamp-millis", "local-timestamp-millis", "time-millis", "time-micros")

# Times in milliseconds, as in the contract. fastavro makes datetimes of micros, which end in the year 9999, and knows no nanos.
for _kind, _per_ms in (("micros", 1_000), ("nanos", 1_000_000)):
    for _prefix in ("", "local-"):
        fastavro.read.LOGICAL_READERS[f"long-{_prefix}timestamp-{_kind}"] = partial(_in_ms, _per_ms)


def avro_decoder(text: str, references: Mapping[str, str]) -> Callable[[bytes], object]:
    """A decoder for the writer's schema.

    Args:
        references: name → text of the schemas that it refers to, each after the schemas that it refers to itself.

    Raises:
        RefusedError: the schema can't be read, or contains itself, or contains an array whose items take no bytes. No event
            needs such a schema, and a record of a few bytes could stop a worker with it.
    """
    named: dict[str, Any] = {}
    known: dict[str, bool] = {}
    try:
        for each in references.values():
            fastavro.parse_schema(_checked(json.loads(each), "", (), known), named_schemas=named)
        schema = fastavro.parse_schema(_checked(json.loads(text), "", (), known), named_schemas=named)
    except RefusedError:
        raise
    except Exception as error:  # json and fastavro raise many types for a text that is no schema
        raise RefusedError("unusable_schema", "$", f"expected an Avro schema, found {_short(error)}") from error

    def decode(payload: bytes) -> object:
        stream = io.BytesIO(payload)
        try:
            record = fastavro.schemaless_reader(stream, schema, None)
        except Exception as error:  # fastavro raises EOFError, IndexError, OverflowError, …
            raise RefusedError("malformed_frame", "$", f"{_short(error)}, at byte {stream.tell()} of {len(payload)}") from error
        if stream.tell() != len(payload):
            raise RefusedError("malformed_frame", "$", f"{len(payload) - stream.tell()} bytes left after the record's end")
        return record

    return decode


def _checked(schema: object, space: str, inside: tuple[str, ...], known: dict[str, bool]) -> Any:
    """The schema without the logical types whose numbers are given as written.

    Args:
        space: the namespace of names that have none of their own.
        inside: full names of the types that contain this one.
        known: for the types read before, full name → whether a value takes no bytes.
    """
    if isinstance(schema, str):
        if schema in inside or f"{space}.{schema}" in inside:
            raise RefusedError("unusable_schema", "$", f"expected an event, found that {schema} contains itself")
        return schema
    if isinstance(schema, list):
        return [_checked(each, space, inside, known) for each in schema]
    if not isinstance(schema, dict):
        raise TypeError(f"a schema is a name, a list or an object, and not {schema!r}")
    schema = dict(schema)
    if schema.get("logicalType") in _AS_WRITTEN:
        del schema["logicalType"]
    kind = schema.get("type")
    if kind in ("record", "error", "enum", "fixed"):
        name = str(schema.get("name", ""))
        space = str(schema.get("namespace", space)) if "." not in name else name.rpartition(".")[0]
        full = f"{space}.{name.rpartition('.')[2]}" if space else name
        fields = [
            {**field, "type": _checked(field["type"], space, (*inside, full), known)} for field in schema.get("fields", ())
        ]
        if kind in ("record", "error"):
            schema["fields"] = fields
        known[full] = (kind == "fixed" and not schema.get("size")) or (
            kind in ("record", "error") and all(_empty(field["type"], space, known) for field in fields)
        )
    elif kind == "array":
        schema["items"] = _checked(schema["items"], space, inside, known)
        if _empty(schema["items"], space, known):
            raise RefusedError("unusable_schema", "$", "expected an event, found an array of items that take no bytes")
    elif kind == "map":
        schema["values"] = _checked(schema["values"], space, inside, known)
    elif isinstance(kind, dict | list):
        schema["type"] = _checked(kind, space, inside, known)
    elif isinstance(kind, str):
        _checked(kind, space, inside, known)
    return schema


def _empty(schema: object, space: str, known: Mapping[str, bool]) -> bool:
    """Whether a value of this type takes no bytes."""
    if isinstance(schema, str):
        return schema == "null" or known.get(schema, known.get(f"{space}.{schema}", False))
    if isinstance(schema, dict):
        name = schema.get("name")
        if name is not None and schema.get("type") in ("record", "error", "fixed"):
            own = schema.get("namespace", space)
            return known.get(name if "." in name or not own else f"{own}.{name}", False)
        return _empty(schema.get("type"), space, known)
    return False


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}" if str(error) else type(error).__name__
