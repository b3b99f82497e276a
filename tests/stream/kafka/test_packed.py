"""Batches written from packed parts: the bytes are those of aiokafka's own builder."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.default_records import DefaultRecordBatch
from hypothesis import given
from hypothesis import strategies as st

from stream.join.logic import CORRECTION, FIRST, Plan
from stream.kafka.batches import send_batches
from stream.kafka.packed import pack_headers, unpack_headers, varint
from stream.records.example import packed_plan, plan_records

SIZE = 2_000
HEADERS = st.lists(st.tuples(st.text(max_size=70), st.one_of(st.none(), st.binary(max_size=70))), max_size=3)
BYTES = st.one_of(st.none(), st.binary(max_size=20), st.integers(0, 2 * SIZE).map(lambda size: b"x" * size))
ROWS = st.lists(st.tuples(BYTES, BYTES, HEADERS), max_size=150)


class Producer(AIOKafkaProducer):
    """Keeps the batches; `ours` says whether `send_batches` may write them itself."""

    def __init__(self, *, transactional: bool, ours: bool) -> None:
        super().__init__(max_batch_size=SIZE, transactional_id="t" if transactional else None)
        self._message_accumulator._compression_type = int(not ours)
        self.sent: list[bytes] = []

    def create_batch(self) -> BatchBuilder:
        return BatchBuilder(SIZE, 0, is_transactional=int(self._txn_manager is not None))

    def __del__(self) -> None:
        """It was never started."""

    async def send_batch(self, batch: Any, topic: str, *, partition: int) -> asyncio.Future[None]:
        batch.close()
        assert batch.append(timestamp=0, key=b"", value=b"", headers=[]) is None
        batch._set_producer_state(7, 3, 40)
        size = batch.size()
        data = bytes(batch._build())
        assert size == batch.size() == len(data)
        self.sent.append(data)
        assert batch.record_count() == len(list(DefaultRecordBatch(data)))
        assert batch.closed()
        return asyncio.get_running_loop().create_future()


@given(ROWS, st.booleans(), st.booleans())
def test_the_bytes_are_those_of_aiokafka(rows, transactional, packed):
    async def check() -> None:
        theirs, ours = (Producer(transactional=transactional, ours=own) for own in (False, True))
        given_ = [(key, value, pack_headers(headers) if packed else headers) for key, value, headers in rows]
        for producer in (theirs, ours):
            await send_batches(producer, "t", 3, given_)
        assert len(ours.sent) == len(theirs.sent)
        for one, other in zip(ours.sent, theirs.sent, strict=True):
            # All but the time at which it was sent, and the checksum, which follows from it.
            assert (one[:17], one[21:27], one[43:]) == (other[:17], other[21:27], other[43:])
            assert DefaultRecordBatch(one).validate_crc()
            first_ms, last_ms = struct.unpack_from(">qq", one, 27)
            assert first_ms == last_ms
            assert abs(first_ms - struct.unpack_from(">q", other, 27)[0]) < 60_000

    asyncio.run(check())


EXAMPLES = st.lists(
    st.tuples(
        st.binary(min_size=1, max_size=5),
        st.binary(max_size=9),
        st.integers(0, 1 << 50),
        st.integers(0, 1 << 40),
        st.one_of(st.just(-1), st.integers(0, 1 << 50)),
        st.sampled_from([FIRST, CORRECTION]),
    ),
    max_size=9,
)


@given(EXAMPLES, st.lists(st.integers(0, 1 << 40), max_size=3), st.sampled_from([1.0, 0.25]))
def test_examples_have_the_same_headers_packed_or_not(examples, left_out, rate):
    plan = Plan(examples=examples, left_out=left_out, held={(5, 7): 9})
    packed = [(key, value, pack_headers(headers)) for key, value, headers in plan_records(plan, rate)]
    found = packed_plan(plan, rate)
    assert [(key, value, each if isinstance(each, bytes) else pack_headers(each)) for key, value, each in found] == packed


@given(HEADERS)
def test_packed_headers_can_be_read_again(headers):
    assert unpack_headers(pack_headers(headers)) == headers


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, b"\0"), (-1, b"\x01"), (1, b"\x02"), (63, b"\x7e"), (64, b"\x80\x01"), (1 << 20, b"\x80\x80\x80\x01")],
)
def test_numbers_are_packed_as_kafka_packs_them(number, expected):
    assert varint[number] == varint[number] == expected
