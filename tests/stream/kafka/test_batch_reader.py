"""Batches as any client writes them are read, and what can't be read costs one record and never the partition."""

from __future__ import annotations

import asyncio
import inspect
import struct
import tracemalloc
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBase, DefaultRecordBatch
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from deploy.settings import Settings
from stream.kafka import batch_reader, fetched
from stream.kafka.batch_reader import _Batches, read_batch
from stream.kafka.clients import aiokafka_options
from stream.records.unreadable import UNREADABLE_HEADER
from stream.topics.names import TopicNames
from tests.raw_batches import CODECS, RawRecord, compressed, raw_batch, raw_records, send_raw_batch

batch_reader.install()

BYTES = st.none() | st.binary(max_size=20)
UTF8 = st.text(max_size=4).map(lambda text: text.encode(errors="replace"))
RECORDS = st.lists(st.tuples(BYTES, BYTES, st.lists(st.tuples(UTF8, BYTES), max_size=3)), min_size=1, max_size=6)
GOOD: list[RawRecord] = [(b"k%d" % index, b"v" * index, [(b"h", b"%d" % index)]) for index in range(5)]
ODD: RawRecord = (b"odd", b"v", [(b"caf\xe9", b"1"), (b"ok", None)])


def batches(data: bytes) -> list[Any]:
    """Every record that a consumer would be handed."""
    read, found = _Batches(data), []
    while read.has_next():
        found += list(read.next_batch())
    return found


def rows(records: list[Any]) -> list[tuple[Any, ...]]:
    return [
        (each.offset, each.timestamp, each.timestamp_type, each.key, each.value, list(each.headers), each.checksum)
        for each in records
    ]


@given(RECORDS, st.sampled_from(CODECS), st.integers(0, 1 << 40))
def test_both_parsers_read_the_same(records, codec, base):
    data = raw_batch(raw_records(records), len(records), codec, base=base, time_ms=1_700_000_000_000)
    assert rows(list(read_batch(data))) == rows(list(DefaultRecordBatch(data))) == rows(batches(data))


@pytest.mark.parametrize("codec", CODECS)
def test_a_header_name_of_any_bytes_is_escaped(codec):
    data = raw_batch(raw_records([*GOOD, ODD, *GOOD]), 11, codec)
    with pytest.raises(UnicodeDecodeError):  # what aiokafka alone does, for ever
        list(DefaultRecordBatch(data))
    found = batches(data)
    assert [record.key for record in found] == [b"k0", b"k1", b"k2", b"k3", b"k4", b"odd", b"k0", b"k1", b"k2", b"k3", b"k4"]
    assert found[5].headers == [("caf\\xe9", b"1"), ("ok", None)]


