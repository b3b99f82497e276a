"""What row history knows at impression time and at label time: in bursts of one user, they differ."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.evaluate.history import ALL_FIELDS, HistoryFigures, history_figures
from deploy.evaluate.labels import held
from deploy.evaluate.play import play
from deploy.evaluate.stream import Stream
from model.batch import FeatureBatch
from model.errors import ModelError
from model.learner import Learner
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings

USERS, EACH = 100, 6
SCHEMA = FeatureSchema(fields=(FieldSpec(name="user"), FieldSpec(name="page")), embedding_dim=4)
SETTINGS = ModelSettings(hidden=(4,), initial_rows=1024, batch_rows=4, row_history=True, cross_layers=0)


def bursts(apart_ms: int) -> Stream:
    """Users in turn, with six impressions each, all of them clicked or none; `page` says nothing."""
    rng = np.random.default_rng(0)
    users, count = np.repeat(np.arange(USERS), EACH), USERS * EACH
    shown_ms = 1_700_000_000_000 + np.arange(count) * apart_ms
    keys = np.stack([1_000 + users, 10 + rng.integers(0, 3, count)], axis=1)
    return Stream(
        name="bursts",
        schema=SCHEMA,
        batch=FeatureBatch(keys, np.empty(0, np.int64), np.zeros(1, np.int64), lists=0),
        shown_ms=shown_ms,
        clicked_ms=np.where((rng.random(USERS) < 0.4)[users], shown_ms + 500, -1),
        probabilities=np.full(count, np.nan),
        ages_ms=np.full(count, -1),
    )


def shown(apart_ms: int) -> dict[str, HistoryFigures]:
    stream = bursts(apart_ms)
    labels = held(stream, 60_000, 1_000)
    found = play(stream, labels, Learner(SCHEMA, SETTINGS, device="cpu"), batch_age_ms=20, history=True)
    assert found.lifts is not None
    measured = np.arange(len(stream) // 5, len(stream))
    return {each.field: each for each in history_figures(SCHEMA, found.lifts, measured, stream.labels(60_000))}


def test_a_session_within_the_hold_leaks_its_labels() -> None:
    found = shown(apart_ms=10)  # a session of 60 ms, whose labels come a second later
    assert abs(found["user"].at_impression.value - 0.5) < 0.01  # nothing is known of a new user
    assert found["user"].at_label.value > 0.8
    assert found["user"].leak.low > 0.3
    assert found[ALL_FIELDS].leak.low > 0.1
    assert abs(found["page"].leak.value) < 0.1


def test_a_session_longer_than_the_hold_does_not() -> None:
    found = shown(apart_ms=5_000)
    assert found["user"].at_impression.value > 0.8
    assert abs(found["user"].leak.value) < 0.01


def test_a_model_without_row_history_has_no_lifts() -> None:
    stream = bursts(10)
    with pytest.raises(ModelError, match="row_history"):
        Learner(SCHEMA, SETTINGS.model_copy(update={"row_history": False}), device="cpu").lifts(stream.batch)
