"""Which negatives go out is in the id alone, and what goes out says so."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.join.logic import CORRECTION, FIRST, Plan
from stream.join.sampling import Sampling
from stream.records.example import plan_records, record_count


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
    (CORRECTION, 9): {"label": b"1", "weight": b"1", "kind": b"correction", **PLACE, "click_ms": b"9"},
}


@pytest.mark.parametrize(("kind", "click_ms"), BY_KIND)
def test_headers_of_each_kind(kind, click_ms):
    plan = Plan(examples=[(b"i", b"{}", 5, 7, click_ms, kind)])
    for rate, more in ((1.0, {}), (0.1, {"rate": b"0.1"})):
        [(key, value, headers)] = plan_records(plan, rate)
        assert (key, value) == (b"i", b"{}")
        assert dict(headers) == {**BY_KIND[kind, click_ms], **more}
        assert len(headers) == len(dict(headers))


def test_bookkeeping_comes_first_and_in_records_that_the_topic_takes():
    large = 1 << 60
    plan = Plan(
        examples=[(b"i", b"{}", 5, 7, 9, CORRECTION)],
        left_out=list(range(large, large + 4_500)),
        held={(large - offset, large + offset): large for offset in range(2_500)},
    )
    *named, (_, _, headers) = plan_records(plan, 0.1)
    assert record_count(plan) == len(named) + 1
    assert dict(headers)["kind"] == b"correction"
    assert all(key is None and len(value) < 60_000 for key, value, _ in named)
    offsets: list[int] = []
    matched: list[list[int]] = []
    for _, value, headers in named:
        assert value is not None
        if dict(headers) == {"kind": b"matched"}:
            matched += json.loads(value)
        else:
            assert dict(headers) == {"kind": b"left_out", "rate": b"0.1"}
            offsets += json.loads(value)
    assert offsets == plan.left_out
    assert matched == [[offset, time_ms, click_ms] for (time_ms, offset), click_ms in plan.held.items()]
