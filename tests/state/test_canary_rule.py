"""When a shadow or canary ends, on made-up evidence and on a few simulated streams; `bench/canary.py` measures many."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from bench.canary import CANDIDATES, trial
from state.canary import Canary, Mode, Thresholds
from state.canary_evidence import LEAST_STRETCHES, MAX_STRETCHES, STRETCH_CLICKS, Evidence, Tally
from state.canary_rule import judge_canary

RNG = np.random.default_rng(3)
HOUR_MS = 3_600_000


def clicks_of(logits: np.ndarray) -> np.ndarray:
    return (RNG.random(len(logits)) < 1 / (1 + np.exp(-logits))).astype(np.float64)


def gathered(mode: Mode, clicks: int, *, shift: float = 0.0, noise: float = 0.1, shows: float = 0.0) -> Evidence:
    """Evidence with about so many clicks of the candidate, whose logits are the true ones plus shift and noise."""
    evidence = Evidence(of="op", mode=mode)
    while evidence.clicks < clicks:
        truth = RNG.normal(-2.5 + shows, 1, 400)
        labels, ones = clicks_of(truth), np.ones(400)
        mine = truth + shift + noise * RNG.standard_normal(400)
        if mode == "shadow":
            evidence.add_pairs(labels, ones, mine, truth)
        else:
            evidence.add_side(labels, ones, mine, truth, is_candidate=True)
            other = RNG.normal(-2.5, 1, 1_600)
            evidence.add_side(clicks_of(other), np.ones(1_600), other, other, is_candidate=False)
        evidence.close_stretch()
    return evidence


def canary(mode: Mode, **limits: float) -> Canary:
    return Canary(mode=mode, version=2, share=0.05, operation="op", thresholds=Thresholds(**limits))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_as_good_is_promoted_once_there_are_enough_clicks(mode: Mode) -> None:
    early = judge_canary(canary(mode, clicks=5_000), gathered(mode, 600), HOUR_MS)
    assert early.outcome == "" and "more clicks are needed" in early.reason
    found = judge_canary(canary(mode), gathered(mode, 600), HOUR_MS)
    assert found.outcome == "promoted", found.reason
    assert found.progress.candidate.calibration is not None and found.progress.candidate.log_loss_error is not None


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_worse_is_taken_back(mode: Mode) -> None:
    found = judge_canary(canary(mode), gathered(mode, 600, noise=1.0), HOUR_MS)
    assert found.outcome == "taken_back" and "(allowed +1.0 %)" in found.reason


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_out_of_calibration_is_taken_back_though_the_loss_is_in_bounds(mode: Mode) -> None:
    found = judge_canary(canary(mode, loss_margin=0.2), gathered(mode, 900, shift=0.5), HOUR_MS)
    assert found.outcome == "taken_back" and found.reason.startswith("calibration 1.")


def test_what_is_clicked_less_is_taken_back_though_it_is_predicted_well() -> None:
    found = judge_canary(canary("canary"), gathered("canary", 900, shows=-0.5), HOUR_MS)
    assert found.outcome == "taken_back" and found.reason.startswith("click rate -")
    assert judge_canary(canary("canary", ctr_margin=0.9), gathered("canary", 900, shows=-0.5), HOUR_MS).outcome == "promoted"


def test_time_is_over() -> None:
    evidence = Evidence(of="op", mode="canary")
    limited = canary("canary", limit_ms=HOUR_MS)
    assert judge_canary(limited, evidence, HOUR_MS - 1).outcome == ""
    found = judge_canary(limited, evidence, HOUR_MS)
    assert found.outcome == "undecided" and found.progress.change is None and found.progress.candidate.log_loss is None
    assert judge_canary(limited, gathered("canary", 600), HOUR_MS).outcome == "promoted", "the evidence counts first"


def test_few_clicks_decide_nothing_however_bad() -> None:
    assert judge_canary(canary("shadow"), gathered("shadow", 75, noise=3.0), HOUR_MS).outcome == ""


def test_what_is_taken_back_is_gone() -> None:
    """A correction subtracts the first label, so the sums are those of the last labels."""
    truth, ones = RNG.normal(-1, 1, 300), np.ones(300)
    last, live = clicks_of(truth), truth + 0.1
    first = np.where(RNG.random(300) < 0.5, 0.0, last)
    late = first != last
    for mode in ("shadow", "canary"):
        straight, corrected = Evidence(mode=mode), Evidence(mode=mode)  # type: ignore[arg-type]

        def add(to: Evidence, labels: np.ndarray, at: np.ndarray, *, taken_back: bool = False) -> None:
            args = labels[at], ones[at], truth[at], live[at]
            if to.mode == "shadow":
                to.add_pairs(*args, taken_back=taken_back)
            else:
                to.add_side(*args, is_candidate=True, taken_back=taken_back)

        add(straight, last, ones > 0)
        add(corrected, first, ones > 0)
        add(corrected, first, late, taken_back=True)
        add(corrected, last, late)
        assert _flat(msgspec.to_builtins(corrected)) == pytest.approx(_flat(msgspec.to_builtins(straight)), abs=1e-9)


def test_a_tally_is_what_its_sums_are_for() -> None:
    labels, weights, logits = np.array([1.0, 0, 0, 1]), np.array([1.0, 2, 1, 1]), np.array([0.5, -1, -2, 1])
    tally = Tally()
    tally.add(labels, weights, logits, 1.0)
    p = 1 / (1 + np.exp(-logits))
    loss = -np.log(np.where(labels > 0.5, p, 1 - p))
    side = tally.side()
    assert side.log_loss == pytest.approx((weights * loss).sum() / 5)
    assert side.calibration == pytest.approx((weights * p).sum() / 2) and tally.click_rate == pytest.approx(0.4)
    assert side.log_loss_error == pytest.approx(math.sqrt((weights**2 * (loss - side.log_loss) ** 2).sum()) / 5)


def test_evidence_of_any_length_stays_small_and_the_same() -> None:
    few, many = Evidence(mode="shadow"), Evidence(mode="shadow")
    for _ in range(3 * MAX_STRETCHES):
        truth = RNG.normal(0, 1, 4 * STRETCH_CLICKS)
        args = clicks_of(truth), np.ones(len(truth)), truth + 0.3 * RNG.standard_normal(len(truth)), truth
        few.add_pairs(*args)
        many.add_pairs(*args)
        many.close_stretch()
    few.close_stretch()
    assert len(few.stretches) == 1 and MAX_STRETCHES / 2 <= len(many.stretches) <= MAX_STRETCHES
    assert few.difference().change == pytest.approx(many.difference().change)
    assert few.difference().error == pytest.approx(many.difference().error, rel=0.3)
    assert msgspec.json.decode(msgspec.json.encode(many), type=Evidence) == many
    assert len(msgspec.json.encode(many)) < 60_000


def test_what_examples_of_one_time_have_in_common_widens_the_error() -> None:
    """The candidate is wrong about half of the examples: about any of them, or about all of one time."""
    alone, common = Evidence(mode="shadow"), Evidence(mode="shadow")
    for stretch in range(4 * LEAST_STRETCHES):
        truth = RNG.normal(0, 1, 16 * STRETCH_CLICKS)
        labels, ones = clicks_of(truth), np.ones(len(truth))
        wrong = 1.5 * RNG.choice([-1, 1], len(truth))
        alone.add_pairs(labels, ones, truth + wrong * RNG.choice([0, 1], len(truth)), truth)
        common.add_pairs(labels, ones, truth + wrong * (stretch % 2), truth)
        alone.close_stretch()
        common.close_stretch()
    assert common.difference().error > 1.5 * alone.difference().error


@pytest.mark.parametrize(
    ("mode", "name", "outcome"),
    [
        ("shadow", "as good", "promoted"),
        ("canary", "as good", "promoted"),
        ("shadow", "5 % worse", "taken_back"),
        ("canary", "5 % worse", "taken_back"),
        ("canary", "predicts 30 % too many clicks", "taken_back"),
        ("canary", "shows what is clicked 20 % less", "taken_back"),
    ],
)
def test_simulated_streams_end_as_they_should(mode: Mode, name: str, outcome: str) -> None:
    assert [trial(CANDIDATES[name], mode, 0.05, seed).outcome for seed in range(2)] == [outcome] * 2


def _flat(value: object) -> list[float]:
    if isinstance(value, dict):
        return [each for part in value.values() for each in _flat(part)]
    if isinstance(value, list):
        return [each for part in value for each in _flat(part)]
    return [float(value)] if isinstance(value, int | float) else []
