"""Deltas, digests and restores of a learner: replicas of its deltas are its serving weights, and a restored one is the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import learner_state, reserve
from model.batch import FeatureBatch
from model.digest import dense_hash, digest_sum, row_hashes
from model.errors import ModelError, SnapshotMismatch, UpdateNotFinite
from model.frozen import Piece
from model.learner import Learner
from model.rows import ROW_PARTS, ModelDelta, Rows
from model.settings import ModelSettings
from tests.model.test_learner import SCHEMA, SETTINGS, assert_same, learn, records, snapshot

BATCH, LABELS = records(600)


def whole_digest(serving: dict[str, torch.Tensor]) -> int:
    """The digest, computed from all serving tensors."""
    dense = {name: tensor for name, tensor in serving.items() if name not in ROW_PARTS}
    return (digest_sum(row_hashes(Rows.of(serving))) + dense_hash(dense)) % 2**64


class Replica:
    """Serving weights in plain dictionaries, to which deltas are applied."""

    def __init__(self, serving: dict[str, torch.Tensor]) -> None:
        self.rows: dict[int, dict[str, float | list[float]]] = {}
        self._empty = {name: part[:0] for name, part in Rows.of(serving).parts().items()}
        self._take(Rows.of(serving))
        self.dense = {name: tensor for name, tensor in serving.items() if name not in ROW_PARTS}

    def apply(self, delta: ModelDelta) -> None:
        assert len(set(delta.rows.keys.tolist())) == len(delta.rows)
        keys, gone = set(delta.rows.keys.tolist()), set(delta.gone.tolist())
        assert len(gone) == len(delta.gone)
        assert not keys & gone
        self._take(delta.rows)
        for key in gone:
            self.rows.pop(key, None)
        if delta.dense is not None:
            assert delta.dense.keys() == self.dense.keys()
            self.dense = dict(delta.dense)
        assert delta.digest == self.digest

    def _take(self, rows: Rows) -> None:
        parts = {name: part.tolist() for name, part in rows.parts().items()}
        for at, key in enumerate(parts.pop("keys")):
            self.rows[key] = {name: part[at] for name, part in parts.items()}

    @property
    def digest(self) -> int:
        parts = {"keys": torch.tensor(list(self.rows), dtype=torch.int64)}
        for name, empty in self._empty.items():
            if name != "keys":
                parts[name] = torch.tensor([row[name] for row in self.rows.values()]).view(-1, *empty.shape[1:])
        return whole_digest({**self.dense, **parts})

    def assert_rows_are(self, learner: Learner) -> None:
        serving = learner.serving_state()
        assert self.rows == Replica(serving).rows

    def assert_is(self, learner: Learner) -> None:
        self.assert_rows_are(learner)
        serving = learner.serving_state()
        assert_same(self.dense, {name: tensor for name, tensor in serving.items() if name not in ROW_PARTS})
        assert learner.digest == whole_digest(serving)


class Steps:
    """What can happen to a learner between two batches, with a replica that gets its deltas."""

    def __init__(self, model: ModelSettings) -> None:
        self.model = model
        self.learner = Learner(SCHEMA, model, device="cpu")
        self.replica = Replica(self.learner.serving_state())
        self.at = 0

    def learn(self) -> None:
        stop = self.at + 7
        corrects = np.arange(7) % 3 == 0
        times = np.full(7, 1000.0 * self.at)
        self.learner.learn(self._batch(stop), LABELS[self.at : stop], None, corrects, times)
        self.at = stop % 595

    def learn_the_same_again(self) -> None:
        self.learner.learn(BATCH.slice(0, 7), LABELS[:7])

    def learn_in_vain(self) -> None:
        with pytest.raises(UpdateNotFinite):
            self.learner.learn(self._batch(self.at + 5), LABELS[self.at : self.at + 5], np.full(5, 1e30))
        self.at = (self.at + 5) % 595

    def take(self) -> None:
        touched = self.learner.touched
        keys = self.learner.touched_keys().tolist()
        delta = self.learner.take_delta()
        assert sorted(keys) == sorted([*delta.rows.keys.tolist(), *delta.gone.tolist()])
        assert len(keys) <= touched
        assert self.learner.touched == 0
        self.replica.apply(delta)
        self.replica.assert_is(self.learner)

    def take_rows(self) -> None:
        delta = self.learner.take_delta(dense=False)
        assert delta.dense is None
        assert delta.digest == self.learner.digest
        self.replica.apply(delta)
        self.replica.assert_rows_are(self.learner)

    def evict(self) -> None:
        """A third of the rows go, and a key that has none."""
        keys = self.learner.serving_state()["keys"]
        chosen = keys[(keys + self.at) % 3 == 0]
        before = self.learner.rows
        assert self.learner.evict(torch.cat((chosen, chosen[:1], torch.tensor([3])))) == len(chosen)
        assert self.learner.rows == before - len(chosen)

    def freeze(self) -> None:
        """What is frozen stays as it was, while rows change, go, and are used again."""
        serving, trainer = self.learner.serving_state(), self.learner.trainer_state()
        with self.learner.freeze() as frozen:
            self.learn()
            self.evict()
            pieces = frozen.pieces(9)
            found = [piece for _, piece in zip(range(2), pieces, strict=False)]
            self.learn()
            self.learn_the_same_again()
            found += pieces
        assert sum(len(piece.serving) for piece in found) == frozen.rows == len(serving["keys"])
        for name in Rows.of(serving).parts():
            parts = [piece.serving.parts()[name] for piece in found]
            assert torch.equal(torch.cat(parts or [serving[name]]), serving[name]), name
        for name in found[0].trainer if found else ():
            assert torch.equal(torch.cat([piece.trainer[name] for piece in found]), trainer[name]), name

    def restart(self) -> None:
        """A restored learner counts all that it restored as taken, so its replica begins there."""
        other = Learner(SCHEMA, self.model, device="cpu")
        other.restore(self.learner.serving_state(), self.learner.trainer_state())
        self.learner = other
        self.replica = Replica(other.serving_state())

    def restart_streamed(self) -> None:
        self.learner = streamed(self.learner, 11)
        self.replica = Replica(self.learner.serving_state())

    def _batch(self, stop: int) -> FeatureBatch:
        return BATCH.slice(self.at, stop)


STEPS: list[Callable[[Steps], None]] = [
    Steps.learn,
    Steps.learn,
    Steps.learn_the_same_again,
    Steps.learn_in_vain,
    Steps.take,
    Steps.take_rows,
    Steps.evict,
    Steps.evict,
    Steps.freeze,
    Steps.restart,
    Steps.restart_streamed,
]


@pytest.mark.parametrize("history", [False, True], ids=["plain", "history"])
@pytest.mark.parametrize("copied", [False, True], ids=["reserved", "copied"])
@settings(deadline=None, max_examples=40)
@given(steps=st.lists(st.sampled_from(STEPS), max_size=25))
def test_deltas_make_a_replica_and_the_digest_is_always_that_of_the_whole(
    copied: bool, history: bool, steps: list[Callable[[Steps], None]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if copied:
            patch.setattr(reserve, "_NO_RESERVE", None)
        run = Steps(SETTINGS.model_copy(update={"row_history": history}))
        for step in steps:
            step(run)
        run.take()


def test_a_delta_has_the_rows_of_its_batches_and_nothing_else() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learn(learner, BATCH, LABELS)
    learner.take_delta()
    part = BATCH.slice(3, 9)
    learner.learn(part, LABELS[3:9])
    learner.learn(part, LABELS[3:9])
    expected = {*part.keys.flatten().tolist(), *part.list_keys.tolist()}
    assert learner.touched == len(expected)
    delta = learner.take_delta()
    assert set(delta.rows.keys.tolist()) == expected
    before = delta.rows.embedding.clone()
    learn(learner, BATCH, LABELS)
    assert torch.equal(delta.rows.embedding, before)  # a copy


def test_the_digest_stays_as_last_taken() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    start = learner.digest
    assert start == whole_digest(learner.serving_state())
    learner.learn(BATCH, LABELS)
    assert learner.digest == start
    taken = learner.take_delta().digest
    assert learner.digest == taken != start
    empty = learner.take_delta()
    assert len(empty.rows) == 0
    assert empty.digest == taken


def test_taking_and_freezing_change_nothing_that_is_learned() -> None:
    plain, watched = (Learner(SCHEMA, SETTINGS, device="cpu") for _ in range(2))
    for start in range(0, 600, 20):
        scores = plain.learn(BATCH.slice(start, start + 20), LABELS[start : start + 20])
        with watched.freeze() as frozen:
            np.testing.assert_array_equal(watched.learn(BATCH.slice(start, start + 20), LABELS[start : start + 20]), scores)
            watched.take_delta(dense=start % 40 == 0)
            assert len([*frozen.pieces(50)]) == -(-frozen.rows // 50)
    assert_same(snapshot(watched), snapshot(plain))


# Restores.


def pieces_of(learner: Learner, rows_per_piece: int) -> tuple[list[Piece], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    with learner.freeze() as frozen:
        return list(frozen.pieces(rows_per_piece)), frozen.dense, frozen.small


def streamed(learner: Learner, rows_per_piece: int, room: int = 16) -> Learner:
    pieces, dense, small = pieces_of(learner, rows_per_piece)
    other = Learner(SCHEMA, learner.settings.model_copy(update={"initial_rows": room}), device="cpu")
    other.learn(BATCH.slice(40, 90), LABELS[40:90])  # what it was before doesn't matter
    other.begin_restore(learner.rows, small)
    for piece in pieces:
        other.restore_rows(piece.serving, piece.trainer)
    other.finish_restore(dense, small)
    return other


def trained(until: int = 300) -> Learner:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    continued(learner, 0, until)
    return learner


def continued(learner: Learner, start: int, stop: int) -> np.ndarray:
    """Scores of further learning, with late clicks, so that rows owe something."""
    scores = []
    for at in range(start, stop, 20):
        part = slice(at, at + 20)
        corrects = np.arange(20) % 4 == 1
        labels = np.where(corrects, 1, LABELS[part])
        scores.append(learner.learn(BATCH.slice(at, at + 20), labels, None, corrects, np.full(20, 500.0 * at)))
    return np.concatenate(scores)


@settings(deadline=None, max_examples=20)
@given(rows_per_piece=st.integers(1, 150), room=st.sampled_from([16, 512]), at_once=st.integers(1, 200))
def test_streamed_is_whole_bit_for_bit_and_continues_so(rows_per_piece: int, room: int, at_once: int) -> None:
    straight = trained()
    assert float(straight.trainer_state()["deferred.owed"].sum()) > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner_state, "_RESTORED_AT_ONCE", at_once)
        whole = Learner(SCHEMA, SETTINGS, device="cpu")
        whole.restore(straight.serving_state(), straight.trainer_state())
    parts = streamed(straight, rows_per_piece, room)
    for each in (whole, parts):
        assert_same(snapshot(each), snapshot(straight))
        assert each.digest == whole_digest(straight.serving_state())
        assert each.touched == 0
    scores = continued(straight, 300, 600)
    for each in (whole, parts):
        np.testing.assert_array_equal(continued(each, 300, 600), scores)
        assert_same(snapshot(each), snapshot(straight))
        assert each.take_delta().digest == straight.take_delta().digest
    straight.take_delta()


def test_rows_of_an_older_version_owe_nothing() -> None:
    learner = trained()
    pieces, dense, small = pieces_of(learner, 50)
    other = trained(100)
    other.begin_restore(learner.rows)
    for piece in pieces:
        kept = {name: value for name, value in piece.trainer.items() if not name.startswith("deferred.")}
        other.restore_rows(piece.serving, kept)
    other.finish_restore(dense, {name: value for name, value in small.items() if not name.startswith("deferred.")})
    assert not other.trainer_state()["deferred.owed"].any()
    assert not other.trainer_state()["deferred.bias"].any()
    assert other.digest == whole_digest(learner.serving_state())


def test_pieces_that_do_not_fit_are_rejected() -> None:
    learner = trained()
    pieces, dense, small = pieces_of(learner, 30)
    rows, first = learner.rows, pieces[0]
    with pytest.raises(ModelError, match="expected a call of begin_restore first, found none"):
        learner.restore_rows(first.serving, first.trainer)
    with pytest.raises(ModelError, match="expected a call of begin_restore first, found none"):
        learner.finish_restore(dense, small)
    learner.begin_restore(rows)
    wide = Rows(first.serving.keys, torch.zeros(30, 5), first.serving.first_order)
    with pytest.raises(SnapshotMismatch, match=r"tensor 'embedding': expected 30×4 of torch.float32, found 30×5"):
        learner.restore_rows(wide, first.trainer)
    with pytest.raises(SnapshotMismatch, match=r"tensor 'adagrad.embedding': expected 30×4 .*, found no such tensor"):
        learner.restore_rows(first.serving, {})
    with pytest.raises(SnapshotMismatch, match=r"tensor 'deferred.owed': expected 30 of .*, found 29"):
        learner.restore_rows(first.serving, {**first.trainer, "deferred.owed": torch.zeros(29)})
    for piece in pieces[:-1]:
        learner.restore_rows(piece.serving, piece.trainer)
    with pytest.raises(SnapshotMismatch, match=rf"expected {rows} rows, as begin_restore was given, found \d+; pieces of it"):
        learner.finish_restore(dense, small)
    with pytest.raises(SnapshotMismatch, match=rf"expected {rows} rows, as begin_restore was given, found at least \d+"):
        learner.restore_rows(first.serving, first.trainer)
    learner.restore_rows(pieces[-1].serving, pieces[-1].trainer)
    with pytest.raises(SnapshotMismatch, match=r"tensor 'mlp.0.weight': expected 16×20 .*, found no such tensor"):
        learner.finish_restore({}, small)
    learner.finish_restore(dense, small)
    assert_same(snapshot(learner), snapshot(trained()))


def test_a_learner_that_is_being_restored_does_nothing_else() -> None:
    learner = trained()
    learner.begin_restore(learner.rows)
    for act in (learner.take_delta, learner.freeze, lambda: learner.learn(BATCH, LABELS)):
        with pytest.raises(ModelError, match=r"found a restore under way with 0 of \d+ rows; call finish_restore first"):
            act()
    fresh = Learner(SCHEMA, SETTINGS, device="cpu")
    learner.restore(fresh.serving_state(), fresh.trainer_state())  # a restore that failed is begun again
    assert_same(snapshot(learner), snapshot(fresh))
    learner.learn(BATCH, LABELS)


def test_a_restore_waits_for_the_end_of_a_freeze() -> None:
    learner = trained()
    before, saved = snapshot(learner), (learner.serving_state(), learner.trainer_state())
    with learner.freeze() as frozen:
        for restore in (lambda: learner.begin_restore(5), lambda: learner.restore(*saved)):
            with pytest.raises(ModelError, match=rf"expected that no freeze is open, found one of {frozen.rows} rows"):
                restore()
        assert len([*frozen.pieces(1000)]) == 1
    assert_same(snapshot(learner), before)


def test_a_restored_learner_may_have_other_rates() -> None:
    faster = ModelSettings(hidden=(16, 8), initial_rows=16, row_learning_rate=0.5, row_history=False, cross_layers=0)
    learner = Learner(SCHEMA, faster, device="cpu")
    learner.restore(trained().serving_state(), trained().trainer_state())
    assert learner.digest == trained().take_delta().digest
