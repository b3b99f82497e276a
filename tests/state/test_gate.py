"""What may become champion by itself."""

from __future__ import annotations

import math

import pytest

from state.gate import calibration_in_band, gate
from state.settings import SnapshotSettings

SETTINGS = SnapshotSettings(gate_calibration=(0.8, 1.25), gate_margin=0.02, gate_min_examples=1_000)


def metrics(loss: float = 0.5, calibration: float = 1.0, examples: int = 5_000, **more: float) -> dict[str, float]:
    return {"window_examples": examples, "window_log_loss": loss, "window_calibration": calibration, **more}


def served(calibration: float, examples: int = 5_000) -> dict[str, float]:
    return {"served_examples": examples, "served_calibration": calibration, "served_log_loss": 0.5}


@pytest.mark.parametrize(
    ("mine", "theirs", "passed", "says"),
    [
        (metrics(), metrics(), True, "log loss 0.5000 against the champion's 0.5000 (+0.0 %, allowed +2 %)"),
        (metrics(0.509), metrics(0.5), True, "+1.8 %"),
        (metrics(0.511), metrics(0.5), False, "log loss 0.5110 against the champion's 0.5000 (+2.2 %, allowed +2 %)"),
        (metrics(9.9, examples=999), metrics(0.5), True, "log loss not compared: 999 examples, fewer than 1000"),
        (metrics(9.9), metrics(0.5, examples=999), True, "log loss not compared: 999 examples"),
        (metrics(calibration=1.26), metrics(), False, "window calibration 1.260 outside [0.8, 1.25]"),
        (metrics(calibration=0.79), metrics(), False, "window calibration 0.790 outside [0.8, 1.25]"),
        (metrics(calibration=9.0, examples=999), metrics(), True, "window calibration not judged: 999 examples"),
        (metrics(calibration=math.inf), metrics(), False, "window calibration undefined: no click in 5000 examples"),
        (metrics(math.nan), metrics(), False, "not finite: window_log_loss"),
        (metrics(math.inf, examples=3), metrics(), False, "not finite: window_log_loss"),
        (metrics(math.nan), None, False, "not finite: window_log_loss"),
        (metrics(window_auc=math.nan, window_ne=math.nan), metrics(), True, "in [0.8, 1.25]"),
        (metrics(math.nan, examples=0), metrics(), True, "not judged"),
        (metrics(examples=3), None, True, "the first version, finite; nothing better to serve"),
        (metrics(weight_norm=math.nan), metrics(), False, "not finite: weight_norm"),
        ({}, metrics(), True, "not judged"),
    ],
)
def test_verdicts(mine: dict[str, float], theirs: dict[str, float] | None, passed: bool, says: str) -> None:
    verdict = gate(mine, theirs, SETTINGS)
    assert verdict.passed is passed, verdict
    assert says in verdict.reason


@pytest.mark.parametrize(
    ("window", "shown", "in_band", "says"),
    [
        (2.0, served(1.0), True, "served calibration 1.000 in"),  # the order of labels misleads the window, not the served
        (2.0, served(2.0), False, "served calibration 2.000 outside"),
        (1.0, served(2.0), True, "that is what is served now; its own window calibration 1.000 in"),
        (2.0, served(1.0, examples=10), False, "window calibration 2.000 outside"),
    ],
)
def test_served_figures_lead_but_cannot_keep_a_bad_champion(
    window: float, shown: dict[str, float], in_band: bool, says: str
) -> None:
    found, reason = calibration_in_band(metrics(calibration=window, **shown), SETTINGS)
    assert found is in_band
    assert says in reason


def test_a_bad_champion_is_replaced_though_its_own_scores_are_all_that_was_served() -> None:
    """Otherwise a poor first version, or a change of the world, would stop auto-promotion for good."""
    champion = metrics(0.9, calibration=3.0, examples=50)
    candidate = metrics(0.5, calibration=1.0, **served(3.0))
    assert gate(candidate, champion, SETTINGS).passed
