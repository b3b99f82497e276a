"""Columns to JSON: what comes out is what a JSON encoder would write, row by row."""

from __future__ import annotations

import json
import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.datasets.encode import concat, members, objects, tokens
from deploy.errors import DataSetError


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1, None, -3]), ["1", "null", "-3"]),
        (pa.array([2**63 + 1], pa.uint64()), ["9223372036854775809"]),
        (pa.array([True, False, None]), ["1", "0", "null"]),
        (pa.array([1.0, 0.5, None, math.nan, math.inf, -0.25]), ["1", "0.5", "null", "null", "null", "-0.25"]),
        (pa.array(['a"\\', "é\n", None, ""]), ['"a\\"\\\\"', '"é\\n"', "null", '""']),
        (pa.array(["x", "y", "x"]).dictionary_encode(), ['"x"', '"y"', '"x"']),
        (pa.array([["a", "b"], [], None]), ['["a","b"]', "[]", "null"]),
        (pa.nulls(2), ["null", "null"]),
        (pa.chunked_array([[1], [2, 3]]), ["1", "2", "3"]),
    ],
)
def test_tokens(column: Any, expected: list[str]) -> None:
    assert tokens(column).to_pylist() == expected


def test_a_column_that_no_feature_can_hold_is_refused() -> None:
    with pytest.raises(DataSetError, match=r"column of type date32.*: expected integers, floats, strings or lists"):
        tokens(pa.array([1], pa.date32()))


@given(
    st.lists(
        st.tuples(st.integers(-(2**62), 2**62), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)),
        min_size=1,
    )
)
def test_objects_read_back_as_the_rows(rows: list[tuple[int, float, str]]) -> None:
    whole, real, text = (list(column) for column in zip(*rows, strict=True))
    left = members({"n": pa.array(whole), 'odd "name"': pa.array(real)})
    right = members({"s": pa.array(text, pa.string())})
    expected = [{"n": n, 'odd "name"': x, "s": s} for n, x, s in rows]
    assert [json.loads(encoded) for encoded in objects(left, right)] == expected
    assert objects(concat(left, right)) == objects(left, right)
