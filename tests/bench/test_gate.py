"""The gate on simulated streams: it passes a step of the click rate, and withholds a model with a fault."""

from __future__ import annotations

from bench.gate import FAULT_CLICKS, clicks_until_withheld, holds_at_steps, ready
from state.settings import SnapshotSettings


def test_versions_flow_when_the_click_rate_steps_up_and_back() -> None:
    found = holds_at_steps(1, SnapshotSettings(), hours=0.5)
    assert (found.holds, found.shifts) == (0, 0)


def test_versions_with_too_high_logits_are_withheld() -> None:
    found = clicks_until_withheld(ready(1, 0.05, SnapshotSettings()), "logits_plus_0.7")
    assert found is not None and found <= FAULT_CLICKS
