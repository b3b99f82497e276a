"""Which negatives go out is in the id alone, and what goes out says so."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.join.examples import plan_records, record_count
from stream.join.logic import CORRECTION, FAKE, FIRST, Plan
from stream.join.sampling import Sampling


@given(st.binary(min_size=1, max_size=40), st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_what_a_lower_rate_keeps_a_higher_one_keeps_too(key, one, other):
    low, high = sorted((one, other))
    assert Sampling(high).keeps(key) or not Sampling(low).keeps(key)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.999, 1.0])
def test_the_share_kept_is_the_rate(rate):
    """Ids that count up are the hardest for a hash."""
    sampling = Sampling(rate)
    kept = sum(sampling.keeps(b"impression-%d" % index) for index in range(50_000))
    assert kept == pytest.approx(50_000 * rate, abs=4 * (50_000 * rate * (1 - rate)) ** 0.5 + 1e-9)


def test_the_hash_never_changes():
    """Else a replay, or another worker, would keep others. BLAKE2b of b"a" and b"b" are 0.2538 and 0.5174 of 2 ** 64."""
    assert [Sampling(rate).keeps(b"a") for rate in (0.2537, 0.2539)] == [False, True]
    assert [Sampling(rate).keeps(b"b") for rate in (0.5173, 0.5175)] == [False, True]


PLACE = {"impression_ms": b"5", "source_offset": b"7"}
BY_KIND = {
    (FIRST, -1): {"label": b"0", "weight": b"1", "kind": b"first", **PLACE},
    (FIRST, 9): {"label": b"1", "weight": b"1", "kind": b"first", **PLACE, "click_ms": b"9"},
    (FAKE, -1): {"label": b"0", "weight": b"1", "kind": b"first", "policy": b"fnw", **PLACE},
    (CORRECTION, 9): {"label": b"1", "weight": b"1", "kind": b"correction", "policy": b"fnw", **PLACE, "click_ms": b"9"},
}


@pytest.mark.parametrize(("kind", "click_ms"), BY_KIND)
def test_headers_of_each_kind(kind, click_ms):
    plan = Plan(examples=[(b"i", b"{}", 5, 7, click_ms, kind)])
    for rate, more in ((1.0, {}), (0.1, {"rate": b"0.1"})):
        [(key, value, headers)] = plan_records(plan, rate)
        assert (key, value) == (b"i", b"{}")
        assert dict(headers) == {**BY_KIND[kind, click_ms], **more}
        assert len(headers) == len(dict(headers))


def test_what_is_left_out_comes_first_and_in_records_that_the_topic_takes():
    large = 1 << 60
    plan = Plan(
        examples=[(b"i", b"{}", 5, 7, 9, CORRECTION)],
        left_out=list(range(large, large + 4_500)),
        left_out_fake=[7],
    )
    *named, (_, _, headers) = plan_records(plan, 0.1)
    assert record_count(plan) == len(named) + 1
    assert dict(headers)["kind"] == b"correction"
    assert all(key is None and len(value) < 60_000 for key, value, _ in named)
    offsets = {}
    for _, value, headers in named:
        assert dict(headers)["kind"] == b"left_out"
        assert dict(headers)["rate"] == b"0.1"
        offsets.setdefault(dict(headers).get("policy"), []).extend(json.loads(value))
    assert offsets == {None: plan.left_out, b"fnw": plan.left_out_fake}
