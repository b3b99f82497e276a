"""murmur2 of many keys at once is Kafka's murmur2 of each."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from kafka.partitioner import murmur2 as murmur2_of_one

from deploy.feeding.partitions import murmur2, partitions_of


def test_values_of_kafkas_own_unit_test() -> None:
    expected = {
        b"21": -973932308,
        b"foobar": -790332482,
        b"a-little-bit-long-string": -985981536,
        b"a-little-bit-longer-string": -1486304829,
        b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
        b"abc": 479470107,
    }
    assert dict(zip(expected, murmur2(list(expected)).view("int32").tolist(), strict=True)) == expected


@given(st.lists(st.binary(max_size=40)), st.integers(1, 50))
def test_every_key_gets_what_the_plain_loop_gives(keys: list[bytes], partitions: int) -> None:
    assert murmur2(keys).tolist() == [murmur2_of_one(key) for key in keys]
    assert partitions_of(keys, partitions).tolist() == [(murmur2_of_one(key) & 0x7FFFFFFF) % partitions for key in keys]
