"""Rows that are evicted: gone from learner and predictor, with nothing of them left for the next key that gets their row.

`test_learner_state` draws evictions among all else that happens to a learner.
"""

from __future__ import annotations

import numpy as np
import torch

from model.learner import Learner
from model.predictor import Predictor
from tests.model import test_predictor as scored
from tests.model.test_learner import SCHEMA, SETTINGS, assert_same, learn
from tests.model.test_learner_state import BATCH, LABELS, Replica, continued, whole_digest
from tests.model.test_predictor import ASKED, batch_of, same


def test_a_key_that_was_evicted_begins_anew() -> None:
    """Weights, optimizer, what the row owes: nothing of the row before is left, also where its number is used again."""
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    continued(learner, 0, 200)
    learner.take_delta()
    keys = learner.serving_state()["keys"]
    assert learner.evict(keys) == len(keys)
    assert learner.rows == 0
    gone = learner.take_delta()
    assert set(gone.gone.tolist()) == set(keys.tolist())
    assert len(gone.rows) == 0
    assert learner.digest == whole_digest(learner.serving_state())
    other = Learner(SCHEMA, SETTINGS, device="cpu")
    serving, trainer = learner.serving_state(), learner.trainer_state()
    other.restore(serving, trainer)
    np.testing.assert_array_equal(continued(learner, 200, 400), continued(other, 200, 400))
    assert_same(by_key(learner), by_key(other))


def test_a_key_that_comes_back_in_the_same_interval_is_a_row_and_no_tombstone() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learn(learner, BATCH, LABELS)
    replica = Replica(learner.serving_state())
    learner.take_delta()
    part = BATCH.slice(3, 9)
    back = {*part.keys.flatten().tolist(), *part.list_keys.tolist()}
    evicted = set(learner.serving_state()["keys"].tolist()[:200]) | back
    assert learner.evict(torch.tensor(sorted(evicted))) == len(evicted)
    learner.learn(part, LABELS[3:9])
    delta = learner.take_delta()
    assert set(delta.rows.keys.tolist()) == back
    assert set(delta.gone.tolist()) == evicted - back
    replica.apply(delta)
    replica.assert_is(learner)


def by_key(learner: Learner) -> dict[str, torch.Tensor]:
    """All tensors of a learner, rows in the order of their keys: numbers of rows differ after a restart."""
    parts = {**learner.serving_state(), **learner.trainer_state()}
    order = parts["keys"].argsort()
    return {name: value[order] if value.dim() and len(value) == len(order) else value for name, value in parts.items()}


def test_an_evicted_row_is_gone_from_a_predictor_after_the_next_delta() -> None:
    learner = Learner(scored.SCHEMA, scored.MODEL, device="cpu")
    keys = list(range(100, 160))
    learner.learn(batch_of(keys), np.arange(60) % 2)
    predictor = Predictor.of(scored.SCHEMA, scored.MODEL, learner.serving_state(), device="cpu")
    learner.take_delta()
    assert learner.evict(torch.tensor(keys[10:40])) == 30
    learner.learn(batch_of([115]), [1])  # the keys 115, 116 and 117 come back
    predictor.apply(predictor.prepare(learner.take_delta()))
    assert predictor.digest == learner.digest
    same(predictor, Predictor.of(scored.SCHEMA, scored.MODEL, learner.serving_state(), device="cpu"))
    np.testing.assert_array_equal(predictor.predict(ASKED), learner.predict(ASKED))
    # Neither these keys nor the tags beside them have rows.
    np.testing.assert_array_equal(predictor.predict(batch_of([120])), predictor.predict(batch_of([7])))
