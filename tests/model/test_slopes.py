"""Corrections: learning is unbiased whatever the delays, and a saturated model recovers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deploy.feeding.simulation import Simulation, generate, simulation_schema
from model.batch import FeatureBatch
from model.features import FeatureDecoder
from model.learner import Learner
from model.sampling import probabilities
from model.settings import ModelSettings
from model.slopes import slopes

SCORES = st.floats(0, 1)
RATES = st.sampled_from([1.0, 0.5, 0.1, 0.01])


def slope(score: float, label: float, correction: bool, rate: float) -> float:
    one = [torch.tensor([each], dtype=torch.float64) for each in (score, label)]
    return slopes(*one, torch.tensor([correction]), rate).item()


@given(st.floats(0, 1), SCORES, RATES, st.data())
def test_the_expected_slope_of_an_impression_knows_nothing_of_delays(p, score, rate, data):
    """With clicks before and after the first label, and invalid clicks that are corrected: the slope is f - p in the end."""
    late, invalid, restored = (data.draw(st.floats(0, 1)) for _ in range(3))
    # A share p is clicked. Some others have an invalid click. Both kinds of clicks come before or after the first label.
    wrong = (1 - p) * invalid
    clicked = p + wrong
    first = clicked * (1 - late)
    expected = first * slope(score, 1, False, rate)
    expected += (1 - first) * rate * slope(score, 0, False, rate)  # this share of the negatives goes out
    expected += clicked * late * slope(score, 1, True, rate)
    expected += (wrong + p * restored) * slope(score, 0, True, rate) + p * restored * slope(score, 1, True, rate)
    assert expected == pytest.approx(p * (score - 1) + (1 - p) * rate * score, abs=1e-12)
    if rate == 1:
        assert expected == pytest.approx(score - p, abs=1e-12)


@given(st.floats(-15, 15), RATES, st.booleans())
def test_the_slope_of_a_correction_is_that_of_the_new_label_less_that_of_the_old_label(logit, rate, clicked):
    row = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
    positive, negative = (torch.nn.functional.binary_cross_entropy_with_logits(row, row * 0 + label) for label in (1.0, 0.0))
    loss = positive - rate * negative
    (loss if clicked else -loss).backward()
    assert slope(torch.sigmoid(row).item(), float(clicked), True, rate) == pytest.approx(row.grad.item(), abs=1e-12)


def test_without_sampling_a_correction_has_slope_plus_or_minus_1_whatever_the_score():
    scores = torch.sigmoid(torch.linspace(-20, 20, 401))
    for label, expected in ((1.0, -1.0), (0.0, 1.0)):
        found = slopes(scores, torch.full_like(scores, label), torch.ones_like(scores, dtype=torch.bool), 1.0)
        assert found.tolist() == [expected] * 401


@given(st.floats(-15, 15), RATES)
def test_a_score_is_corrected_by_the_formula(logit, rate):
    p = 1 / (1 + math.exp(-logit))
    corrected = probabilities(torch.tensor([logit], dtype=torch.float64), rate).item()
    assert corrected == pytest.approx(p / (p + (1 - p) / rate))


@pytest.mark.parametrize("how", ["bias", "clicks only"])
def test_a_model_that_says_yes_to_everything_comes_back_within_two_minutes(how):
    """At 300 impressions a second and a CTR of 5 %, no label held: each is a negative first, corrected when its click comes.

    With importance weights a negative weighs 1 - f, next to nothing, and the model stays where it is.
    """
    simulation = Simulation(count=40_000, rate=300, ctr=0.05, delay="lognormal", delay_ms=20_000, seed=2)
    batches = list(generate(simulation))
    decoder = FeatureDecoder(simulation_schema())
    features = FeatureBatch.concat(
        [decoder.impressions([b'{"features":%b}' % each for each in batch.features]).batch for batch in batches]
    )
    shown, clicked_at = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("times_ms", "click_times_ms"))
    truth = np.concatenate([batch.probabilities for batch in batches])
    clicked = np.flatnonzero(clicked_at >= 0)
    which = np.concatenate([np.arange(len(shown)), clicked])
    corrects = np.arange(len(which)) >= len(shown)
    order = np.argsort(np.concatenate([shown, clicked_at[clicked]]), kind="stable")
    which, corrects = which[order], corrects[order]

    learner = Learner(simulation_schema(), ModelSettings(initial_rows=1 << 15, row_history=False, cross_layers=0), device="cpu")
    head = features.slice(0, 2_048)
    for start in range(0, 2_048, 128):
        learner.learn(head.slice(start, start + 128), np.zeros(128))
    if how == "bias":
        serving, trainer = learner.serving_state(), learner.trainer_state()
        serving["bias"] += 6 - float(np.log(learner.predict(head) / (1 - learner.predict(head))).min())
        learner.restore(serving, trainer)
    else:
        while learner.predict(head).min() < 1 / (1 + math.exp(-6)):
            for start in range(0, 2_048, 128):
                learner.learn(head.slice(start, start + 128), np.ones(128))
    assert learner.predict(head).min() > 0.997

    for start in range(0, len(which), 128):
        part = slice(start, start + 128)
        labels, times_ms = corrects[part].astype(np.float32), shown[which[part]]
        learner.learn(features.take(which[part]), labels, corrects=corrects[part], impression_ms=times_ms)
        if shown[which[part]][-1] - shown[0] > 120_000:
            break
    after = slice(36_000, 40_000)
    assert learner.predict(features.slice(after.start, after.stop)).mean() == pytest.approx(truth[after].mean(), rel=0.1)
