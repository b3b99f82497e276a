"""New values begin at the average row of their field, and unknown values read it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.batch import FeatureBatch
from model.errors import SnapshotMismatch
from model.learner import Learner
from model.predictor import Predictor
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from model.typical import HORIZON

SCHEMA = FeatureSchema(
    fields=(
        FieldSpec(name="tags", kind="list"),
        FieldSpec(name="hour"),
        FieldSpec(name="price", kind="numeric", buckets="scaled"),
        FieldSpec(name="item"),
    ),
    embedding_dim=4,
)
SETTINGS = ModelSettings(
    hidden=(8,), initial_rows=64, dense_learning_rate=2e-3, row_learning_rate=0.05, row_history=False, cross_layers=0
)


def batch_of(hours: list[int], items: list[int], tags: list[list[int]] | None = None) -> FeatureBatch:
    """Single-valued fields are hour, price and item, as in the schema. Keys: 1,000 + hour, 2,000 + item, 3,000 + tag."""
    count = len(hours)
    lists = tags or [[0]] * count
    keys = np.stack([np.array(hours) + 1_000, np.full(count, 7), np.array(items) + 2_000], 1).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in lists])]).astype(np.int64)
    scales = np.ones((count, 3), np.float32)
    return FeatureBatch(keys, np.concatenate(lists).astype(np.int64) + 3_000, offsets, 1, scales)


def trained(batches: int = 300) -> Learner:
    """A learner that has seen two hours, with click rates of 5 % and 20 %, and twenty items that don't differ."""
    learner, rng = Learner(SCHEMA, SETTINGS, device="cpu"), np.random.default_rng(1)
    for _ in range(batches):
        hours = rng.integers(0, 2, 128)
        labels = rng.random(128) < np.where(hours == 0, 0.05, 0.2)
        learner.learn(batch_of(hours.tolist(), rng.integers(0, 20, 128).tolist()), labels.astype(np.float32))
    return learner


def test_the_average_is_over_examples_and_their_lists_elements() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    batch = batch_of([0, 0, 0, 1], [0, 1, 2, 3], [[0], [0, 1], [1], [1, 1]])
    learner.learn(batch, np.zeros(4, np.float32), np.zeros(4, np.float32))  # creates the rows
    serving = learner.serving_state()
    row = {key: serving["embedding"][at] for at, key in enumerate(serving["keys"].tolist())}
    expected = [
        (3 * row[1_000] + row[1_001]) / 4,  # singles come first
        torch.zeros(4),  # a scaled field has one row, which is always known
        (row[2_000] + row[2_001] + row[2_002] + row[2_003]) / 4,
        (1.5 * row[3_000] + 2.5 * row[3_001]) / 4,
    ]
    torch.testing.assert_close(serving["typical.embedding"], torch.stack(expected))


def test_a_new_hour_begins_between_the_others_also_before_the_trainer_has_seen_it() -> None:
    learner = trained()
    known = [float(learner.predict(batch_of([hour] * 20, list(range(20)))).mean()) for hour in (0, 1)]
    assert known[0] < 0.09 and known[1] > 0.15
    new = batch_of([9] * 20, list(range(20)))
    unknown = float(learner.predict(new).mean())
    assert known[0] < unknown < known[1]
    predictor = Predictor.of(SCHEMA, SETTINGS, learner.serving_state(), device="cpu")
    np.testing.assert_array_equal(predictor.predict(new), learner.predict(new))
    # The initial row of the hour is the average and random numbers by its key.
    first = float(learner.learn(new, np.zeros(20, np.float32), np.zeros(20, np.float32)).mean())
    assert first == pytest.approx(unknown, rel=0.1)


def test_the_average_decays_so_that_recent_values_count() -> None:
    learner = trained(20)
    for _ in range(3 * HORIZON // 4_096):
        learner.learn(batch_of([5] * 4_096, [1] * 4_096), np.zeros(4_096, np.float32), np.zeros(4_096, np.float32))
    serving = learner.serving_state()
    own = serving["embedding"][serving["keys"].tolist().index(1_005)]
    assert torch.linalg.vector_norm(serving["typical.embedding"][0] - own) < 0.1 * torch.linalg.vector_norm(own)


def test_a_version_without_averages_is_taken_over() -> None:
    learner = trained(20)
    state, trainer = learner.serving_state(), learner.trainer_state()
    older = {name: value for name, value in state.items() if not name.startswith("typical.")}
    other = Learner(SCHEMA, SETTINGS, device="cpu")
    other.restore(older, trainer)
    assert not other.serving_state()["typical.embedding"].any()
    known = batch_of([0, 1], [1, 2])
    np.testing.assert_array_equal(other.predict(known), learner.predict(known))
    np.testing.assert_array_equal(Predictor.of(SCHEMA, SETTINGS, older, device="cpu").predict(known), learner.predict(known))
    with pytest.raises(SnapshotMismatch, match="typical"):
        other.restore(older | {"typical.embedding": torch.zeros(1, 4), "typical.first_order": torch.zeros(4)}, trainer)
