"""Freezes: what a writer reads is the table as it was, wherever training goes on between and within the writer's steps."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import frozen, reserve
from model.errors import ModelError
from model.frozen import Freeze, FrozenModel, ModelRows, Piece
from model.growing import Column
from model.learner import Learner
from tests.model.test_learner import SCHEMA, SETTINGS, learn, records

CPU = torch.device("cpu")
COLUMNS = {
    "weights": Column((3,), parts={"weight": slice(0, 2), "sum": 2}),
    "key": Column(dtype=torch.int64, parts={"key": slice(None)}),
    "since": Column(dtype=torch.float64, parts={"since": slice(None)}),
}
PARTS = ("weight", "sum", "key", "since")


class Trained:
    """Rows 1 to `count` that are changed, each time to values that were never there before."""

    def __init__(self, count: int) -> None:
        self.rows = ModelRows(COLUMNS, 2, CPU)
        self.count = 0
        self._values = 0
        self.grow(count)

    def grow(self, more: int) -> None:
        new = torch.arange(self.count + 1, self.count + more + 1)
        self.count += more
        self.rows.make_room(self.count + 1)
        self._write(new)
        self.rows.touched.add(new)

    def change(self, numbers: list[int]) -> None:
        rows = torch.tensor(sorted({1 + number % self.count for number in numbers}), dtype=torch.int64)
        self.rows.touch(rows)
        self._write(rows)

    def _write(self, rows: torch.Tensor) -> None:
        for name in COLUMNS:
            column = self.rows[name]
            self._values += 1
            column[rows] = torch.full((len(rows), *column.shape[1:]), self._values, dtype=column.dtype)

    def copy(self) -> dict[str, torch.Tensor]:
        return {name: self.rows.part(name)[1 : self.count + 1].clone() for name in PARTS}


@dataclass(frozen=True)
class Work:
    """What training does at one point of the writer's work: rows that it changes, then rows that it adds."""

    change: list[int]
    grow: int

    def on(self, trained: Trained) -> None:
        if self.change:
            trained.change(self.change)
        if self.grow:
            trained.grow(self.grow)


works = st.builds(Work, st.lists(st.integers(0, 60), max_size=6), st.sampled_from([0, 0, 0, 1, 30]))


@dataclass(frozen=True)
class Write:
    """A version that is written: rows in a piece, and the work of training at each point of the writer's."""

    piece: int
    works: list[Work]


writes = st.builds(Write, st.integers(1, 40), st.lists(works, max_size=60))


