"""Protobuf: a function from a frame's payload to Python objects, by descriptors from the registry.

| field | value |
| --- | --- |
| without presence (proto3's plain scalars) and not on the wire | its default, as the producer's own getter gives |
| with presence (`optional`, messages, members of a `oneof`) and not on the wire | left out |
| `map` | an object; its keys are strings |
| enum | its name, or the number if it has no name |
| `google.protobuf.Timestamp` | milliseconds since 1970 |
| wrappers (`google.protobuf.StringValue`, …), `Struct`, `Value`, `ListValue` | the value that they hold |
| `bytes` | rejected by `rows.py` |
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from google.protobuf import (
    any_pb2,
    api_pb2,
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    empty_pb2,
    field_mask_pb2,
    message_factory,
    source_context_pb2,
    struct_pb2,
    timestamp_pb2,
    type_pb2,
    wrappers_pb2,
)
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from stream.formats.refused import RefusedError

__all__ = ["file_descriptor", "protobuf_decoder"]

# Each after the files that it imports.
_WELL_KNOWN = (
    any_pb2,
    source_context_pb2,
    descriptor_pb2,
    duration_pb2,
    empty_pb2,
    field_mask_pb2,
    struct_pb2,
    timestamp_pb2,
    wrappers_pb2,
    type_pb2,
    api_pb2,
)
_ROOT = "headrace-root.proto"
_MAX_INDEXES = 32  # how deep messages may be defined within one another


def file_descriptor(text: str) -> descriptor_pb2.FileDescriptorProto | None:
    """A schema as a descriptor; None when its text is something else, such as a `.proto` file."""
    try:
        found = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, DecodeError):
        return None
    return found if found.message_type or found.enum_type or found.dependency else None


def protobuf_decoder(text: str, references: Mapping[str, str]) -> Callable[[bytes], object]:
    """A decoder for a descriptor in base64.

    Args:
        references: import path → descriptor in base64 of the files that it imports, each after its own imports.

    Raises:
        RefusedError: a descriptor can't be used, or an import is missing.
    """
    pool = descriptor_pool.DescriptorPool()
    for module in _WELL_KNOWN:
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    try:
        for name, each in [*references.items(), (_ROOT, text)]:
            file = file_descriptor(each)
            if file is None:
                raise RefusedError(
                    "unusable_schema",
                    "$",
                    f"expected the Protobuf descriptor of {'the schema' if name == _ROOT else name} in base64, found "
                    f"{each[:40]!r}: the registry doesn't serve `format=serialized`",
                )
            file.name = name
            pool.Add(file)
        root = pool.FindFileByName(_ROOT)
    except (TypeError, KeyError) as error:
        raise RefusedError("unusable_schema", "$", f"expected a Protobuf schema with all it imports, found {error}") from error
    messages = list(root.message_types_by_name.values())

    def decode(payload: bytes) -> object:
        indexes, start = _indexes(payload)
        descriptor = _message(messages, indexes)
        message = message_factory.GetMessageClass(descriptor)()
        try:
            message.ParseFromString(payload[start:])
        except DecodeError as error:
            raise RefusedError("malformed_frame", "$", f"{descriptor.full_name}: {error}") from error
        return _values(message)

    return decode


def _message(messages: list[Descriptor], indexes: list[int]) -> Descriptor:
    """The message type that the indexes name. The first index is among the file's messages, each next one among nested ones."""
    found: Descriptor | None = None
    for index in indexes:
        if index >= len(messages):
            raise RefusedError("malformed_frame", "$", f"expected one of the schema's messages, found indexes {indexes}")
        found = messages[index]
        messages = list(found.nested_types)
    assert found is not None  # `_indexes` gives at least one
    return found


def _indexes(payload: bytes) -> tuple[list[int], int]:
    """The message's indexes, and their end in the payload. A count of 0 means the schema's first message."""
    numbers = _zigzag(payload)
    try:
        count, end = next(numbers)
        if not count:
            return [0], end
        if not 0 < count <= _MAX_INDEXES:
            raise RefusedError("malformed_frame", "$", f"expected at most {_MAX_INDEXES} message indexes, found {count}")
        found = [next(numbers) for _ in range(count)]
    except StopIteration:
        raise RefusedError("malformed_frame", "$", "expected the message's indexes, found the frame's end") from None
    if any(index < 0 for index, _ in found):
        raise RefusedError("malformed_frame", "$", f"expected message indexes, found {[index for index, _ in found]}")
    return [index for index, _ in found], found[-1][1]


def _zigzag(payload: bytes) -> Iterator[tuple[int, int]]:
    """The variable-length integers at the start of a payload, each with its end."""
    number = shift = 0
    for position, byte in enumerate(payload):
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield (number >> 1) ^ -(number & 1), position + 1
            number = shift = 0
        elif shift > 63:
            raise RefusedError("malformed_frame", "$", "expected the message's indexes, found a number beyond 64 bits")


def _values(message: Message) -> dict[str, object]:
    found: dict[str, object] = {}
    for field in message.DESCRIPTOR.fields:
        if field.is_repeated:
            found[field.name] = _many(getattr(message, field.name), field)
        elif not field.has_presence or message.HasField(field.name):
            found[field.name] = _one(getattr(message, field.name), field)
    return found


def _many(values: Any, field: FieldDescriptor) -> object:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        kind = field.message_type.fields_by_name["value"]
        return {_key(key): _one(values[key], kind) for key in values}
    return [_one(value, field) for value in values]


def _key(key: object) -> str:
    return str(key).lower() if isinstance(key, bool) else str(key)


def _one(value: Any, field: FieldDescriptor) -> object:
    if field.type == FieldDescriptor.TYPE_ENUM:
        if field.enum_type.full_name == "google.protobuf.NullValue":
            return None
        symbol = field.enum_type.values_by_number.get(value)
        return value if symbol is None else symbol.name
    if field.message_type is None:
        return value
    return _message_value(value)


# Messages around a value that may be missing (google/protobuf/wrappers.proto).
_WRAPPERS = {
    f"google.protobuf.{kind}Value"
    for kind in ("Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes")
}


def _message_value(message: Any) -> object:
    name = message.DESCRIPTOR.full_name
    if name == "google.protobuf.Timestamp":
        return message.seconds * 1_000 + message.nanos // 1_000_000
    if name == "google.protobuf.Struct":
        return {key: _message_value(message.fields[key]) for key in message.fields}
    if name == "google.protobuf.ListValue":
        return [_message_value(each) for each in message.values]
    if name == "google.protobuf.Value":
        kind = message.WhichOneof("kind")
        if kind in (None, "null_value"):
            return None
        held = getattr(message, kind)
        return _message_value(held) if kind in ("struct_value", "list_value") else held
    if name in _WRAPPERS:
        return message.value
    return _values(message)
