"""Earlier models: whatever is trained meanwhile, they score as a predictor of that moment does, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.anchor import EarlierModel
from model.errors import ModelError, SnapshotMismatch
from model.learner import Learner
from model.predictor import Predictor
from model.rows import ROW_PARTS, Rows
from model.settings import ModelSettings
from tests.model.test_learner import SCHEMA, SETTINGS, devices, learn, records

ASKED, _ = records(200, seed=99)
MODELS = [SETTINGS, pytest.param(SETTINGS.model_copy(update={"row_history": True}), id="row_history")]


class Kept:
    """A moment, and the predictor that it has to agree with."""

    def __init__(self, learner: Learner) -> None:
        self.serving = learner.serving_state()
        self.rate = learner.negative_rate
        self.predictor = Predictor.of(SCHEMA, learner.settings, self.serving, device="cpu", negative_rate=self.rate)
        self.moment = learner.keep()

    def agrees(self) -> None:
        assert same(self.moment, self.predictor)


def same(moment: EarlierModel, predictor: Predictor) -> bool:
    return moment.predict(ASKED).tobytes() == predictor.predict(ASKED).tobytes()


def rows_of(serving: dict[str, torch.Tensor], size: int) -> list[Rows]:
    parts = [part.split(size) for part in Rows.of(serving).parts().values()]
    return [Rows(*each) for each in zip(*parts, strict=True)]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("learn"), st.integers(0, 10_000)),
        st.tuples(st.just("moment"), st.just(0)),
        st.tuples(st.just("close"), st.integers(0, 5)),
        st.tuples(st.just("delta"), st.just(0)),
    ),
    min_size=4,
    max_size=14,
)


@pytest.mark.parametrize("model", MODELS)
@given(work=steps)
@settings(max_examples=30, deadline=None)
def test_moments_score_as_predictors_of_their_moments(model: ModelSettings, work: list[tuple[str, int]]) -> None:
    learner = Learner(SCHEMA, model, device="cpu")
    learner.negative_rate = 0.25
    kept: list[Kept] = []
    for what, number in work:
        if what == "learn":
            learn(learner, *records(1 + number % 90, seed=number), rows=32)
        elif what == "moment":
            kept.append(Kept(learner))
        elif what == "delta":
            learner.take_delta()
        elif kept:
            kept.pop(number % len(kept)).moment.close()
        for each in kept:
            each.agrees()


def test_moments_change_nothing_of_training() -> None:
    alone, beside = (Learner(SCHEMA, SETTINGS, device="cpu") for _ in range(2))
    for seed in range(6):
        batch, labels = records(300, seed=seed)
        beside.keep()
        one, other = (learn(learner, batch, labels) for learner in (alone, beside))
        assert one.tobytes() == other.tobytes()
    beside.take_delta()
    alone.take_delta()
    assert alone.digest == beside.digest


def test_a_key_that_came_later_scores_as_the_average_of_its_field() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    first, labels = records(3, seed=1)
    learner.learn(first, labels)
    kept = Kept(learner)
    learn(learner, ASKED, np.ones(len(ASKED), np.float32))
    assert learner.rows > kept.moment.rows
    kept.agrees()


def test_only_rows_that_change_take_memory_and_each_once() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learn(learner, *records(500))
    older, newer = learner.keep(), learner.keep()
    batch, labels = records(8, seed=3)
    for _ in range(5):
        learner.learn(batch, labels)
    touched = learner.take_delta() and len(set(batch.keys.flatten()) | set(batch.list_keys))
    assert (older.saved, newer.saved) == (0, pytest.approx(touched, abs=touched))
    assert 0 < newer.saved <= touched
    saved = newer.saved
    newer.close()
    assert older.saved == saved
    newer.close()
    assert older.is_open
    older.close()
    with pytest.raises(ModelError, match="found one that was closed"):
        older.predict(ASKED)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kept_beside", [False, True])
def test_a_version_from_the_store_becomes_a_moment(kept_beside: bool, model: ModelSettings) -> None:
    """After a restart the learner is further than the anchor, whose rows come in pieces while training goes on."""
    learner = Learner(SCHEMA, model, device="cpu")
    learn(learner, *records(120, seed=1))
    anchor = Kept(learner)
    anchor.moment.close()
    learn(learner, *records(100, seed=2))
    again = Learner(SCHEMA, model, device="cpu")
    again.restore(learner.serving_state(), learner.trainer_state())
    beside = Kept(again) if kept_beside else None
    learn(again, *records(30, seed=3))
    dense = {name: value for name, value in anchor.serving.items() if name not in ROW_PARTS}
    moment = again.model_of(len(anchor.serving["keys"]), dense, anchor.rate)
    for seed, rows in enumerate(rows_of(anchor.serving, 17)):
        moment.restore(rows)
        learn(again, *records(20, seed=10 + seed))
    assert same(moment, anchor.predictor)
    learn(again, *records(100, seed=4))
    assert same(moment, anchor.predictor)
    if beside is not None:
        beside.agrees()
        beside.moment.close()
        assert same(moment, anchor.predictor)
    assert moment.saved <= moment.rows


def test_a_version_that_is_not_from_the_models_past_is_refused() -> None:
    learner, other = (Learner(SCHEMA, SETTINGS, device="cpu") for _ in range(2))
    learn(learner, *records(100, seed=1))
    learn(other, *records(60, seed=2))
    serving = other.serving_state()
    moment = learner.model_of(len(serving["keys"]), serving, 1.0)
    with pytest.raises(SnapshotMismatch, match="isn't from this model's past"):
        for rows in rows_of(serving, 17):
            moment.restore(rows)
    assert not moment.is_open
    with pytest.raises(SnapshotMismatch, match="isn't from this model's past"):
        other.model_of(learner.rows, learner.serving_state(), 1.0)
    with pytest.raises(SnapshotMismatch, match=r"mlp\.0\.weight"):
        learner.model_of(1, {}, 1.0)


def test_a_row_that_another_key_gets_is_not_known_as_of_earlier_moments() -> None:
    """A key that was evicted since reads like one that wasn't there."""
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learn(learner, *records(100, seed=1))
    older = Kept(learner)
    gone = torch.from_numpy(np.unique(ASKED.keys[:, 0])[:10].copy())
    assert learner.evict(gone) == 10
    newer = Kept(learner)
    learn(learner, *records(300, seed=2))  # other keys, and some of the same again, get the rows
    newer.agrees()
    serving = {name: value.clone() for name, value in older.serving.items()}
    kept = ~torch.isin(serving["keys"], gone)
    for name in ("keys", "embedding", "first_order"):
        serving[name] = serving[name][kept]
    without = Predictor.of(SCHEMA, SETTINGS, serving, device="cpu", negative_rate=older.rate)
    assert same(older.moment, without)


def test_a_restore_ends_points() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learn(learner, *records(50))
    moment = learner.keep()
    learner.restore(learner.serving_state(), learner.trainer_state())
    assert not moment.is_open


@devices
def test_moments_on_every_device(device: str) -> None:
    learner = Learner(SCHEMA, SETTINGS, device=device)
    learn(learner, *records(100, seed=1))
    before = learner.predict(ASKED)
    moment = learner.keep()
    learn(learner, *records(200, seed=2))
    np.testing.assert_allclose(moment.predict(ASKED), before, rtol=1e-5)
