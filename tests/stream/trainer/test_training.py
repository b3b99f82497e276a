"""Batches by count and by age, exact positions in a snapshot, and a restart that goes on bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.errors import ModelError
from model.learner import Learner
from stream.records.dead_letter import REASONS
from stream.trainer.batching import BatchCutter
from stream.trainer.bookkeeping import bookkeeping_in
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import ExampleDecoder, hash_ids
from stream.trainer.training import Training
from tests.stream.trainer.factory import ARRIVED_MS, FIRST_MS, MODEL, SCHEMA, columns, metrics, record, run
from tests.stream.trainer.fakes import FakeLearner, whole


def position(training):
    """Where a version that is captured now would stand."""
    captured = training.capture_version()
    captured.frozen.close()
    return captured.position


def make(learner, *, rows=10, age_s=0.5, positions=None, watermark_ms=0, observers=()):
    cutter = BatchCutter(rows, positions or {0: 0})
    return Training(
        learner, cutter, Evaluation(100), metrics(), max_batch_age_s=age_s, watermark_ms=watermark_ms, observers=observers
    )


def test_a_batch_closes_when_it_is_full_or_old():
    learner = FakeLearner()
    training = make(learner)
    training.add(columns(range(25)))
    assert training.step(100.0)
    assert training.step(100.1)
    assert not training.step(100.2)  # five are left: their clock starts here
    assert training.due_in_s(100.2) == pytest.approx(0.5)
    assert not training.step(100.69)
    assert training.step(100.71)
    assert learner.batches == [list(range(10)), list(range(10, 20)), list(range(20, 25))]
    assert training.positions == {0: 25}
    assert not training.step(200.0)
    assert training.due_in_s(200.0) is None


def test_age_does_not_cut_while_more_is_at_hand():
    learner = FakeLearner()
    training = make(learner)
    training.add(columns(range(5)))
    assert not training.step(0.0)
    assert not training.step(10.0, more_at_hand=True)
    training.add(columns(range(5, 12)))
    assert training.step(10.0)
    assert learner.batches == [list(range(10))]
    assert not training.step(10.1)  # the clock of the rest starts anew
    assert not training.step(10.5)
    assert training.step(10.7)


def test_a_snapshot_holds_what_is_trained_and_not_what_waits():
    learner = FakeLearner()
    training = make(learner, watermark_ms=7)
    training.add(columns(range(0, 28, 2), after=30, letters=2))
    assert position(training).offsets == {0: 0}
    assert position(training).watermark_ms == 7
    assert position(training).letters == 0
    training.step(0.0)
    captured = position(training)
    assert captured.offsets == {0: 19}
    assert captured.examples_seen == 10
    assert captured.watermark_ms == FIRST_MS + 18
    assert captured.letters == 2
    training.step(0.0)
    training.step(1.0)
    assert position(training).offsets == {0: 30}
    assert captured.offsets == {0: 19}


class Watching:
    """Remembers which examples it was shown, and how many the learner had seen by then."""

    def __init__(self, learner):
        self._learner = learner
        self.batches = []

    def observe(self, batch, scores):
        self.batches.append((batch.versions.tolist(), batch.id_hashes.tolist(), scores.tolist(), self._learner.examples_seen))


def test_every_observer_sees_every_batch_once_with_the_scores_from_before_it():
    learner = FakeLearner()
    one, other = Watching(learner), Watching(learner)
    training = make(learner, rows=2, observers=[one, other])
    training.add(columns([3, 4, 8, 9]))
    while training.step(0.0):
        pass
    hashes = [hash_ids([b"x%d" % offset for offset in pair]).tolist() for pair in ([3, 4], [8, 9])]
    assert one.batches == other.batches == [([10, 11], hashes[0], [0.5, 0.5], 2), ([15, 16], hashes[1], [0.5, 0.5], 4)]


def rated(start, rates):
    offsets = range(start, start + len(rates))
    return replace(columns(offsets), rates=None if set(rates) == {1} else np.array(rates))


def test_a_model_keeps_the_rate_of_its_first_example_and_weighs_negatives_of_other_rates():
    learner = FakeLearner()
    training = make(learner, rows=4)
    for start, rates in ((0, [0.1] * 4), (4, [0.1, 0.1, 0.2, 0.05]), (8, [1] * 4)):
        training.add(rated(start, rates))
        assert training.step(0.0)
    # Of 0 to 11 there are clicks of 0, 1, 7 and 8.
    assert learner.weights == [None, [1, 1, 0.5, 1], [1, 0.1, 0.1, 0.1]]
    assert position(training).negative_rate == 0.1


def test_corrections_weigh_what_they_say_at_any_rate_and_do_not_choose_the_models():
    learner = FakeLearner()
    training = make(learner, rows=4)
    corrected = rated(0, [1, 0.1, 0.2, 0.05])
    corrected.labels[:] = [0, 0, 0, 1]
    training.add(replace(corrected, corrects=np.array([True, False, True, True])))
    assert training.step(0.0)
    assert position(training).negative_rate == 0.1
    assert learner.weights == [None]
    training.add(
        replace(rated(4, [0.2, 0.2, 0.05, 0.05]), labels=np.zeros(4, np.float32), corrects=np.array([True, False] * 2))
    )
    assert training.step(0.0)
    assert learner.weights[1] == [1, 0.5, 1, 2]


def test_a_model_of_all_negatives_takes_some_for_many():
    learner = FakeLearner()
    learner.examples_seen = 5  # restored
    training = make(learner, rows=4)
    training.add(rated(0, [0.25] * 4))
    assert training.step(0.0)
    assert learner.weights == [[1, 1, 4, 4]]
    assert learner.negative_rate == 1


class Refusing(Learner):
    """A learner for which examples of some users aren't finite, as if their rows had grown out of bounds."""

    def __init__(self, bad):
        super().__init__(SCHEMA, MODEL, device="cpu")
        self.bad, self.asked = bad, []

    def learn(self, batch, labels, weights=None, corrects=None, impression_ms=None):
        self.asked.append(batch.keys[:, 0].tolist())
        weights = np.ones(len(batch)) if weights is None else np.array(weights)
        weights[np.isin(batch.keys[:, 0], list(self.bad))] = 1e20
        return super().learn(batch, labels, weights, corrects, impression_ms)