def test_a_batch_of_very_many_records_becomes_one_record_that_says_so(monkeypatch):
    monkeypatch.setattr(batch_reader, "MAX_RECORDS", 5)
    assert len(batches(raw_batch(raw_records(GOOD), 5, "zstd"))) == 5
    [record] = batches(raw_batch(raw_records([*GOOD, ODD]), 6, "zstd"))
    assert record.headers == [(UNREADABLE_HEADER, b"offsets 0 to 5 can't be read: the batch holds 6 records, more than 5")]


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "none"])
def test_a_bomb_becomes_one_record_that_says_so(codec, monkeypatch):
    monkeypatch.setattr(batch_reader, "MAX_EXPANDED_BYTES", 1 << 20)
    fits = raw_batch(raw_records([(b"k", b"x" * 900_000, ())]), 1, codec)
    bomb = raw_batch(raw_records([(b"k", b"x" * 200_000, ())] * 300), 300, codec, base=1)
    data = fits + bomb + raw_batch(raw_records(GOOD), 5, codec, base=301)
    tracemalloc.start()
    found = batches(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20  # the bomb holds 60 MB
    assert [record.offset for record in found] == [0, 1, 301, 302, 303, 304, 305]
    assert (found[1].key, found[1].value) == (None, None)
    [(name, why)] = found[1].headers
    assert name == UNREADABLE_HEADER
    assert why == b"offsets 1 to 300 can't be read: the batch expands to more than 1,048,576 bytes"


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "none"])
def test_what_is_no_compressed_data_becomes_one_record(codec):
    body = raw_records(GOOD)
    whole = raw_batch(body, 5, codec)
    for cut in (0, 1, 7, 17, 20, len(compressed(codec, body)) // 2):
        broken = bytearray(whole[: 61 + cut])
        struct.pack_into(">i", broken, 8, len(broken) - 12)
        [record] = batches(bytes(broken) + b"")
        assert record.offset == 0
        assert record.headers[0][1].startswith(b"offsets 0 to 4 can't be read: ")


def test_records_before_a_broken_one_are_read():
    body = raw_records(GOOD)
    for cut in range(len(body)):
        data = raw_batch(body[:cut], 5)
        *read, last = batches(data)
        assert rows(read) == rows(batches(raw_batch(body, 5)))[: len(read)]
        assert (last.offset, last.headers[0][0]) == (len(read), UNREADABLE_HEADER)
    assert rows(batches(raw_batch(body + b"more", 5))) == rows(batches(raw_batch(body, 5)))


@given(st.binary(max_size=60), st.integers(1, 5))
def test_any_bytes_are_read_without_an_error(body, count):
    found = batches(raw_batch(body, count))
    assert all(record.offset >= 0 for record in found)


def test_compressed_batches_are_expanded_a_few_at_a_time(monkeypatch):
    """Sixteen batches of 1 MB that expand to 60 MB each may lie in one fetch."""
    monkeypatch.setattr(fetched, "TAKE_MAX_BYTES", 250)
    body = raw_records([(b"k", b"v" * 99, ())])
    for codec, expected in (("zstd", [3, 3, 2, 0]), ("none", [8, 0])):
        data = b"".join(raw_batch(body, 1, codec, base=base) for base in range(8))
        records = fetched._PartitionRecords(TopicPartition("t", 0), _Batches(data), [], 0, None, None, True, 1)
        taken = []
        while not records.exhausted:
            before = records.next_fetch_offset
            taken.append(len(records.take(20_000)))
            assert records.next_fetch_offset == before + taken[-1]
        assert [count for count in taken if count] == [count for count in expected if count]
        assert records.next_fetch_offset == 8


def test_aiokafka_is_as_this_module_takes_it_to_be():
    assert DefaultRecordBase.HEADER_STRUCT.format == batch_reader._HEADER.format
    source = inspect.getsource(fetcher)
    assert source.count("MemoryRecords(part_data[-1])") == 1
    assert source.count("for record in next_batch:") == 1
    assert fetcher.MemoryRecords is _Batches
    for name in ("size_in_bytes", "has_next", "next_batch"):
        assert hasattr(MemoryRecords, name)
    used = ("producer_id", "is_transactional", "base_offset", "next_offset", "validate_crc", "is_control_batch")
    batch = _Batches(raw_batch(raw_records(GOOD), 5)).next_batch()
    assert all(f"next_batch.{name}" in source and hasattr(batch, name) for name in used)
    assert all(hasattr(DefaultRecordBatch, name) for name in (*used, "last_offset_delta"))


def test_a_wrong_checksum_stays_an_error():
    data = bytearray(raw_batch(raw_records(GOOD), 5))
    data[-1] ^= 1
    assert not _Batches(bytes(data)).next_batch().validate_crc()
    tp = TopicPartition("t", 0)
    with pytest.raises(CorruptRecordException):
        list(fetcher.PartitionRecords(tp, _Batches(bytes(data)), [], 0, None, None, True, fetcher.READ_COMMITTED))


async def read_all(settings: Settings, topic: str, until: int) -> list[Any]:
    tp = TopicPartition(topic, 0)
    options = aiokafka_options(settings.kafka)
    async with AIOKafkaConsumer(**options, isolation_level="read_committed", auto_offset_reset="none") as consumer:
        consumer.assign([tp])
        consumer.seek(tp, 0)
        records: list[Any] = []
        async with asyncio.timeout(30):
            while await consumer.position(tp) < until:
                records += (await consumer.getmany(tp, timeout_ms=200)).get(tp, [])
        return records


@pytest.mark.kafka
def test_a_consumer_reads_them_all_from_kafka(topics):
    """Every codec, names of any bytes, and a bomb of 200 MB that the broker takes as 20 kB of zstd."""
    names = TopicNames.of(topics.topics)
    bomb = raw_batch(raw_records([(b"k", b"x" * (100 << 20), ())] * 2), 2, "zstd")

    async def check() -> None:
        for codec in CODECS:
            await send_raw_batch(topics, names.clicks, 0, raw_batch(raw_records([*GOOD, ODD]), 6, codec))
        await send_raw_batch(topics, names.clicks, 0, bomb)
        await send_raw_batch(topics, names.clicks, 0, raw_batch(raw_records(GOOD), 5))
        records = await read_all(topics, names.clicks, 37)
        assert [record.offset for record in records] == [*range(31), *range(32, 37)]
        assert [record.headers for record in records[5:30:6]] == [(("caf\\xe9", b"1"), ("ok", None))] * 5
        assert records[30].headers[0][0] == UNREADABLE_HEADER
        assert b"offsets 30 to 31" in records[30].headers[0][1]

    asyncio.run(check())
