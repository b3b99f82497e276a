"""Anchor points: whatever is trained meanwhile, they score as a predictor of that moment does, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.anchor import AnchorPoint
from model.errors import ModelError, SnapshotMismatch
from model.learner import Learner
from model.predictor import Predictor
from model.rows import Rows
from tests.model.test_learner import SCHEMA, SETTINGS, devices, learn, records

ASKED, _ = records(200, seed=99)


class Kept:
    """A point, and the predictor that it has to agree with."""

    def __init__(self, learner: Learner) -> None:
        self.serving = learner.serving_state()
        self.rate = learner.negative_rate
        self.predictor = Predictor.of(SCHEMA, SETTINGS, self.serving, device="cpu", negative_rate=self.rate)
        self.point = learner.point()

    def agrees(self) -> None:
        assert same(self.point, self.predictor)


def same(point: AnchorPoint, predictor: Predictor) -> bool:
    return point.predict(ASKED).tobytes() == predictor.predict(ASKED).tobytes()


def rows_of(serving: dict[str, torch.Tensor], size: int) -> list[Rows]:
    parts = [serving[name].split(size) for name in ("keys", "embedding", "first_order")]
    return [Rows(*each) for each in zip(*parts, strict=True)]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("learn"), st.integers(0, 10_000)),
        st.tuples(st.just("point"), st.just(0)),
        st.tuples(st.just("close"), st.integers(0, 5)),
        st.tuples(st.just("delta"), st.just(0)),
    ),
    min_size=4,
    max_size=14,
)


@given(steps)
@settings(max_examples=40, deadline=None)
def test_points_score_as_predictors_of_their_moments(work: list[tuple[str, int]]) -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learner.negative_rate = 0.25
    kept: list[Kept] = []
    for what, number in work:
        if what == "learn":
            learn(learner, *records(1 + number % 90, seed=number), rows=32)
        elif what == "point":
            kept.append(Kept(learner))
        elif what == "delta":
            learner.take_delta()
        elif kept:
            kept.pop(number % len(kept)).point.close()
        for each in kept:
            each.agrees()


def test_points_change_nothing_of_training() -> None:
    alone, beside = (Learner(SCHEMA, SETTINGS, device="cpu") for _ in range(2))
    for seed in range(6):
        batch, labels = records(300, seed=seed)
        beside.point()
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
    assert learner.rows > kept.point.rows
    kept.agrees()


def test_only_rows_that_change_take_memory_and_each_once() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learn(learner, *records(500))
    older, newer = learner.point(), learner.point()
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


@pytest.mark.parametrize("kept_beside", [False, True])
def test_a_version_from_the_store_becomes_a_point(kept_beside: bool) -> None:
    """After a restart the learner is further than the anchor, whose rows come in pieces while training goes on."""
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learn(learner, *records(120, seed=1))
    anchor = Kept(learner)
    anchor.point.close()
    learn(learner, *records(100, seed=2))
    again = Learner(SCHEMA, SETTINGS, device="cpu")
    again.restore(learner.serving_state(), learner.trainer_state())
    beside = Kept(again) if kept_beside else None
    learn(again, *records(30, seed=3))
    dense = {name: value for name, value in anchor.serving.items() if name not in ("keys", "embedding", "first_order")}
    point = again.point_of(len(anchor.serving["keys"]), dense, anchor.rate)
    for seed, rows in enumerate(rows_of(anchor.serving, 17)):
        point.restore(rows)
        learn(again, *records(20, seed=10 + seed))
    assert same(point, anchor.predictor)
    learn(again, *records(100, seed=4))
    assert same(point, anchor.predictor)
    if beside is not None:
        beside.agrees()
        beside.point.close()
        assert same(point, anchor.predictor)
    assert point.saved <= point.rows


def test_a_version_that_is_not_from_the_models_past_is_refused() -> None:
    learner, other = (Learner(SCHEMA, SETTINGS, device="cpu") for _ in range(2))
    learn(learner, *records(100, seed=1))
    learn(other, *records(60, seed=2))
    serving = other.serving_state()
    point = learner.point_of(len(serving["keys"]), serving, 1.0)
    with pytest.raises(SnapshotMismatch, match="isn't from this model's past"):
        for rows in rows_of(serving, 17):
            point.restore(rows)
    assert not point.is_open
    with pytest.raises(SnapshotMismatch, match="isn't from this model's past"):
        other.point_of(learner.rows, learner.serving_state(), 1.0)
    with pytest.raises(SnapshotMismatch, match=r"mlp\.0\.weight"):
        learner.point_of(1, {}, 1.0)


def test_a_restore_ends_points() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learn(learner, *records(50))
    point = learner.point()
    learner.restore(learner.serving_state(), learner.trainer_state())
    assert not point.is_open


@devices
def test_points_on_every_device(device: str) -> None:
    learner = Learner(SCHEMA, SETTINGS, device=device)
    learn(learner, *records(100, seed=1))
    before = learner.predict(ASKED)
    point = learner.point()
    learn(learner, *records(200, seed=2))
    np.testing.assert_allclose(point.predict(ASKED), before, rtol=1e-5)
