"""Reads fetched batches so that none can stop a partition: header names may have any bytes, and expanded batches have a limit.

aiokafka 0.14.0 has two weaknesses here:

- It raises where a header's name isn't UTF-8 (Kafka allows any bytes), and its consumer then fetches the same batch for ever.
- It expands a compressed batch whole, however large: a megabyte of zstd can hold ten gigabytes.

`install` puts this module between aiokafka's consumer and its parser. aiokafka's compiled parser still reads the batches. Only
a batch that the compiled parser can't read is read again here, in Python:

- In a header's name that isn't UTF-8, the invalid bytes are escaped (`\\xff`).
- Records that can't be read at all are replaced by one record without key and value, at the offset of the first missing record.
  That record says which offsets are missing and why (`stream.records.unreadable`).

A batch with a wrong checksum stays an error: its bytes were damaged after the broker had checked them.
"""

from __future__ import annotations

import contextlib
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import cramjam
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException, UnsupportedCodecError
from aiokafka.record import default_records
from aiokafka.record.default_records import DefaultRecord, DefaultRecordBatch
from aiokafka.record.memory_records import MemoryRecords
from crc32c import crc32c

from stream.records.unreadable import unreadable_headers

__all__ = ["MAX_EXPANDED_BYTES", "BatchTooLarge", "install", "read_batch"]

# Limit for one expanded batch: 64 times Kafka's default limit for a batch (1 MiB). Text compresses 3 to 10 times, the most
# repetitive events some 30 times. A worker holds a few batches at once, so this also limits its memory.
MAX_EXPANDED_BYTES = 64 << 20
# Limit for the records of one batch, which become objects at once: some 200 bytes each on top of their content. This many of
# the smallest events (60 bytes) are a batch of 30 MB.
MAX_RECORDS = 500_000

_CHECKED_FROM = 21  # the checksum covers the bytes from here on
_LENGTH = struct.Struct(">i")  # at byte 8: length of the batch without its first 12 bytes
_HEADER = struct.Struct(">qiibIhiqqqhii")  # equal to `DefaultRecordBase.HEADER_STRUCT`
_NONE, _GZIP, _SNAPPY, _LZ4, _ZSTD = range(5)
_CODEC_MASK, _LOG_APPEND_TIME = 0x07, 0x08
_XERIAL = b"\x82SNAPPY\x00"
# What either parser raises for bytes that aren't a batch. struct.error is raised for a block that is cut off.
_UNREADABLE = (
    CorruptRecordException,
    UnsupportedCodecError,
    ValueError,
    IndexError,
    RuntimeError,
    struct.error,
    cramjam.DecompressionError,
)


Expand = Callable[[bytes | memoryview], bytes]


class BatchTooLarge(ValueError):
    """A batch holds more than `MAX_EXPANDED_BYTES`, or more than `MAX_RECORDS`."""


def install() -> None:
    """Make every consumer of this process read batches this way. Safe to repeat; called where client options are built."""
    fetcher.MemoryRecords = _Batches
    compiled = sys.modules[DefaultRecordBatch.__module__]  # this is `default_records` where aiokafka has no compiled parser
    for codec, expand in _EXPAND.items():
        setattr(compiled, f"{codec}_decode", expand)
        setattr(default_records, f"{codec}_decode", expand)


