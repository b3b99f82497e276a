"""Figures are those of `model.metrics`, and their intervals hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.evaluate.figures import FIGURES, Figures, Judged, blocks_of, difference, estimate, mean_figures
from model.metrics import measure


def drawn(seed: int, count: int = 4_000, noise: float = 1.0) -> Judged:
    """Scores of a model that knows the logit up to noise, with ties, in 100 blocks."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1.5, 1.0, count)
    labels = (rng.random(count) < 1 / (1 + np.exp(-logits))).astype(np.float64)
    scores = np.round(1 / (1 + np.exp(-(logits + rng.normal(0, noise, count)))), 2)
    return Judged(np.clip(scores, 0.01, 0.99), labels, np.ones(count), None, blocks_of(count))


def figures_of(judged: Judged) -> Figures:
    return estimate(judged, int(judged.blocks.max()) + 1)


def test_values_are_those_of_the_metrics() -> None:
    judged = drawn(0)
    found = figures_of(judged)
    wanted = measure(judged.scores, judged.labels)
    assert found.values.tolist() == [wanted.auc, wanted.normalised_entropy, wanted.calibration]
    assert found.ctr == judged.labels.mean()


@pytest.mark.parametrize("corrected", [False, True])
def test_influence_is_what_a_little_more_weight_does(corrected: bool) -> None:
    judged = drawn(1, 300)
    corrects = (np.arange(300) % 7 == 0) & (judged.labels > 0.5) if corrected else None
    judged = Judged(judged.scores, judged.labels, np.linspace(0.5, 2, 300), corrects, np.arange(300))
    base = estimate(judged, 300)
    for row in (0, 7, 13, 70, 299):
        weights = judged.weights.copy()
        weights[row] += 1e-6
        moved = measure(judged.scores, judged.labels, weights, corrects)
        change = np.array([moved.auc, moved.normalised_entropy, moved.calibration]) - base.values
        assert base.influence[row] / judged.weights[row] == pytest.approx(change / 1e-6, rel=1e-3, abs=1e-8)
    assert base.influence.sum(axis=0) == pytest.approx(np.zeros(3), abs=1e-9)


def test_intervals_hold_the_truth_in_95_of_100_cases() -> None:
    """The truth is the mean over many draws. The share of 400 cases has a standard error of 1.1 %."""
    cases = [figures_of(drawn(seed, 2_000)) for seed in range(400)]
    truth = np.mean([each.values for each in cases], axis=0)
    for number, name in enumerate(FIGURES):
        held = [each.estimate(name).low <= truth[number] <= each.estimate(name).high for each in cases]
        assert 0.92 <= np.mean(held) <= 0.98, name


def test_what_both_runs_share_cancels_in_a_difference() -> None:
    ours = drawn(2)
    near = np.clip(ours.scores + np.random.default_rng(3).normal(0, 0.01, len(ours)), 0.001, 0.999)
    alone = figures_of(ours)
    against = figures_of(Judged(near, ours.labels, ours.weights, None, ours.blocks))
    paired = difference([alone], [against])
    assert paired["auc"].value == alone.values[0] - against.values[0]
    assert paired["auc"].error < alone.estimate("auc").error / 4
    assert difference([alone], [alone])["auc"].error == 0


def test_seeds_widen_an_interval_by_what_they_differ() -> None:
    each = [figures_of(drawn(4, noise=noise)) for noise in (0.8, 1.0, 1.2)]
    mean = mean_figures(each)
    assert mean.values == pytest.approx(np.mean([one.values for one in each], axis=0))
    assert mean.estimate("auc").error > np.mean([one.estimate("auc").error for one in each])


def test_figures_without_a_click_are_not_defined() -> None:
    judged = Judged(np.full(50, 0.1), np.zeros(50), np.ones(50), None, blocks_of(50))
    found = figures_of(judged)
    assert np.isnan(found.values).all()
    assert np.isnan(found.estimate("auc").low)
    assert found.ctr == 0
    assert np.isnan(estimate(judged.take(np.zeros(50, np.bool_)), 2).ctr)