def meanwhile(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    """Calls `do` before and after each step of the writer: each copy of a part, that of the marks, and marking as read."""
    copied, mark_as_read = frozen._copied, Freeze._mark_as_read

    def copied_then(tensor: torch.Tensor) -> Any:
        do()
        out = copied(tensor)
        do()
        return out

    def marked_then(freeze: Freeze, first: int, end: int) -> None:
        do()
        mark_as_read(freeze, first, end)
        do()

    monkeypatch.setattr(frozen, "_copied", copied_then)
    monkeypatch.setattr(Freeze, "_mark_as_read", marked_then)


def joined(pieces: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    found = list(pieces)
    return {name: torch.cat([piece[name] for piece in found]) for name in PARTS}


def reads(freeze: Freeze, piece: int) -> Iterator[dict[str, torch.Tensor]]:
    for first in range(1, freeze.count + 1, piece):
        yield freeze.read(first, min(first + piece, freeze.count + 1))


@pytest.mark.parametrize("copied", [False, True], ids=["reserved", "copied"])
@settings(deadline=None, max_examples=200)
@given(count=st.integers(1, 50), writes=st.lists(writes, min_size=1, max_size=3))
def test_training_at_every_point_of_the_writers_work(copied: bool, count: int, writes: list[Write]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if copied:
            patch.setattr(reserve, "_NO_RESERVE", None)
        trained = Trained(count)
        queue: list[Work] = []
        meanwhile(patch, lambda: queue.pop(0).on(trained) if queue else None)
        for write in writes:
            expected = trained.copy()
            freeze = trained.rows.freeze(trained.count)
            queue[:] = write.works
            found = joined(reads(freeze, write.piece))
            for name in PARTS:
                assert torch.equal(found[name], expected[name]), name
            assert freeze.saved <= freeze.count
            freeze.close()
            queue.clear()
            trained.change([0, 5])


def test_a_row_is_saved_once_and_only_while_it_is_needed() -> None:
    trained = Trained(10)
    freeze = trained.rows.freeze(10)
    trained.change([0, 1])
    trained.change([1, 2])
    assert freeze.saved == 3
    freeze.read(1, 6)
    trained.change([3, 4])  # read already
    trained.grow(5)
    trained.change([12])  # wasn't there
    assert freeze.saved == 3
    trained.change([9])
    assert freeze.saved == 4
    freeze.close()
    trained.change([8])
    assert freeze.saved == 4


def same(pieces: list[Piece], serving: dict[str, torch.Tensor], trainer: dict[str, torch.Tensor]) -> None:
    for name in ("keys", "embedding", "first_order"):
        assert torch.equal(torch.cat([getattr(piece.serving, name) for piece in pieces]), serving[name]), name
    for name in pieces[0].trainer:
        assert torch.equal(torch.cat([piece.trainer[name] for piece in pieces]), trainer[name]), name


@settings(deadline=None, max_examples=25)
@given(piece=st.integers(1, 60), rows=st.sampled_from([8, 33, 64]), seed=st.integers(0, 1000), copied=st.booleans())
def test_a_learner_that_trains_while_another_thread_writes(piece: int, rows: int, seed: int, copied: bool) -> None:
    batch, labels = records(400, seed)
    interval = sys.getswitchinterval()
    with pytest.MonkeyPatch.context() as patch:
        if copied:
            patch.setattr(reserve, "_NO_RESERVE", None)
        learner = Learner(SCHEMA, SETTINGS, device="cpu")
        learn(learner, batch.slice(0, 100), labels[:100], rows)
        serving, trainer = learner.serving_state(), learner.trainer_state()
        model = learner.freeze()
        learn(learner, batch.slice(0, 50), labels[:50], rows)
        found: list[Piece] = []
        writer = threading.Thread(target=lambda: found.extend(model.pieces(piece)))
        sys.setswitchinterval(1e-6)
        try:
            writer.start()
            at = 0
            while writer.is_alive():
                times = np.full(rows, 1000.0 * at)
                stop = min(at + rows, len(batch))
                corrects = np.arange(stop - at) % 5 == 0
                learner.learn(batch.slice(at, stop), labels[at:stop], None, corrects, times[: stop - at])
                at = stop % len(batch)
        finally:
            sys.setswitchinterval(interval)
            writer.join()
        same(found, serving, trainer)
        assert all(torch.equal(model.dense[name], serving[name]) for name in model.dense)
        assert all(torch.equal(model.small[name], trainer[name]) for name in model.small)
        assert model.dense.keys() | {"keys", "embedding", "first_order"} == serving.keys()
        assert model.small.keys() | found[0].trainer.keys() == trainer.keys()
        model.close()
        assert_next_freeze(learner)


def assert_next_freeze(learner: Learner) -> None:
    with learner.freeze() as model:
        same(list(model.pieces(1000)), learner.serving_state(), learner.trainer_state())


def test_what_a_batch_that_is_not_finite_leaves_is_frozen_right() -> None:
    batch, labels = records(60)
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learn(learner, batch.slice(0, 30), labels[:30])
    serving, trainer = learner.serving_state(), learner.trainer_state()
    with learner.freeze() as model:
        with pytest.raises(ModelError, match="nothing was written"):
            learner.learn(batch, labels, np.full(60, 1e30))
        assert learner.rows > model.rows
        same(list(model.pieces(7)), serving, trainer)


def test_one_freeze_at_a_time() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learn(learner, *records(20))
    first = learner.freeze()
    with pytest.raises(ModelError, match=rf"expected that the last freeze is closed, found it open with {first.rows} rows"):
        learner.freeze()
    first.close()
    first.close()
    second = learner.freeze()
    first.close()  # closing the first again doesn't end the second
    with pytest.raises(ModelError, match="expected that the last freeze is closed"):
        learner.freeze()
    second.close()
    with pytest.raises(RuntimeError), learner.freeze():
        raise RuntimeError  # it is closed then too
    learner.freeze().close()


def test_a_closed_freeze_and_a_second_reader_are_rejected() -> None:
    model = Learner(SCHEMA, SETTINGS, device="cpu").freeze()
    model.close()
    with pytest.raises(ModelError, match="expected it open, found it closed"):
        model.pieces(5)
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learn(learner, *records(20))
    model = learner.freeze()
    pieces = model.pieces(3)
    next(pieces)
    with pytest.raises(ModelError, match="expected that its rows are read once, found a second reader"):
        model.pieces(3)
    model.close()
    with pytest.raises(ModelError, match="expected it open, found it closed"):
        next(pieces)


def test_an_empty_model_has_no_pieces() -> None:
    with Learner(SCHEMA, SETTINGS, device="cpu").freeze() as model:
        assert model.rows == 0
        assert list(model.pieces(5)) == []


def test_closing_frees_the_saved_rows() -> None:
    trained = Trained(1000)
    freeze = trained.rows.freeze(1000)
    model = FrozenModel(freeze, freeze.count, {}, {})
    trained.change(list(range(1000)))
    saved = weakref.ref(freeze._saved["weights"])
    assert saved() is not None
    del freeze
    model.close()
    assert saved() is None
