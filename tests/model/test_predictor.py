from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import predictor as predictor_module
from model import slots, table
from model.batch import FeatureBatch
from model.digest import dense_hash, digest_sum, row_hashes
from model.errors import DigestMismatch, ModelError, SnapshotMismatch
from model.learner import Learner
from model.predictor import Predictor
from model.rows import ModelDelta, Rows
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=(gpu, pytest.mark.gpu))])

DIM = 4
SCHEMA = FeatureSchema(fields=(FieldSpec(name="user"), FieldSpec(name="tags", kind="list")), embedding_dim=DIM)
MODEL = ModelSettings(hidden=(6,), row_history=False, cross_layers=0)
NONE = torch.empty(0, dtype=torch.int64)


def random_dense(seed: int) -> dict[str, torch.Tensor]:
    """Dense parameters and average rows, all of them random."""
    generator = torch.Generator().manual_seed(seed)
    state = Learner(SCHEMA, MODEL, device="cpu").serving_state()
    names = state.keys() - {"keys", "embedding", "first_order"}
    return {name: torch.randn(state[name].shape, generator=generator) for name in sorted(names)}


def random_rows(keys: list[int], seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    count = len(keys)
    weights = torch.randn(count, DIM, generator=generator), torch.randn(count, generator=generator)
    return Rows(torch.tensor(keys, dtype=torch.int64), *weights)


class Weights:
    """What a replica should have: rows by key and dense tensors; the trainer's side of deltas."""

    def __init__(self, rows: Rows, dense: dict[str, torch.Tensor]) -> None:
        self.rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.dense = dense
        self._put(rows)

    def _put(self, rows: Rows) -> None:
        for key, embedding, first_order in zip(rows.keys.tolist(), rows.embedding, rows.first_order, strict=True):
            self.rows[key] = embedding, first_order

    def all_rows(self) -> Rows:
        keys = torch.tensor(list(self.rows), dtype=torch.int64)
        if not len(keys):
            return Rows(keys, torch.empty(0, DIM), torch.empty(0))
        return Rows(keys, *(torch.stack(part) for part in zip(*self.rows.values(), strict=True)))

    def digest(self) -> int:
        return (digest_sum(row_hashes(self.all_rows())) + dense_hash(self.dense)) % 2**64

    def fresh(self, device: str = "cpu") -> Predictor:
        rows = self.all_rows()
        serving = {**self.dense, "keys": rows.keys, "embedding": rows.embedding, "first_order": rows.first_order}
        return Predictor.of(SCHEMA, MODEL, serving, device=device)

    def change(self, rows: Rows, gone: list[int], dense: dict[str, torch.Tensor] | None) -> ModelDelta:
        for key in gone:
            self.rows.pop(key, None)
        self._put(rows)
        self.dense = self.dense if dense is None else dense
        return ModelDelta(rows, torch.tensor(gone, dtype=torch.int64), dense, self.digest())


def some_weights(count: int = 50, seed: int = 0) -> Weights:
    return Weights(random_rows(list(range(100, 100 + count)), seed), random_dense(seed))


def batch_of(keys: list[int]) -> FeatureBatch:
    """A batch that has each key as a user, with the two keys after it as tags."""
    users = np.array(keys, np.int64).reshape(-1, 1)
    return FeatureBatch(users, np.array([key + k for key in keys for k in (1, 2)], np.int64), np.arange(len(keys) + 1) * 2, 1)


ASKED = batch_of(list(range(80, 200, 3)))


def same(one: Predictor, other: Predictor) -> None:
    np.testing.assert_array_equal(one.predict(ASKED), other.predict(ASKED))
    assert one.digest == other.digest
    assert [*one.scrub()][-1] is True


def steps_of(predictor: Predictor) -> list[bool | None]:
    return [*predictor.scrub()]


# Building


@devices
def test_pieces_or_one_dictionary(device: str) -> None:
    weights = some_weights()
    rows = weights.all_rows()
    streamed = Predictor(SCHEMA, MODEL, weights.dense, expected_rows=10, device=device)  # more come than were expected
    for part in (slice(0, 1), slice(1, 30), slice(30, 30), slice(30, 50)):
        streamed.add(Rows(rows.keys[part], rows.embedding[part], rows.first_order[part]))
    streamed.ready()
    same(streamed, weights.fresh(device))
    assert streamed.digest == weights.digest()


def test_no_rows_at_all() -> None:
    weights = Weights(random_rows([], 0), random_dense(0))
    assert weights.fresh().digest == weights.digest()
    assert weights.fresh().predict(ASKED).shape == (40,)


def test_a_version_without_average_rows_has_zeros() -> None:
    weights = some_weights()
    rows = weights.all_rows()
    zeros = {name: torch.zeros_like(each) if name.startswith("typical.") else each for name, each in weights.dense.items()}
    older = {name: each for name, each in weights.dense.items() if not name.startswith("typical.")}
    found = Predictor.of(
        SCHEMA, MODEL, {**older, "keys": rows.keys, "embedding": rows.embedding, "first_order": rows.first_order}
    )
    same(found, Weights(rows, zeros).fresh())


def test_predictions_and_rows_at_the_wrong_time() -> None:
    weights = some_weights()
    predictor = Predictor(SCHEMA, MODEL, weights.dense, expected_rows=50, device="cpu")
    with pytest.raises(ModelError, match=r"predictor: expected a call of ready\(\) before predictions, found none"):
        predictor.predict(ASKED)
    predictor.ready()
    with pytest.raises(ModelError, match=r"predictor: expected rows before ready\(\), found some after it; apply a delta"):
        predictor.add(weights.all_rows())


def test_rows_of_another_dimension_are_refused_before_anything_changes() -> None:
    weights = some_weights()
    predictor = weights.fresh()
    wrong = Rows(torch.tensor([1, 2]), torch.zeros(2, DIM + 1), torch.zeros(2))
    with pytest.raises(SnapshotMismatch, match="tensor 'embedding': expected 2×4"):
        predictor.prepare(ModelDelta(wrong, NONE, None, 0))
    dense = {**weights.dense, "bias": torch.zeros(2)}
    with pytest.raises(SnapshotMismatch, match="tensor 'bias': expected 1 "):
        predictor.prepare(ModelDelta(random_rows([], 0), NONE, dense, 0))
    same(predictor, weights.fresh())


# Deltas

keys_of_rows = st.lists(st.integers(90, 130), unique=True, max_size=25)
deltas = st.lists(st.tuples(keys_of_rows, keys_of_rows, st.booleans(), st.booleans()), max_size=8)


@settings(deadline=None)
@given(keys_of_rows, deltas)
def test_after_deltas_it_is_as_one_built_of_the_result(
    first: list[int], changes: list[tuple[list[int], list[int], bool, bool]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "_LEAST_SIZE", 16)  # so that the key table grows, in many steps
        patch.setattr(table, "_MOVED_AT_LEAST", 1)
        patch.setattr(predictor_module, "_SCRUBBED_AT_ONCE", 7)
        weights = Weights(random_rows(first, 1), random_dense(1))
        predictor = weights.fresh()
        scrub = predictor.scrub()
        for number, (keys, gone, with_dense, spoiled) in enumerate(changes, start=2):
            before, digest = predictor.predict(ASKED), predictor.digest
            delta = weights.change(
                random_rows(keys, number),
                [key for key in gone if key not in keys],
                random_dense(number) if with_dense else None,
            )
            if spoiled:
                wrong = ModelDelta(delta.rows, delta.gone, delta.dense, delta.digest ^ 1)
                with pytest.raises(DigestMismatch, match=f"expected the digest {delta.digest ^ 1:016x} to result, found"):
                    predictor.prepare(wrong)
            prepared = predictor.prepare(delta)
            np.testing.assert_array_equal(predictor.predict(ASKED), before)
            assert predictor.digest == digest
            predictor.apply(prepared)
            same(predictor, weights.fresh())
            assert predictor.digest == weights.digest() == delta.digest
            verdict = next(scrub, None)
            if verdict is not None:
                assert verdict
                scrub = predictor.scrub()
        assert all(verdict in (None, True) for verdict in scrub)
        items = predictor._rows.keys.items()
        assert sorted(items.keys.tolist()) == sorted(weights.rows)


@devices
def test_large_deltas_with_growth(device: str) -> None:
    rng = np.random.default_rng(0)
    everything = rng.integers(-(2**62), 2**62, 6000).tolist()
    weights = Weights(random_rows(everything[:500], 0), random_dense(0))
    predictor = weights.fresh(device)
    for number in range(1, 15):
        keys = rng.choice(everything, rng.integers(1, 800), replace=False).tolist()
        gone = set(rng.choice(everything, rng.integers(1, 300), replace=False).tolist()) - set(keys)
        predictor.apply(predictor.prepare(weights.change(random_rows(keys, number), sorted(gone), random_dense(number))))
    same(predictor, weights.fresh(device))
    asked = batch_of(everything)
    np.testing.assert_array_equal(predictor.predict(asked), weights.fresh(device).predict(asked))


def test_a_delta_of_a_trainer() -> None:
    """From a learner's deltas the predictor has the learner's scores, bit for bit."""
    rng = np.random.default_rng(0)
    learner = Learner(SCHEMA, MODEL, device="cpu")
    predictor = Predictor.of(SCHEMA, MODEL, learner.serving_state(), device="cpu")
    learner.take_delta()
    for dense in (True, False, True, True):
        for _ in range(3):
            keys = rng.integers(0, 300, 60).tolist()
            learner.learn(batch_of(keys), rng.integers(0, 2, 60))
        delta = learner.take_delta(dense=dense)
        predictor.apply(predictor.prepare(delta))
        assert predictor.digest == learner.digest == delta.digest
    np.testing.assert_array_equal(predictor.predict(ASKED), learner.predict(ASKED))


def test_a_missed_delta_is_found_by_the_next_one() -> None:
    weights = some_weights()
    predictor = weights.fresh()
    digest = predictor.digest
    weights.change(random_rows([100, 101], 7), [], None)
    with pytest.raises(
        DigestMismatch, match=r"delta of 1 rows and 0 that go: .* nothing was changed\. Load the newest version"
    ):
        predictor.prepare(weights.change(random_rows([102], 8), [], None))
    assert predictor.digest == digest
    same(predictor, some_weights().fresh())


def test_a_prepared_delta_is_for_one_state_only() -> None:
    weights = some_weights()
    predictor = weights.fresh()
    one = predictor.prepare(weights.change(random_rows([100], 7), [], None))
    predictor.apply(one)
    with pytest.raises(
        ModelError, match=r"expected a delta that was prepared for its present state \(1\), found one for state 0"
    ):
        predictor.apply(one)
    same(predictor, weights.fresh())


def test_a_delta_can_bring_another_rate_of_negatives() -> None:
    weights = some_weights()
    predictor, corrected = weights.fresh(), weights.fresh()
    corrected.negative_rate = 0.25
    predictor.apply(predictor.prepare(weights.change(random_rows([], 1), [], None)), negative_rate=0.25)
    np.testing.assert_array_equal(predictor.predict(ASKED), corrected.predict(ASKED))


def test_no_prediction_sees_half_of_a_delta() -> None:
    """Each delta gives all rows, and the bias, one value. So all scores of a batch are equal, unless two deltas are mixed."""
    keys = list(range(100, 400))
    dense = {name: torch.zeros_like(each) for name, each in random_dense(0).items()}

    def rows(number: int) -> Rows:
        return Rows(torch.tensor(keys), torch.full((300, DIM), number / 100), torch.full((300,), number / 50))

    def state(number: int) -> dict[str, torch.Tensor]:
        return {**dense, "bias": torch.tensor([number / 10])}

    weights = Weights(rows(0), state(0))
    allowed = {}
    for number in range(12):
        expected = Weights(rows(number), state(number)).fresh().predict(batch_of(keys[:-2]))
        assert len(set(expected.tolist())) == 1
        allowed[expected[0]] = number
    predictor = weights.fresh()
    seen: list[int] = []
    problems: list[BaseException] = []
    done = threading.Event()

    def score() -> None:
        try:
            while not done.is_set():
                scores = set(predictor.predict(batch_of(keys[:-2])).tolist())
                assert len(scores) == 1
                seen.append(allowed[np.float32(scores.pop())])
        except BaseException as error:
            problems.append(error)

    readers = [threading.Thread(target=score) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for number in [*range(1, 12)] * 6:
            predictor.apply(predictor.prepare(weights.change(rows(number), [], state(number))))
            assert [*predictor.scrub()][-1]
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert not problems
    assert len(set(seen)) > 3


# Memory that changes by itself


def flip(tensor: torch.Tensor, index: int) -> None:
    """Flips one bit of an element."""
    bits = tensor.view(-1).view(torch.int32 if tensor.element_size() == 4 else torch.int64)
    bits[index] ^= 1 << 20


FLIPS: dict[str, Callable[[Predictor], None]] = {
    "embedding": lambda each: flip(each._rows.embedding, 30 * DIM),
    "first_order": lambda each: flip(each._rows.first_order, 30),
    "average row": lambda each: flip(each._rows.embedding, 1),
    "average first order": lambda each: flip(each._rows.first_order, 1),
    "key of a row": lambda each: flip(each._rows.keys._keys, 20),
    "slot": lambda each: flip(each._rows.keys._slots._words, int(each._rows.keys._slots._words.nonzero()[17])),
    "dense weight": lambda each: flip(each._dense.model.named["mlp.0.weight"], 3),
    "bias": lambda each: flip(each._dense.model.bias, 0),
}


@pytest.mark.parametrize("where", FLIPS)
def test_a_scrub_finds_a_flipped_bit(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_module, "_SCRUBBED_AT_ONCE", 8)
    predictor = some_weights().fresh()
    assert steps_of(predictor) == [None] * 7 + [True]
    FLIPS[where](predictor)
    found = steps_of(predictor)
    assert found[-1] is False
    assert not any(found[:-1])


def test_a_bit_that_flipped_in_a_row_is_also_found_when_a_delta_replaces_the_row() -> None:
    weights = some_weights()
    predictor = weights.fresh()
    flip(predictor._rows.first_order, 30)
    changed = predictor._rows.keys.keys_of(slice(29, 30)).tolist()
    with pytest.raises(DigestMismatch):
        predictor.prepare(weights.change(random_rows(changed, 5), [], None))


@pytest.mark.parametrize("at_once", [3, 8, 40])
def test_deltas_during_a_scrub_are_no_damage_and_hide_none(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_module, "_SCRUBBED_AT_ONCE", at_once)
    rng = np.random.default_rng(at_once)
    weights = some_weights()
    predictor = weights.fresh()
    for damage in (False, True):
        scrub = predictor.scrub()
        verdict = next(scrub)
        if damage:
            flip(predictor._rows.embedding, 45 * DIM)  # the row is not read yet, and no delta touches it
        spared = set(predictor._rows.keys.keys_of(slice(44, 45)).tolist())
        number = 0
        while verdict is None:
            number += 1
            keys = rng.choice(range(90, 170), 20, replace=False).tolist()
            gone = set(rng.choice(range(90, 170), 5, replace=False).tolist()) - set(keys) - spared
            delta = weights.change(random_rows([key for key in keys if key not in spared], number), sorted(gone), None)
            predictor.apply(predictor.prepare(delta))
            verdict = next(scrub)
        assert verdict is not damage
        assert not predictor._scrubs


def test_a_scrub_that_is_given_up_leaves_nothing() -> None:
    predictor = some_weights().fresh()
    scrub = predictor.scrub()
    next(scrub)
    assert len(predictor._scrubs) == 1
    scrub.close()
    assert not predictor._scrubs
