from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.hashing import EMPTY_KEY, hash_bytes, hash_integers, missing_key, number_key, space_seed
from model.hashing import hash_strings as hash_with_seeds


def hash_strings(column: pa.Array, space: str) -> np.ndarray:
    return hash_with_seeds(column, np.full(len(column), space_seed(space), np.uint64))


# Keys of the first release. If one of them changed, no existing snapshot could be used.
PINNED = [
    ("user_id", "42", -3588195399113345596),
    ("user_id", "", -6809865027788342485),
    ("user_id", "12345678", 3294361221100254446),
    ("user_id", "123456789", 150870467732513869),
    ("tag", "Köln 🎬", -8388665123665329966),
    ("tag", "x" * 300, -1812365863777510514),
]


@pytest.mark.parametrize(("space", "value", "key"), PINNED)
def test_keys_never_change(space: str, value: str, key: int) -> None:
    assert hash_bytes(value.encode(), space) == key
    assert hash_strings(pa.array([value]), space).tolist() == [key]


def test_number_and_missing_keys_never_change() -> None:
    assert number_key(0, "price") == -7355905336943617778
    assert number_key(-7, "price") == 4619923102059003446
    assert missing_key("price") == -1590634142465374524


@given(st.lists(st.text(max_size=40) | st.text(min_size=200, max_size=300)), st.text(min_size=1, max_size=20))
def test_columns_agree_with_the_reference(values: list[str], space: str) -> None:
    column = pa.array(values, pa.string())
    assert hash_strings(column, space).tolist() == [hash_bytes(value.encode(), space) for value in values]


@given(st.lists(st.text(max_size=20), min_size=3))
def test_a_sliced_column_agrees(values: list[str]) -> None:
    column = pa.array(values, pa.string())[1:-1]
    assert hash_strings(column, "s").tolist() == [hash_bytes(value.encode(), "s") for value in values[1:-1]]


@given(st.lists(st.integers(-(2**63), 2**63 - 1)), st.text(min_size=1))
def test_numbers_agree_with_the_reference(numbers: list[int], space: str) -> None:
    assert hash_integers(np.array(numbers, np.int64), space).tolist() == [number_key(n, space) for n in numbers]


def test_spaces_kinds_and_trailing_zero_bytes_are_apart() -> None:
    keys = [hash_bytes(b"a", "s"), hash_bytes(b"a", "t"), hash_bytes(b"a\0", "s"), hash_bytes(b"", "s")]
    keys += [missing_key("s"), number_key(97, "s"), hash_bytes((97).to_bytes(8, "little"), "s")]
    assert len(set(keys)) == len(keys)


def test_a_million_keys_differ_and_spread() -> None:
    keys = hash_strings(pa.array([str(i) for i in range(1_000_000)]), "user_id")
    assert len(np.unique(keys)) == len(keys)
    assert EMPTY_KEY not in keys
    counts = np.bincount(keys & 1023, minlength=1024)
    assert counts.max() < 1.2 * counts.mean()


def test_empty_column() -> None:
    assert hash_strings(pa.array([], pa.string()), "s").dtype == np.int64


def test_each_value_has_its_own_seed() -> None:
    seeds = np.array([space_seed("s"), space_seed("t"), space_seed("t")], np.uint64)
    values = ["a", "a", "x" * 400]
    expected = [hash_bytes(v.encode(), s) for v, s in zip(values, "stt", strict=True)]
    assert hash_with_seeds(pa.array(values), seeds).tolist() == expected
