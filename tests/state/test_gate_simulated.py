"""The gate on a few simulated streams; `bench/gate.py` measures many."""

from __future__ import annotations

import pytest

from bench.gate import FAULTS, clicks_until_withheld, false_holds, ready, seconds_until_shifted
from state.settings import SnapshotSettings

SETTINGS = SnapshotSettings()


@pytest.mark.parametrize("click_rate", [0.05, 0.01])
def test_faults_are_withheld_within_2000_clicks(click_rate: float) -> None:
    for seed in range(2):
        simulation = ready(seed, click_rate, SETTINGS)
        assert simulation.gate.state.flow == "flowing"
        assert clicks_until_withheld(simulation, "none") is None
        assert all(clicks_until_withheld(simulation, fault) is not None for fault in FAULTS)


def test_a_healthy_model_is_not_withheld() -> None:
    found = false_holds(0, 0.05, 2.0, SETTINGS)
    assert found.blocks > 500
    assert (found.holds, found.shifts) == (0, 0)


@pytest.mark.parametrize("click_rate", [0.05, 0.01])
def test_flipped_labels_shift_the_scores_within_seconds(click_rate: float) -> None:
    simulation = ready(1, click_rate, SETTINGS)
    found_s = seconds_until_shifted(simulation)
    assert found_s is not None and found_s < 10
