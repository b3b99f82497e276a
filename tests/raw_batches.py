"""Record batches byte by byte, as clients other than aiokafka's may write them: header names of any bytes, every codec, bombs.

Shares no code with the parser in `stream/kafka/batch_reader.py`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import cramjam
from aiokafka import AIOKafkaProducer
from aiokafka.record.util import calc_crc32c

from deploy.settings import Settings
from stream.kafka.clients import aiokafka_options

__all__ = ["CODECS", "Codec", "RawRecord", "raw_batch", "raw_records", "send_raw_batch"]

Codec = Literal["none", "gzip", "snappy", "lz4", "zstd"]
CODECS: tuple[Codec, ...] = ("none", "gzip", "snappy", "lz4", "zstd")
RawRecord = tuple[bytes | None, bytes | None, Sequence[tuple[bytes, bytes | None]]]  # key, value, headers


def varint(number: int) -> bytes:
    zigzag = (number << 1) ^ (number >> 63)
    out = bytearray()
    while zigzag > 0x7F:
        out.append(zigzag & 0x7F | 0x80)
        zigzag >>= 7
    out.append(zigzag)
    return bytes(out)


def nullable(data: bytes | None) -> bytes:
    return varint(-1) if data is None else varint(len(data)) + data


def raw_records(records: Sequence[RawRecord]) -> bytes:
    """The part of a batch that a codec compresses."""
    out = bytearray()
    for delta, (key, value, headers) in enumerate(records):
        body = b"\0" + varint(0) + varint(delta) + nullable(key) + nullable(value) + varint(len(headers))
        body += b"".join(varint(len(name)) + name + nullable(content) for name, content in headers)
        out += varint(len(body)) + body
    return bytes(out)


def compressed(codec: Codec, data: bytes) -> bytes:
    if codec == "gzip":
        packer = zlib.compressobj(wbits=31)
        return packer.compress(data) + packer.flush()
    if codec == "snappy":  # as Java's clients frame it
        blocks = [bytes(cramjam.snappy.compress_raw(data[start : start + 32_768])) for start in range(0, len(data), 32_768)]
        return b"\x82SNAPPY\0" + struct.pack(">ii", 1, 1) + b"".join(struct.pack(">i", len(each)) + each for each in blocks)
    if codec == "lz4":
        packer = cramjam.lz4.Compressor(level=9, content_checksum=False, block_linked=False)
        packer.compress(data)
        return bytes(packer.finish())
    return bytes(cramjam.zstd.compress(data, level=3)) if codec == "zstd" else data


def raw_batch(records: bytes, count: int, codec: Codec = "none", *, base: int = 0, time_ms: int = 1) -> bytes:
    """A whole batch around `raw_records`, with its checksum."""
    attributes = CODECS.index(codec)
    checked = struct.pack(">hiqqqhii", attributes, count - 1, time_ms, time_ms, -1, -1, -1, count) + compressed(codec, records)
    counted = struct.pack(">ibI", -1, 2, calc_crc32c(checked)) + checked
    return struct.pack(">qi", base, len(counted)) + counted


async def send_raw_batch(settings: Settings, topic: str, partition: int, batch: bytes) -> None:
    """Send these bytes as they are."""
    options: dict[str, Any] = aiokafka_options(settings.kafka)
    async with AIOKafkaProducer(**options, acks="all", max_batch_size=1 << 30, max_request_size=1 << 30) as producer:
        builder = producer.create_batch()
        builder.append(timestamp=1, key=None, value=b"")
        builder.close()
        builder._buffer = bytearray(batch)
        await (await producer.send_batch(builder, topic, partition=partition))
