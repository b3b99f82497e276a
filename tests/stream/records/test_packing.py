"""Numbers and headers are packed as Kafka packs them."""

from __future__ import annotations

import pytest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from hypothesis import given
from hypothesis import strategies as st

from stream.records.packing import batch_bytes, pack_headers, unpack_headers, varint

HEADERS = st.lists(st.tuples(st.text(max_size=70), st.one_of(st.none(), st.binary(max_size=70))), max_size=3)
BYTES = st.one_of(st.none(), st.binary(max_size=20), st.integers(0, 20_000).map(bytes))


@given(HEADERS)
def test_packed_headers_can_be_read_again(headers):
    assert unpack_headers(pack_headers(headers)) == headers


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, b"\0"), (-1, b"\x01"), (1, b"\x02"), (63, b"\x7e"), (64, b"\x80\x01"), (1 << 20, b"\x80\x80\x80\x01")],
)
def test_numbers_are_packed_as_kafka_packs_them(number, expected):
    assert varint[number] == varint[number] == expected


@given(BYTES, BYTES, HEADERS)
def test_the_size_of_a_batch_is_estimated_as_aiokafka_does(key, value, headers):
    assert batch_bytes(key, value, headers) == DefaultRecordBatchBuilder.estimate_size_in_bytes(key, value, headers)
