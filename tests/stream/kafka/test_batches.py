"""Whole batches: every record goes out once, in order, and every batch has a future to await."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.default_records import DefaultRecordBatch
from hypothesis import given
from hypothesis import strategies as st

from stream.kafka.batches import send_batches

SIZE = 2_000


class Producer:
    """Builds aiokafka's own batches, and keeps what it was given."""

    def __init__(self) -> None:
        self.sent: list[list[Any]] = []

    def create_batch(self) -> BatchBuilder:
        return BatchBuilder(SIZE, 0, is_transactional=1)

    async def send_batch(self, builder: BatchBuilder, topic: str, *, partition: int) -> asyncio.Future[int]:
        assert (topic, partition) == ("t", 3)
        builder.close()
        self.sent.append([(each.key, each.value, each.headers) for each in DefaultRecordBatch(bytes(builder._build()))])
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        future.set_result(len(self.sent))
        return future


BYTES = st.one_of(st.none(), st.binary(max_size=20), st.integers(0, 3 * SIZE).map(lambda size: b"x" * size))
ROWS = st.lists(
    st.tuples(BYTES, BYTES, st.lists(st.tuples(st.text(max_size=3), st.binary(max_size=5)), max_size=3)), max_size=12
)


@given(ROWS)
def test_every_record_goes_out_once_and_in_order(rows):
    async def check() -> None:
        producer = Producer()
        futures = await send_batches(producer, "t", 3, iter(rows))
        assert [await future for future in futures] == list(range(1, len(producer.sent) + 1))
        assert [record for batch in producer.sent for record in batch] == rows
        assert all(producer.sent)

    asyncio.run(check())


@pytest.mark.parametrize(("count", "size", "batches"), [(0, 0, 0), (1, 10 * SIZE, 1), (3, SIZE, 3), (3, SIZE // 5, 1)])
def test_a_record_larger_than_a_batch_travels_alone(count, size, batches):
    async def check() -> None:
        assert len(await send_batches(Producer(), "t", 3, [(b"k", b"v" * size, [])] * count)) == batches

    asyncio.run(check())
