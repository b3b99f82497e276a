"""Examples that are left out: cut from runs by their offsets, while the offsets count as trained."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from state.rewinds import SkippedRange
from stream.trainer.batching import BatchCutter
from stream.trainer.evaluation import Evaluation
from stream.trainer.skips import Skips
from stream.trainer.training import Training
from tests.stream.trainer.factory import columns, metrics
from tests.stream.trainer.fakes import FakeLearner


def skips(*ranges: tuple[int, int], partition: int = 0) -> Skips:
    return Skips(SkippedRange(partition=partition, first=first, to=to) for first, to in ranges)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=5),
    st.lists(st.integers(0, 45), unique=True, max_size=30).map(sorted),
)
def test_what_is_in_no_range_stays(ranges, offsets):
    cut = skips(*ranges).cut(columns(offsets, after=50))
    assert cut.offsets.tolist() == [each for each in offsets if not any(first <= each < to for first, to in ranges)]
    assert cut.after == 50
    assert cut.batch.keys[:, 0].tolist() == [record.offset for record in cut.records] == cut.offsets.tolist()


def test_other_partitions_and_topics_that_were_made_anew_are_left_alone():
    run = columns(range(10))
    assert skips((0, 10), partition=1).cut(run) is run
    old = [SkippedRange(partition=0, first=0, to=10, topic_id="old")]
    assert Skips(old, "new").cut(run) is run
    assert len(Skips(old, "old").cut(run)) == len(Skips(old).cut(run)) == 0


def test_skipped_offsets_count_as_trained_and_nothing_sees_the_examples():
    learner, counted, known = FakeLearner(), metrics(), skips((4, 12), (20, 24))
    training = Training(learner, BatchCutter(4, {0: 0}), Evaluation(100), counted, max_batch_age_s=1e9, skips=known)
    for first in (0, 8, 16):
        training.add(columns(range(first, first + 8)))
    while training.step(0.0):
        pass
    assert learner.batches == [[0, 1, 2, 3], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert training.positions == {0: 24}
    assert counted.skipped_examples._value.get() == 12
    assert [(each.first, each.to) for each in known.begun({0: 20})] == [(4, 12)], "a manifest says what it has reached"
    assert np.isclose(training.examples_seen, 12)


def test_a_log_that_is_skipped_to_its_end_is_trained_to_its_end():
    learner = FakeLearner()
    training = Training(learner, BatchCutter(4, {0: 0}), Evaluation(9), metrics(), max_batch_age_s=1e9, skips=skips((0, 16)))
    training.add(columns(range(16)))
    assert not training.step(0.0)
    assert training.positions == {0: 16}