def test_what_cannot_be_learned_is_set_aside_and_nothing_else(caplog):
    learner, counted = Refusing({3, 21, 22}), metrics()
    watching = Watching(learner)
    training = Training(learner, BatchCutter(32, {0: 0}), Evaluation(100), counted, max_batch_age_s=0, observers=[watching])
    training.add(columns(range(64)))
    while training.step(0.0):
        pass
    letters = training.take_set_aside()
    assert [(letter.reason, letter.offset, letter.key) for letter in letters] == [
        ("not_finite_update", offset, b"x%d" % offset) for offset in (3, 21, 22)
    ]
    assert all(letter.value and letter.headers and letter.reason in REASONS for letter in letters)
    assert training.take_set_aside() == []
    assert training.positions == {0: 64}
    assert learner.examples_seen == 61
    seen = [offset - 7 for versions, *_ in watching.batches for offset in versions]
    assert seen == [offset for offset in range(64) if offset not in (3, 21, 22)]
    assert counted.not_finite_batches._value.get() == 1
    assert "offset 3, examples partition 0 offset 21, examples partition 0 offset 22" in caplog.text
    assert all(torch.isfinite(tensor).all() for tensor in learner.serving_state().values())


@pytest.mark.parametrize("restart_at", [32, 64, 96])
def test_a_restart_before_or_after_examples_that_fail_ends_with_the_same_weights(restart_at):
    bad = {3, 40, 41, 42, 70}

    def trained(learner, first, to):
        training = Training(learner, BatchCutter(32, {0: first}), Evaluation(100), metrics(), max_batch_age_s=0)
        training.add(columns(range(first, to)))
        while training.step(0.0):
            pass
        return [letter.offset for letter in training.take_set_aside()]

    whole = Refusing(bad)
    assert trained(whole, 0, 128) == sorted(bad)
    before, after = Refusing(bad), Refusing(bad)
    trained(before, 0, restart_at)
    after.restore(before.serving_state(), before.trainer_state())
    assert trained(after, restart_at, 128) == [offset for offset in sorted(bad) if offset >= restart_at]
    for name, tensor in {**whole.serving_state(), **whole.trainer_state()}.items():
        assert torch.equal(tensor, {**after.serving_state(), **after.trainer_state()}[name]), name


