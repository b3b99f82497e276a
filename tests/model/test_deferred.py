"""Deferred negatives: rows are charged every score once, at once if no click is late, and new rows aren't pushed too low."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from model.batch import FeatureBatch
from model.deferred import Deferred
from model.errors import SnapshotMismatch
from model.growing import Growing
from model.learner import Learner
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings

CPU = torch.device("cpu")
SCHEMA = FeatureSchema(fields=(FieldSpec(name="a"), FieldSpec(name="b")), embedding_dim=4)
SMALL = ModelSettings(hidden=(8,), initial_rows=64, defer_negatives=True, row_history=False, cross_layers=0)
FAST = ModelSettings(
    hidden=(8,), initial_rows=64, dense_learning_rate=5e-3, row_learning_rate=0.03, row_history=False, cross_layers=0
)


def batch_of(*columns: list[int]) -> FeatureBatch:
    keys = np.array(columns, np.int64).T
    return FeatureBatch(np.ascontiguousarray(keys), np.empty(0, np.int64), np.zeros(1, np.int64), 0)


class LateClick(NamedTuple):
    """A click that corrects its impression in a later step; `a` and `b` are the impression's feature values."""

    due_step: int
    a: int
    b: int
    shown_step: int


def charge(deferred: Deferred, row: int, scores: list[float], labels: list[float], corrects: list[bool], at_ms: float) -> float:
    """What one batch charges to one row: the sum of the row's slopes, without the labels."""
    f, y, back = torch.tensor(scores), torch.tensor(labels), torch.tensor(corrects)
    slopes = torch.where(back, -torch.ones(len(f)), f - y)
    inverse = torch.zeros(len(f), dtype=torch.int64)
    times = torch.full((len(f),), at_ms, dtype=torch.float64)
    factors = deferred.factors(
        torch.tensor([row]), inverse, torch.arange(len(f)), f, slopes, y, back if back.any() else None, times
    )
    deferred.keep()
    own = slopes if factors is None else slopes * factors
    return float((own + torch.where(back, torch.ones(len(f)), y)).sum())


def test_nothing_is_deferred_before_a_click_has_come_late() -> None:
    deferred = Deferred(Growing(Deferred.COLUMNS, 8, CPU))
    assert charge(deferred, 1, [0.1, 0.2, 0.9], [0, 0, 1], [False] * 3, 1_000.0) == pytest.approx(1.2)
    assert deferred.known_share == 1


def test_a_row_is_charged_every_score_once_whatever_the_delays() -> None:
    rows = Growing(Deferred.COLUMNS, 8, CPU)
    deferred = Deferred(rows)
    charge(deferred, 1, [0.1, 0.3], [1, 0], [False, False], 0.0)
    charge(deferred, 1, [0.2, 0.2, 0.2], [1, 1, 1], [True] * 3, 30_000.0)  # three of four clicks are late
    assert deferred.known_share == pytest.approx(0.25, rel=0.01)
    charged, scores = 0.0, 0.0
    rng = np.random.default_rng(0)
    for step in range(50):
        f = rng.uniform(0.01, 0.2, 20).tolist()
        scores += sum(f)
        now = charge(deferred, 5, f, [0.0] * 20, [False] * 20, 40_000.0 + 500 * step)
        if step == 0:
            assert now == pytest.approx(0.25 * sum(f), rel=0.02)  # the rest is owed
        charged += now
    # What is due is charged in a batch of corrections alone, too. After enough time, everything has been charged.
    charged += charge(deferred, 5, [0.3, 0.1], [1, 1], [True, True], 70_000.0)
    charged += charge(deferred, 5, [0.1], [0], [False], 10_000_000.0)
    scores += 0.1
    owed = float(rows["owed"][5])
    assert charged + owed == pytest.approx(scores, rel=1e-4)
    assert owed < 0.1


def test_one_wrong_time_does_not_stop_what_falls_due() -> None:
    deferred = Deferred(Growing(Deferred.COLUMNS, 8, CPU))
    charge(deferred, 1, [0.1], [1], [False], 0.0)
    charge(deferred, 1, [0.1], [1], [True], 0.0)
    charge(deferred, 2, [0.5], [0], [False], 1e12)  # far ahead
    before = charge(deferred, 2, [0.5], [0], [False], 5_000.0)
    after = charge(deferred, 2, [0.5], [0], [False], 5_000_000.0)
    assert after > before


def test_a_new_value_among_late_clicks_begins_nearer_to_the_truth() -> None:
    """`a` has a new value every 300 batches, and 3 of 4 clicks come 150 batches late."""

    def highest(*, defer: bool) -> float:
        learner = Learner(SCHEMA, FAST.model_copy(update={"defer_negatives": defer}), device="cpu")
        rng = np.random.default_rng(1)
        waiting: list[LateClick] = []
        ratios = []
        for step in range(1_500):
            value, others = step // 300, rng.integers(100, 120, 64)
            clicked = rng.random(64) < 0.1
            early = clicked & (rng.random(64) < 0.25)
            back = [click for click in waiting if click.due_step <= step]
            waiting = [click for click in waiting if click.due_step > step]
            waiting += [LateClick(step + 150, value, int(other), step) for other in others[clicked & ~early]]
            a = [value] * 64 + [click.a for click in back]
            b = [*others.tolist(), *[click.b for click in back]]
            labels = np.array([*early, *[True] * len(back)], np.float32)
            corrects = np.array([False] * 64 + [True] * len(back))
            times = np.array([step * 1_000] * 64 + [click.shown_step * 1_000 for click in back])
            batch = batch_of([number + 1 for number in a], b)
            scores = learner.learn(batch, labels, None, corrects if len(back) else None, times)
            if step >= 600 and step % 300 < 30:  # a value begins
                ratios.append(scores[:64].mean() / 0.1)
        return float(np.mean(ratios))

    deferred, at_once = highest(defer=True), highest(defer=False)
    assert deferred < at_once - 0.1


def test_a_restored_learner_continues_bit_for_bit_and_an_older_version_owes_nothing() -> None:
    def steps(learner: Learner, since: int, until: int) -> None:
        for step in range(since, until):
            rng = np.random.default_rng(step)
            corrects = rng.random(32) < 0.3
            labels = np.where(corrects, 1.0, rng.random(32) < 0.2)
            batch = batch_of(rng.integers(1, 9, 32).tolist(), rng.integers(20, 29, 32).tolist())
            learner.learn(batch, labels, None, corrects, np.full(32, step * 1_000))

    whole, first, second, older = (Learner(SCHEMA, SMALL, device="cpu") for _ in range(4))
    steps(whole, 0, 20)
    steps(first, 0, 10)
    second.restore(first.serving_state(), first.trainer_state())
    steps(second, 10, 20)
    for name, value in {**whole.serving_state(), **whole.trainer_state()}.items():
        assert torch.equal(value, {**second.serving_state(), **second.trainer_state()}[name]), name
    state = first.trainer_state()
    assert float(state["deferred.owed"].sum()) > 0
    older.restore(first.serving_state(), {name: value for name, value in state.items() if not name.startswith("deferred.")})
    assert float(older.trainer_state()["deferred.owed"].sum()) == 0
    with pytest.raises(SnapshotMismatch, match="deferred"):
        second.restore(first.serving_state(), {**state, "deferred.owed": state["deferred.owed"][:-1]})
