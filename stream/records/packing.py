"""Keys, values and headers as Kafka's record format 2 stores them. Pure: no client is needed.

All examples of a step have the same headers but for a few numbers. So `stream.records.example` packs the common headers once,
and `stream.kafka.batches` joins packed parts to whole batches. tests/stream/kafka/test_packed.py compares the bytes with
aiokafka's.
"""

from __future__ import annotations

from collections.abc import Sequence

from stream.records.record import Header

__all__ = ["EMPTY_BATCH_BYTES", "batch_bytes", "pack_header", "pack_headers", "pack_record", "unpack_headers", "varint"]

# The fields of a batch before its first record.
EMPTY_BATCH_BYTES = 61
# The most that a record takes besides key, value and headers: its length (5 bytes), attributes (1), time difference (10) and
# offset difference (5).
_RECORD_OVERHEAD = 21
# The largest number whose packed form is remembered: it covers offsets in a batch and the lengths of usual values.
_REMEMBERED = 1 << 14


class _Varints(dict[int, bytes]):
    """Numbers as Kafka packs them: zigzag, then seven bits a byte, the lowest first."""

    def __missing__(self, number: int) -> bytes:
        rest, packed = (number << 1) ^ (number >> 63), bytearray()
        while rest >= 0x80:
            packed.append(rest & 0x7F | 0x80)
            rest >>= 7
        packed.append(rest)
        if number <= _REMEMBERED:
            self[number] = bytes(packed)
        return bytes(packed)


varint = _Varints()


def pack_header(name: str, value: bytes | None) -> bytes:
    """One header, as `pack_headers` packs each."""
    key = name.encode()
    return varint[len(key)] + key + (varint[-1] if value is None else varint[len(value)] + value)


def pack_headers(headers: Sequence[Header]) -> bytes:
    """The last part of a record: the number of headers, then each header."""
    return varint[len(headers)] + b"".join([pack_header(name, value) for name, value in headers])


def unpack_headers(packed: bytes) -> list[Header]:
    """The headers that `pack_headers` was given."""
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

    headers: list[Header] = []
    for _ in range(number()):
        name = part(number()).decode()
        size = number()
        headers.append((name, None if size < 0 else part(size)))
    return headers


def pack_record(index: int, key: bytes | None, value: bytes | None, headers: bytes) -> bytes:
    """A record without its length: attributes and time difference (both 0), its index in the batch, key, value, headers."""
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


def batch_bytes(key: bytes | None, value: bytes | None, headers: Sequence[Header]) -> int:
    """The most that a batch with this record alone takes. A topic's `max.message.bytes` limits the size of a batch."""
    size = EMPTY_BATCH_BYTES + _RECORD_OVERHEAD + _size(key) + _size(value) + len(varint[len(headers)])
    return size + sum(_size(name.encode()) + _size(content) for name, content in headers)


def _size(content: bytes | None) -> int:
    return 1 if content is None else len(varint[len(content)]) + len(content)
