"""Records of a fetch, a batch at a time: the same as aiokafka's one at a time, over any log and however they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from aiokafka.consumer import fetcher
from aiokafka.consumer.fetcher import READ_COMMITTED, READ_UNCOMMITTED, PartitionRecords
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from stream.kafka import fetched
from stream.kafka.fetched import LogRecord, _PartitionRecords

ORIGINAL = PartitionRecords if PartitionRecords.__module__ == "aiokafka.consumer.fetcher" else PartitionRecords.__mro__[1]
COMMIT, ABORT = b"\x00\x00\x00\x01", b"\x00\x00\x00\x00"
TP = TopicPartition("t", 3)


@dataclass
class Batch:
    """What lies in the log: records (key, value, headers), or the marker that ends a transaction."""

    producer: int  # -1: no transaction
    records: list[tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]]
    codec: int = 0
    marker: bytes | None = None


def packed(batches: list[Batch]) -> tuple[bytes, int]:
    """The bytes of a fetch, and the offset after them."""
    data, offset = bytearray(), 0
    for batch in batches:
        builder = DefaultRecordBatchBuilder(2, batch.codec, int(batch.producer >= 0), batch.producer, 0, 0, 1 << 20)
        records = [(batch.marker, b"", [])] if batch.marker is not None else batch.records
        for index, (key, value, headers) in enumerate(records):
            assert builder.append(index, 1_000 + index, key, value, headers) is not None
        one = builder.build()
        one[0:8] = offset.to_bytes(8, "big")
        if batch.marker is not None:
            one[22] |= 0x20  # a control batch; the checksum that no longer fits isn't looked at here
        offset += len(records)
        data += one
    return bytes(data), offset


NAMED = st.lists(st.tuples(st.text(max_size=3), st.one_of(st.none(), st.binary(max_size=3))), max_size=2)
RECORDS = st.lists(
    st.tuples(st.one_of(st.none(), st.binary(max_size=4)), st.one_of(st.none(), st.binary(max_size=9)), NAMED),
    min_size=1,
    max_size=6,
)
BATCHES = st.lists(
    st.one_of(
        st.builds(Batch, st.sampled_from([-1, 1, 2]), RECORDS, codec=st.sampled_from([0, 0, 1])),
        st.builds(Batch, st.sampled_from([1, 2]), st.just([]), marker=st.sampled_from([COMMIT, ABORT])),
    ),
    max_size=8,
)


def aborted_in(batches: list[Batch]) -> list[tuple[int, int]]:
    """Producer and first offset of the transactions that were aborted, as a broker lists them."""
    found, begun, offset = [], {}, 0
    for batch in batches:
        if batch.marker is not None:
            first = begun.pop(batch.producer, None)
            if first is not None and batch.marker == ABORT:
                found.append((batch.producer, first))
        elif batch.producer >= 0:
            begun.setdefault(batch.producer, offset)
        offset += len(batch.records) if batch.marker is None else 1
    return found


def reader(kind: Any, batches: list[Batch], start: int, isolation: int, *, check_crcs: bool = False) -> Any:
    data, _ = packed(batches)
    return kind(TP, MemoryRecords(data), aborted_in(batches), start, None, None, check_crcs, isolation)


def seen(record: Any) -> tuple[Any, ...]:
    return tuple(getattr(record, name) for name in LogRecord._fields)


@given(
    BATCHES, st.integers(0, 12), st.sampled_from([READ_COMMITTED, READ_UNCOMMITTED]), st.lists(st.integers(1, 7), max_size=9)
)
def test_records_and_positions_are_those_of_aiokafka(batches, start, isolation, asked):
    theirs, ours = (reader(kind, batches, start, isolation) for kind in (ORIGINAL, _PartitionRecords))
    one_by_one = theirs._records_iterator
    for most in asked:
        expected = []
        for record in one_by_one:
            expected.append(seen(record))
            if len(expected) == most:
                break
        taken = ours.take(most)
        assert [seen(record) for record in taken] == expected
        if len(taken) == most and ours._left:  # aiokafka moves over what follows a batch with its next record only
            assert ours.next_fetch_offset == theirs.next_fetch_offset
    assert [seen(record) for record in ours] == [seen(record) for record in one_by_one]
    assert ours.next_fetch_offset == theirs.next_fetch_offset
    assert ours.take(None) == []


def test_a_damaged_batch_is_an_error():
    whole = [Batch(-1, [(b"k", b"v" * 50, [])])]
    assert len(reader(_PartitionRecords, whole, 0, READ_COMMITTED, check_crcs=True).take(None)) == 1
    data, _ = packed(whole)
    damaged = MemoryRecords(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(CorruptRecordException, match="CRC"):
        _PartitionRecords(TP, damaged, [], 0, None, None, True, READ_COMMITTED).take(None)


def test_every_consumer_of_the_process_reads_so_once_installed():
    fetched.install()
    assert fetcher.PartitionRecords is _PartitionRecords
    assert issubclass(fetcher.FetchResult, fetched.FetchResult)
