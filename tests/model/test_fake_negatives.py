"""The importance weights of fake negatives lead to the true probability, and the learner uses them as constants."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.fake_negatives import fake_negative_weights
from model.learner import Learner
from model.sampling import probabilities
from tests.model.test_learner import SCHEMA, SETTINGS, records

PROBABILITIES = st.floats(1e-4, 1 - 1e-4)
RATES = st.sampled_from([1.0, 0.5, 0.1, 0.01])


def weights(p: float, rate: float) -> tuple[float, float, float]:
    """Of a positive and a negative, and the score that stands for probability p."""
    score = p / (p + (1 - p) * rate)
    row = torch.tensor([score, score], dtype=torch.float64)
    told = torch.tensor([p, p], dtype=torch.float64)
    positive, negative = fake_negative_weights(torch.tensor([1.0, 0.0], dtype=torch.float64), row, told, rate).tolist()
    return positive, negative, score


@given(PROBABILITIES, RATES)
def test_where_the_model_is_right_the_stream_moves_it_nowhere(p, rate):
    """Of one impression the stream has p positives and `rate` negatives; the loss has slope score - label by the logit."""
    positive, negative, score = weights(p, rate)
    assert p * positive * (score - 1) + rate * negative * score == pytest.approx(0, abs=1e-12)
    # Importance weights are 1 on average, so learning is as fast as with known labels.
    assert p * positive + rate * negative == pytest.approx(p + rate)


@given(PROBABILITIES)
def test_with_all_negatives_they_are_those_of_the_paper(p):
    assert weights(p, 1.0)[:2] == pytest.approx((1 + p, (1 - p) * (1 + p)))


@given(st.floats(-15, 15), RATES)
def test_a_score_is_corrected_by_the_formula(logit, rate):
    p = 1 / (1 + math.exp(-logit))
    corrected = probabilities(torch.tensor([logit], dtype=torch.float64), rate).item()
    assert corrected == pytest.approx(p / (p + (1 - p) / rate))


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_the_learner_weighs_those_that_are_told_and_no_others(rate):
    one, other = (Learner(SCHEMA, SETTINGS, device="cpu") for _ in range(2))
    one.negative_rate = other.negative_rate = rate
    random = np.random.default_rng(2)
    for seed in range(5):
        batch, labels = records(64, seed)
        for learner in (one, other):
            learner.learn(batch, labels)  # knows every feature now, so that `predict` says what `learn` will
        fake = random.random(64) < 0.5
        told = other.predict(batch)
        score = told / (told + (1 - told) * rate)
        factors = (1 + rate * score) * np.where(labels > 0.5, 1, 1 - told)
        given_weights = random.random(64).astype(np.float32)
        assert one.learn(batch, labels, given_weights, fake) == pytest.approx(told, rel=1e-5)
        other.learn(batch, labels, given_weights * np.where(fake, factors, 1))
        for name, tensor in one.serving_state().items():
            torch.testing.assert_close(tensor, other.serving_state()[name], rtol=1e-4, atol=1e-5)
