"""Writes record batches of Kafka's format 2 in Python, from parts that are packed already.

aiokafka's compiled builder packs every header of every record, and computes checksums in software: 2.7 µs a labelled example.
All examples of a step have the same headers except for a few numbers. So here the equal headers are packed once
(`pack_headers`), a record is one `bytes.join`, and `crc32c` computes the checksum with the processor's own instruction: 1.0 µs.
The bytes are the same; `tests/stream/kafka/test_packed.py` compares them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from aiokafka.producer.message_accumulator import BatchBuilder
from crc32c import crc32c

__all__ = ["EMPTY_BATCH_BYTES", "PackedBatch", "pack_header", "pack_headers", "pack_record", "unpack_headers", "varint"]

# base offset, length, leader epoch, format, checksum
_BEFORE = struct.Struct(">qiibI")
# attributes, last offset, first and last timestamp, producer id, epoch, first sequence number, records
_CHECKED = struct.Struct(">hiqqqhii")
EMPTY_BATCH_BYTES = _BEFORE.size + _CHECKED.size
_FORMAT, _TRANSACTIONAL = 2, 0x10
_NO_OFFSET_LENGTH = 12  # bytes that the length field doesn't count: the base offset and the field itself
# The largest number whose packed form is kept: enough for offsets in a batch and for lengths of usual values.
_KEPT = 1 << 14


class _Varints(dict[int, bytes]):
    """Numbers as Kafka packs them: zigzag, then seven bits a byte, the lowest bits first."""

    def __missing__(self, number: int) -> bytes:
        rest, packed = (number << 1) ^ (number >> 63), bytearray()
        while rest >= 0x80:
            packed.append(rest & 0x7F | 0x80)
            rest >>= 7
        packed.append(rest)
        if number <= _KEPT:
            self[number] = bytes(packed)
        return bytes(packed)


varint = _Varints()


def pack_header(name: str, value: bytes | None) -> bytes:
    """Pack one header. `pack_headers` adds the number of headers."""
    key = name.encode()
    return varint[len(key)] + key + (varint[-1] if value is None else varint[len(value)] + value)


def pack_headers(headers: Sequence[tuple[str, bytes | None]]) -> bytes:
    """Pack the last part of a record: the number of headers, and the headers."""
    return varint[len(headers)] + b"".join([pack_header(name, value) for name, value in headers])


def unpack_headers(packed: bytes) -> list[tuple[str, bytes | None]]:
    """Reverse `pack_headers`."""
    position = 0

    def number() -> int:
        nonlocal position
        found = shift = 0
        while True:
            byte = packed[position]
            position += 1
            found |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return (found >> 1) ^ -(found & 1)

    def part(size: int) -> bytes:
        nonlocal position
        position += size
        return packed[position - size : position]

    headers: list[tuple[str, bytes | None]] = []
    for _ in range(number()):
        name = part(number()).decode()
        size = number()
        headers.append((name, None if size < 0 else part(size)))
    return headers


def pack_record(index: int, key: bytes | None, value: bytes | None, headers: bytes) -> bytes:
    """Pack a record without its length: attributes and time difference of 0, its index in the batch, key, value, headers."""
    if key is None or value is None:
        return b"".join(
            (
                b"\0\0",
                varint[index],
                varint[-1] if key is None else varint[len(key)] + key,
                varint[-1] if value is None else varint[len(value)] + value,
                headers,
            )
        )
    return b"".join((b"\0\0", varint[index], varint[len(key)], key, varint[len(value)], value, headers))


class PackedBatch(BatchBuilder):
    """A full batch of packed records, in the form of a builder that aiokafka would have filled.

    Args:
        parts: the records in order, each one after its length.
        count: the number of records.
        timestamp_ms: the timestamp of all of them (ms since epoch).
    """

    _buffer: bytes | None

    def __init__(self, parts: list[bytes], count: int, timestamp_ms: int, *, transactional: bool) -> None:
        super().__init__(0, 0, is_transactional=int(transactional))
        self._body = b"".join(parts)
        self._relative_offset = count
        self._timestamp_ms, self._transactional = timestamp_ms, transactional
        self._producer: tuple[int, int, int] = (-1, -1, 0)
        self.close()

    def append(self, **record: Any) -> None:
        """Returns None, which means that the batch is full."""

    def _set_producer_state(self, producer_id: int, producer_epoch: int, base_sequence: int) -> None:
        self._producer = (producer_id, producer_epoch, base_sequence)

    def _build(self) -> bytes:
        if self._buffer is None:
            attributes, count, at = _TRANSACTIONAL * self._transactional, self._relative_offset, self._timestamp_ms
            checked = _CHECKED.pack(attributes, count - 1, at, at, *self._producer, count)
            length = EMPTY_BATCH_BYTES + len(self._body) - _NO_OFFSET_LENGTH
            before = _BEFORE.pack(0, length, -1, _FORMAT, crc32c(self._body, crc32c(checked)))
            self._buffer = before + checked + self._body
            self._body = b""
        return self._buffer

    def size(self) -> int:
        return len(self._buffer) if self._buffer is not None else EMPTY_BATCH_BYTES + len(self._body)
