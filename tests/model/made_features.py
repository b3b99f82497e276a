"""A schema with a field of every kind, payloads for it, and the keys that a row must have, computed value by value."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from model.batch import FeatureBatch
from model.features_reference import ReferenceRow
from model.schema import FeatureSchema, FieldSpec

__all__ = [
    "SCHEMA",
    "finite",
    "impression",
    "leaves",
    "numbers",
    "raw",
    "rows_of",
    "values",
]


SCHEMA = FeatureSchema(
    fields=(
        FieldSpec(name="user"),
        FieldSpec(name="tags", kind="list"),
        FieldSpec(name="item", space="user"),
        FieldSpec(name="price", kind="numeric"),
        FieldSpec(name="age", kind="numeric", buckets="linear", width=5),
        FieldSpec(name="dwell", kind="numeric", buckets="scaled"),
        FieldSpec(name="words", kind="list", space="tags"),
    )
)


def impression(features: Any, **envelope: Any) -> bytes:
    return json.dumps({"impression_id": "i", "timestamp": 1, "features": features, **envelope}).encode()


def raw(features: str, rest: str = "") -> bytes:
    return f'{{"impression_id":"i","timestamp":1,"features":{features}{rest}}}'.encode()


def rows_of(batch: FeatureBatch) -> list[ReferenceRow]:
    rows = []
    for row in range(len(batch)):
        bounds = batch.list_offsets[row * batch.lists : (row + 1) * batch.lists + 1]
        lists = [batch.list_keys[a:b].tolist() for a, b in pairwise(bounds)]
        assert batch.scales is not None
        rows.append(ReferenceRow(batch.keys[row].tolist(), batch.scales[row].tolist(), lists))
    return rows


numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0, 3.0, 2.0**53])
leaves = st.none() | st.booleans() | numbers | st.text(max_size=12)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
finite = st.fixed_dictionaries(
    {},
    optional={
        "user": st.none() | st.text(max_size=20) | st.integers(-(2**63), 2**63 - 1),
        "item": st.integers(0, 5),
        "tags": st.none() | st.lists(st.text(max_size=5), max_size=4),
        "words": st.lists(st.sampled_from(["a", "b"]), max_size=3),
        "price": st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**30), 10**30),
        "age": st.floats(-1e3, 1e3),
        "dwell": st.floats(-1e3, 1e3) | st.integers(-5, 5),
    },
)
