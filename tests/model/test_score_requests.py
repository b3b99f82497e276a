"""Both paths of the decoder of score requests: the context's and the candidates' features, and requests that do not fit."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import features_reference as reference
from model.features import FeatureDecoder
from tests.model.made_features import (
    SCHEMA,
    finite,
    impression,
    rows_of,
)


def request(**parts: Any) -> bytes:
    return json.dumps({"request_id": "r", "candidates": [], **parts}).encode()


def test_a_candidates_feature_wins_over_the_contexts() -> None:
    context = {"user": "u", "price": 2, "dwell": 3, "tags": ["c"], "words": ["w"]}
    own = {"item": 5, "price": 9, "dwell": None, "tags": ["x", "y"], "words": None}
    payload = request(context=context, candidates=[{"id": "a", "features": own}, {"id": "b"}], deadline_ms=77)
    for payloads in ([payload], [payload] * 40):
        decoded = FeatureDecoder(SCHEMA).requests(payloads)
        assert not decoded.bad
        assert decoded.request_ids[0] == "r"
        assert decoded.candidate_ids[0] == ["a", "b"]
        assert decoded.deadlines_ms.tolist() == [77] * len(payloads)
        assert decoded.offsets.tolist() == list(range(0, 2 * len(payloads) + 1, 2))
        merged = {**context, "item": 5, "price": 9, "tags": ["x", "y"]}
        expected = FeatureDecoder(SCHEMA).impressions([impression(merged), impression(context)]).batch
        assert rows_of(decoded.batch)[:2] == rows_of(expected)
        assert rows_of(decoded.batch)[-2:] == rows_of(expected)


BAD_REQUESTS = [
    (b"", "malformed_json", "$"),
    (b'{"candidates":[]}', "missing_field", "$"),
    (b'{"request_id":"r"}', "missing_field", "$"),
    (request(request_id=7), "wrong_type", "$.request_id"),
    (request(candidates={}), "nested", "$.candidates"),
    (request(candidates=[None]), "wrong_type", "$.candidates[0]"),
    (request(candidates=[{"features": {}}]), "missing_field", "$.candidates[0]"),
    (request(candidates=[{"id": 5}]), "wrong_type", "$.candidates[0].id"),
    (request(candidates=[{"id": "a"}, {"id": "b", "features": []}]), "wrong_type", "$.candidates[1].features"),
    (request(candidates=[{"id": "a", "features": {"price": "x"}}]), "wrong_type", "$.candidates[0].features.price"),
    (request(candidates=[{"id": "a", "features": {"tags": [3]}}]), "wrong_type", "$.candidates[0].features.tags[0]"),
    (request(context=[]), "wrong_type", "$.context"),
    (request(context={"user": {}}), "nested", "$.context.user"),
    (request(context={"price": math.inf}), "not_finite", "$.context.price"),
    (request(deadline_ms="soon"), "wrong_type", "$.deadline_ms"),
    (request(deadline_ms=-1), "wrong_type", "$.deadline_ms"),
]


@pytest.mark.parametrize(("payload", "reason", "path"), BAD_REQUESTS)
def test_bad_requests(payload: bytes, reason: str, path: str) -> None:
    good = request(request_id="good", candidates=[{"id": "a", "features": {"user": 1}}], context={"item": "x"})
    for before, after in ((0, 0), (30, 7)):
        decoded = FeatureDecoder(SCHEMA).requests([good] * before + [payload] + [good] * after)
        (bad,) = decoded.bad
        assert (bad.index, bad.reason, bad.path) == (before, reason, path)
        assert decoded.rows.tolist() == [i for i in range(before + 1 + after) if i != before]
        assert len(decoded.batch) == decoded.offsets[-1] == before + after


requests = st.fixed_dictionaries(
    {
        "request_id": st.text(max_size=5),
        "candidates": st.lists(st.fixed_dictionaries({"id": st.text(max_size=3)}, optional={"features": finite}), max_size=4),
    },
    optional={"context": st.none() | finite, "deadline_ms": st.none() | st.integers(0, 2**50)},
)


@settings(max_examples=100, deadline=None)
@given(st.lists(requests, min_size=9, max_size=20))
def test_any_requests(records: list[Any]) -> None:
    payloads = [json.dumps(record).encode() for record in records]
    decoded = FeatureDecoder(SCHEMA).requests(payloads)
    expected = [reference.decode_request(payload, SCHEMA) for payload in payloads]
    assert not decoded.bad
    assert decoded.request_ids == [e.request_id for e in expected]
    assert decoded.candidate_ids == [e.candidate_ids for e in expected]
    assert decoded.deadlines_ms.tolist() == [e.deadline_ms for e in expected]
    rows = [reference.reference_row(values, SCHEMA, 0, served=True) for e in expected for values in e.candidates]
    assert rows_of(decoded.batch) == rows