class _Batches:
    """Replaces aiokafka's MemoryRecords: the batches of one fetch, each of which can be read a second time."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position, self._batches = data, 0, MemoryRecords(data)

    def size_in_bytes(self) -> int:
        return self._batches.size_in_bytes()

    def has_next(self) -> bool:
        return self._batches.has_next()

    def next_batch(self) -> DefaultRecordBatch | _Batch | None:
        batch, start = self._batches.next_batch(), self._position
        if batch is None:
            return None
        self._position = start + 12 + _LENGTH.unpack_from(self._data, start + 8)[0]
        if batch.is_control_batch or not hasattr(batch, "last_offset_delta"):
            return batch  # a transaction's marker, or a batch of Kafka before 0.11
        return _Batch(batch, memoryview(self._data)[start : self._position])


class _Batch:
    """One batch of records, read by aiokafka, or by `read_batch` where aiokafka fails."""

    is_control_batch = False
    expanded_bytes = 0
    """Bytes of the records of a compressed batch; set once the batch has been read."""

    def __init__(self, batch: DefaultRecordBatch, data: memoryview) -> None:
        self._batch, self._data = batch, data
        self.producer_id, self.is_transactional = batch.producer_id, batch.is_transactional
        self.base_offset, self.next_offset = batch.base_offset, batch.next_offset

    def validate_crc(self) -> bool:
        """Checked with the processor's own instruction: a tenth of the 0.7 ms a megabyte that aiokafka's check takes."""
        return bool(crc32c(self._data[_CHECKED_FROM:]) == self._batch.crc)

    def __iter__(self) -> Iterator[DefaultRecord | _ReadRecord]:
        records = self._records()
        if _HEADER.unpack_from(self._data)[5] & _CODEC_MASK:
            self.expanded_bytes = sum(len(record.value or b"") + len(record.key or b"") for record in records)
        return iter(records)

    def _records(self) -> list[DefaultRecord | _ReadRecord]:
        if _HEADER.unpack_from(self._data)[12] <= MAX_RECORDS:
            with contextlib.suppress(*_UNREADABLE):
                return list(self._batch)
        return list(read_batch(self._data))


def read_batch(data: bytes | memoryview) -> Iterator[_ReadRecord]:
    """The records of a batch (format 2) as aiokafka returns them. One record replaces all that can't be read."""
    base, _, _, _, _, attributes, last, first_ms, max_ms, _, _, _, count = _HEADER.unpack_from(data)
    appended = bool(attributes & _LOG_APPEND_TIME)
    next_offset = base
    try:
        if count > MAX_RECORDS:
            raise BatchTooLarge(f"the batch holds {count:,} records, more than {MAX_RECORDS:,}")
        body = _expanded(attributes & _CODEC_MASK, bytes(memoryview(data)[_HEADER.size :]))
        position = 0
        for _ in range(count):
            delta_ms, delta, key, value, headers, position = _record(body, position)
            yield _ReadRecord(base + delta, max_ms if appended else first_ms + delta_ms, int(appended), key, value, headers)
            next_offset = base + delta + 1
        if position != len(body):
            raise CorruptRecordException(f"{len(body) - position} bytes after the last record")
    except _UNREADABLE as error:
        if next_offset > base + last:
            return  # every record is there
        missing = f"offsets {next_offset} to {base + last}" if next_offset < base + last else f"offset {next_offset}"
        why = f"{missing} can't be read: {error}"
        yield _ReadRecord(next_offset, max_ms, int(appended), None, None, unreadable_headers(why))


class _ReadRecord(SimpleNamespace):
    """A record with the attributes of aiokafka's DefaultRecord."""

    checksum = None

    def __init__(
        self,
        offset: int,
        timestamp: int,
        timestamp_type: int,
        key: bytes | None,
        value: bytes | None,
        headers: list[tuple[str, bytes | None]],
    ) -> None:
        super().__init__(
            offset=offset, timestamp=timestamp, timestamp_type=timestamp_type, key=key, value=value, headers=headers
        )


def _record(body: bytes, position: int) -> tuple[int, int, bytes | None, bytes | None, list[tuple[str, bytes | None]], int]:
    """Read one record: its time and offset relative to the batch's, key, value, headers, and the position after the record."""
    size, position = _varint(body, position)
    end = position + size
    if size < 0 or end > len(body):
        raise CorruptRecordException(f"a record of {size} bytes at {position} of {len(body)}")
    delta_ms, position = _varint(body, position + 1)  # after the attributes, a byte that has no meaning yet
    delta, position = _varint(body, position)
    key, position = _bytes(body, position)
    value, position = _bytes(body, position)
    count, position = _varint(body, position)
    headers: list[tuple[str, bytes | None]] = []
    for _ in range(count):
        name, position = _bytes(body, position)
        content, position = _bytes(body, position)
        headers.append(((name or b"").decode(errors="backslashreplace"), content))
    if position != end:
        raise CorruptRecordException(f"a record of {size} bytes that ends {position - end} bytes elsewhere")
    return delta_ms, delta, key, value, headers, position


