"""The gate on simulated streams: what it must let through, and what it must not."""

from __future__ import annotations

from bench.gate import FAULT_CLICKS, clicks_until_withheld, holds_at_steps, ready
from state.settings import SnapshotSettings


def test_a_step_of_the_click_rate_and_back_flows_through() -> None:
    assert holds_at_steps(1, SnapshotSettings(), hours=0.5) == 0


def test_logits_that_are_too_high_do_not() -> None:
    found = clicks_until_withheld(ready(1, 0.05, SnapshotSettings()), "logits_plus_0.7")
    assert found is not None and found <= FAULT_CLICKS