def test_a_batch_that_fails_changes_neither_weights_nor_optimizers():
    learner = Refusing(range(32))
    training = Training(learner, BatchCutter(32, {0: 0}), Evaluation(100), metrics(), max_batch_age_s=0)
    learner.bad = set()
    training.add(columns(range(32)))
    training.step(0.0)
    before = {**learner.serving_state(), **learner.trainer_state()}
    learner.bad = set(range(32))
    training.add(columns(range(32)))
    training.step(0.0)
    after = {**learner.serving_state(), **learner.trainer_state()}
    assert len(training.take_set_aside()) == 32
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_a_model_that_is_not_finite_itself_is_an_error_and_not_every_examples_fault():
    learner = Learner(SCHEMA, MODEL, device="cpu")
    serving, trainer = learner.serving_state(), learner.trainer_state()
    serving["bias"][:] = np.inf
    learner.restore(serving, trainer)
    training = Training(learner, BatchCutter(32, {0: 0}), Evaluation(100), metrics(), max_batch_age_s=0)
    training.add(columns(range(32)))
    with pytest.raises(ModelError, match="the model's weights aren't finite"):
        training.step(0.0)
    assert training.take_set_aside() == []


def test_an_absurd_time_does_not_move_the_watermark_for_good():
    training = make(FakeLearner())
    absurd = columns(range(10))
    absurd.impression_ms[3] = 253_402_300_799_999
    absurd.reached_ms[3] = ARRIVED_MS
    training.add(absurd)
    training.step(0.0)
    assert position(training).watermark_ms == ARRIVED_MS


def logs(count):
    """A log of good and bad records, as runs of several sizes."""
    records = [record(offset, b"{" if offset % 13 == 5 else None) for offset in range(count)]
    random = np.random.default_rng(3)
    at = 0
    while at < count:
        size = int(random.integers(1, 90))
        yield records[at : at + size]
        at += size


def train(training, records, decoder):
    if records:
        training.add(decoder.decode(run(records)))
    while training.step(0.0):
        pass


def test_killed_and_restarted_weights_equal_uninterrupted_ones_bit_for_bit():
    every = [each for records in logs(2_000) for each in records]
    decoder = ExampleDecoder(SCHEMA)
    uninterrupted = make(Learner(SCHEMA, MODEL, device="cpu"), rows=MODEL.batch_rows, age_s=1e9)
    for records in logs(2_000):
        train(uninterrupted, records, decoder)

    random = np.random.default_rng(5)
    learner = Learner(SCHEMA, MODEL, device="cpu")
    training = make(learner, rows=MODEL.batch_rows, age_s=1e9)
    snapshot = whole(training.capture_version())
    at = kills = 0
    while at < len(every):
        size = int(random.integers(1, 120))
        train(training, every[at : at + size], decoder)
        at += size
        if random.random() < 0.2:
            snapshot = whole(training.capture_version())
        if random.random() < 0.2:  # killed: all since the last snapshot is gone
            kills += 1
            learner = Learner(SCHEMA, MODEL, device="cpu")
            snapshot.restore(learner)
            training = make(learner, rows=MODEL.batch_rows, age_s=1e9, positions=snapshot.captured.position.offsets)
            training.restore(bookkeeping_in(snapshot.small))
            at = snapshot.captured.position.offsets[0]
    assert kills > 3
    good = 2_000 - len(range(5, 2_000, 13))
    assert learner.examples_seen == good // MODEL.batch_rows * MODEL.batch_rows
    expected, found = whole(uninterrupted.capture_version()), whole(training.capture_version())
    assert found.captured.position.offsets == expected.captured.position.offsets
    for ours, theirs in ((found.serving, expected.serving), (found.trainer, expected.trainer)):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            if bookkeeping_in({name: ours[name]}):  # sums of metrics are rounded by how often they were looked at
                torch.testing.assert_close(ours[name], theirs[name], equal_nan=True, msg=name)
            else:
                assert torch.equal(ours[name], theirs[name]), name
