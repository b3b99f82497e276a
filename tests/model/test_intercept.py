"""The bias finds the base rate, follows it when it changes, and isn't moved far by single examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from model.batch import FeatureBatch
from model.errors import SnapshotMismatch
from model.intercept import HORIZON, LONGEST_STEP, Intercept
from model.learner import Learner
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings

CPU = torch.device("cpu")
SCHEMA = FeatureSchema(fields=(FieldSpec(name="a"),), embedding_dim=4)
SETTINGS = ModelSettings(hidden=(8,), initial_rows=64, row_history=False, cross_layers=0)


class Alone:
    """A model that consists of a bias alone."""

    def __init__(self, seed: int = 0) -> None:
        self.bias = torch.zeros(1)
        self.intercept = Intercept()
        self._rng = np.random.default_rng(seed)

    def learn(self, rate: float, examples: int, batch: int = 128) -> float:
        """Learn examples with a click rate; returns the prediction afterwards."""
        for _ in range(examples // batch):
            scores = torch.sigmoid(self.bias).expand(batch).clone()
            labels = torch.from_numpy((self._rng.random(batch) < rate).astype(np.float32))
            self.intercept.step(self.bias, scores, scores - labels, None, None)
        return float(torch.sigmoid(self.bias))


@pytest.mark.parametrize(("rate", "batch"), [(0.05, 128), (0.01, 128), (0.45, 128), (0.05, 1), (0.05, 4_096)])
def test_it_finds_the_base_rate_within_a_few_hundred_clicks(rate: float, batch: int) -> None:
    clicks = 400
    found = Alone().learn(rate, max(int(clicks / rate), 32 * batch), batch)
    assert found == pytest.approx(rate, rel=5 / math.sqrt(clicks))


def test_it_follows_a_step_and_stays_steady_between() -> None:
    one = Alone(seed=1)
    predictions = [one.learn(0.03, 2_560) for _ in range(400)][100:]  # one every 77 clicks
    assert np.mean(predictions) == pytest.approx(0.03, rel=0.03)
    assert np.std(np.log(predictions)) < 0.02  # the rate of 77 clicks alone would have 0.11
    assert one.learn(0.06, int(3 * HORIZON / 0.06)) == pytest.approx(0.06, rel=0.12)


def test_clicks_that_come_late_count_once() -> None:
    """Each impression is first labelled negative, and each click comes as a correction."""
    bias, intercept, rng = torch.zeros(1), Intercept(), np.random.default_rng(3)
    for _ in range(600):
        late = int(rng.binomial(128, 0.05))
        scores = torch.sigmoid(bias).expand(128 + late).clone()
        corrects = torch.arange(128 + late) >= 128
        slope = torch.where(corrects, -1.0, scores)
        intercept.step(bias, scores, slope, None, corrects)
    assert float(torch.sigmoid(bias)) == pytest.approx(0.05, rel=0.06)


@pytest.mark.parametrize("weight", [1.0, 10_000.0])
def test_one_batch_moves_it_by_half_a_logit_at_most(weight: float) -> None:
    one = Alone()
    one.learn(0.05, 100_000)
    before = float(one.bias)
    one.intercept.step(one.bias, torch.full((8,), 1e-7), torch.full((8,), -weight), torch.full((8,), weight), None)
    assert before < float(one.bias) <= before + LONGEST_STEP + 1e-6


def test_a_restored_bias_continues_alike_and_a_version_without_its_state_keeps_the_bias() -> None:
    def steps(learner: Learner, since: int, until: int) -> None:
        for step in range(since, until):
            rng = np.random.default_rng(step)
            keys = np.ascontiguousarray(rng.integers(1, 9, 32)[:, None])
            batch = FeatureBatch(keys, np.empty(0, np.int64), np.zeros(1, np.int64), 0)
            learner.learn(batch, (rng.random(32) < 0.2).astype(np.float32))

    whole, first, second, older = (Learner(SCHEMA, SETTINGS, device="cpu") for _ in range(4))
    steps(whole, 0, 20)
    steps(first, 0, 10)
    state = first.trainer_state()
    second.restore(first.serving_state(), state)
    steps(second, 10, 20)
    assert torch.equal(whole.serving_state()["bias"], second.serving_state()["bias"])
    assert torch.equal(whole.trainer_state()["intercept.curvature"], second.trainer_state()["intercept.curvature"])

    without = {name: value for name, value in state.items() if not name.startswith("intercept.")}
    older.restore(first.serving_state(), without)
    assert torch.equal(older.serving_state()["bias"], first.serving_state()["bias"])
    before = float(older.serving_state()["bias"])
    steps(older, 10, 20)
    assert float(older.serving_state()["bias"]) == pytest.approx(
        before, abs=0.02
    )  # starting again would move it by half a logit

    with pytest.raises(SnapshotMismatch, match="curvature"):
        older.restore(first.serving_state(), state | {"intercept.curvature": torch.zeros(3)})