def _varint(body: bytes, position: int) -> tuple[int, int]:
    """Read a number: zigzag, seven bits a byte, the lowest first. Returns the number and the position after it."""
    number = shift = 0
    while shift < 64:
        byte = body[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (number >> 1) ^ -(number & 1), position
        shift += 7
    raise CorruptRecordException(f"a number of more than 64 bits before {position}")


def _bytes(body: bytes, position: int) -> tuple[bytes | None, int]:
    size, position = _varint(body, position)
    if size < 0:
        return None, position
    if position + size > len(body):
        raise CorruptRecordException(f"{size} bytes at {position} of {len(body)}")
    return body[position : position + size], position + size


def _expanded(codec: int, payload: bytes) -> bytes:
    if codec == _NONE:
        return payload
    names = {_GZIP: "gzip", _SNAPPY: "snappy", _LZ4: "lz4", _ZSTD: "zstd"}
    if codec not in names:
        raise UnsupportedCodecError(f"compression codec {codec}")
    return _EXPAND[names[codec]](payload)


def _too_large() -> BatchTooLarge:
    return BatchTooLarge(f"the batch expands to more than {MAX_EXPANDED_BYTES:,} bytes")


def _gzip(payload: bytes | memoryview) -> bytes:
    left, parts, room = bytes(payload), list[bytes](), MAX_EXPANDED_BYTES
    while left:  # gzip data may have several members
        member = zlib.decompressobj(wbits=31)
        try:
            parts.append(member.decompress(left, room + 1))
        except zlib.error as error:
            raise CorruptRecordException(f"gzip: {error}") from error
        room -= len(parts[-1])
        if room < 0:
            raise _too_large()
        if not member.eof:
            raise CorruptRecordException("gzip: cut off")
        left = member.unused_data
    return b"".join(parts)


def _snappy(payload: bytes | memoryview) -> bytes:
    """Raw snappy, or xerial's framing, which Java's clients write: 16 bytes, then the size of each block and the block."""
    data, blocks, room = bytes(payload), list[bytes](), MAX_EXPANDED_BYTES
    if data.startswith(_XERIAL):
        position = 16
        while position < len(data):
            (size,) = struct.unpack_from(">i", data, position)
            if not 0 < size <= len(data) - position - 4:
                raise CorruptRecordException(f"snappy: a block of {size} bytes at {position} of {len(data)}")
            blocks.append(data[position + 4 : position + 4 + size])
            position += 4 + size
    else:
        blocks.append(data)
    for block in blocks:
        room -= cramjam.snappy.decompress_raw_len(block)
        if room < 0:
            raise _too_large()
    return b"".join(bytes(cramjam.snappy.decompress_raw(block)) for block in blocks)


def _into(decompress_into: Callable[..., int]) -> Expand:
    def expand(payload: bytes | memoryview) -> bytes:
        import numpy as np  # here, since it takes a third of the time in which a command starts that needs nothing else of it

        # This reserves address space only. Pages that a small batch doesn't touch cost nothing.
        out = np.empty(MAX_EXPANDED_BYTES, np.uint8)
        try:
            size = decompress_into(bytes(payload), out)
        except cramjam.DecompressionError as error:
            if "whole buffer" in str(error):  # cramjam's message when the buffer is too small
                raise _too_large() from error
            raise CorruptRecordException(str(error)) from error
        return out[:size].tobytes()

    return expand


_EXPAND: dict[str, Expand] = {
    "gzip": _gzip,
    "snappy": _snappy,
    "lz4": _into(cramjam.lz4.decompress_into),
    "zstd": _into(cramjam.zstd.decompress_into),
}
