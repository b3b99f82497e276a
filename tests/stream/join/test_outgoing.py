"""All that a step writes to `examples` for itself, in records that the topic takes."""

from __future__ import annotations

import json

from state.held_click import HeldClick
from stream.join.outgoing import record_count
from stream.join.plan import Plan
from stream.records.example import CORRECTION, Example
from tests.stream.join.written import written


def test_bookkeeping_comes_first_and_in_records_that_the_topic_takes():
    large = 1 << 60
    plan = Plan(
        examples=[Example(b"i", b"{}", 5, 7, 9, CORRECTION)],
        left_out=list(range(large, large + 4_500)),
        held={(large - offset, large + offset): HeldClick(large, large + 1) for offset in range(2_500)},
    )
    *named, (_, _, headers) = written(plan, 0.1)
    assert record_count(plan) == len(named) + 1
    assert dict(headers)["kind"] == b"correction"
    assert all(
        key is None and len(value) + sum(len(each or b"") for _, each in headers) < 64 << 10 for key, value, headers in named
    )
    offsets: list[int] = []
    matched: list[list[int]] = []
    for _, value, headers in named:
        assert value is not None
        if dict(headers)["kind"] == b"matched":
            clicks = json.loads(value)
            assert json.loads(dict(headers)["click_arrived_ms"] or b"") == [large + 1] * len(clicks)
            matched += clicks
        else:
            assert dict(headers) == {"kind": b"left_out", "rate": b"0.1"}
            offsets += json.loads(value)
    assert offsets == plan.left_out
    assert matched == [[offset, time_ms, click.click_ms] for (time_ms, offset), click in plan.held.items()]
