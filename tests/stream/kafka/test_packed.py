"""Batches written from packed parts: the bytes are those of aiokafka's own builder."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.default_records import DefaultRecordBatch
from hypothesis import given
from hypothesis import strategies as st

from stream.kafka.batches import send_batches
from stream.records.packing import pack_headers

SIZE = 2_000
BYTES = st.one_of(st.none(), st.binary(max_size=20), st.integers(0, 2 * SIZE).map(lambda size: b"x" * size))


def rows(names: st.SearchStrategy[str]) -> st.SearchStrategy[list[Any]]:
    headers = st.lists(st.tuples(names, st.one_of(st.none(), st.binary(max_size=70))), max_size=3)
    return st.lists(st.tuples(BYTES, BYTES, headers), max_size=150)


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


async def sent_by_both(records: list[Any], *, transactional: bool, packed: bool) -> tuple[Producer, Producer]:
    """aiokafka's batches and ours."""
    theirs, ours = (Producer(transactional=transactional, ours=own) for own in (False, True))
    given_ = [(key, value, pack_headers(headers) if packed else headers) for key, value, headers in records]
    for producer in (theirs, ours):
        await send_batches(producer, "t", 3, given_)
    return theirs, ours


@given(rows(st.text(max_size=70)), st.booleans())
def test_the_records_are_those_of_aiokafka(records, packed):
    """Whatever the names of headers: aiokafka takes one that isn't ASCII for longer than it is, and begins a batch sooner."""

    async def check() -> None:
        theirs, ours = (
            [(record.key, record.value, list(record.headers)) for data in producer.sent for record in DefaultRecordBatch(data)]
            for producer in await sent_by_both(records, transactional=False, packed=packed)
        )
        assert ours == theirs

    asyncio.run(check())


@given(rows(st.text(st.characters(codec="ascii"), max_size=70)), st.booleans(), st.booleans())
def test_the_bytes_are_those_of_aiokafka(records, transactional, packed):
    async def check() -> None:
        theirs, ours = await sent_by_both(records, transactional=transactional, packed=packed)
        assert len(ours.sent) == len(theirs.sent)
        for one, other in zip(ours.sent, theirs.sent, strict=True):
            # All but the time at which it was sent, and the checksum, which follows from it.
            assert (one[:17], one[21:27], one[43:]) == (other[:17], other[21:27], other[43:])
            assert DefaultRecordBatch(one).validate_crc()
            first_ms, last_ms = struct.unpack_from(">qq", one, 27)
            assert first_ms == last_ms
            assert abs(first_ms - struct.unpack_from(">q", other, 27)[0]) < 60_000

    asyncio.run(check())
