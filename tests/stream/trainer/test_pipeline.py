"""The threads: all runs are trained in order, captures come between batches, and no failure stays in a thread."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from model.errors import SnapshotMismatch, UpdateNotFinite
from model.learner import Learner
from stream.trainer.batching import BatchCutter
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import ExampleDecoder
from stream.trainer.pipeline import RUNS_WAITING, Pipeline
from stream.trainer.training import Training
from tests.stream.trainer.factory import MODEL, SCHEMA, columns, metrics, record, run
from tests.stream.trainer.fakes import FakeLearner


class Ended(BaseException):
    """Stands in for the end of the process."""


def make(learner, *, rows=32, age_s=0.05, decoder=None):
    failures: list[tuple[str, BaseException]] = []
    letters: list = []

    class Owner:
        def take_letters(self, more):
            letters.extend(more)

        def failed(self, what, error):
            failures.append((what, error))

    counted = metrics()
    training = Training(learner, BatchCutter(rows, {0: 0}), Evaluation(100), counted, max_batch_age_s=age_s)
    pipeline = Pipeline(Owner(), training, decoder or ExampleDecoder(SCHEMA), counted, threads=1)
    return pipeline, failures, letters


async def until(true, timeout_s=20.0):
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.005)


async def test_everything_is_trained_in_order_and_the_rest_by_age():
    learner = FakeLearner()
    pipeline, failures, letters = make(learner, age_s=2.0)  # longer than a busy machine lets the decoder wait
    pipeline.start()
    for start in range(0, 1_000, 50):
        await pipeline.put(run([record(offset, b"{" if offset == 70 else None) for offset in range(start, start + 50)]))
    await until(lambda: learner.examples_seen == 999)
    captured = (await pipeline.between_batches(Training.capture_version)).position
    await pipeline.stop()
    assert captured.offsets == {0: 1_000}
    assert captured.letters == len(letters) == 1
    assert [len(batch) for batch in learner.batches] == [32] * 31 + [7]
    assert failures == []


async def test_the_event_loop_waits_for_room_and_never_for_the_model():
    class Slow(FakeLearner):
        go = threading.Event()

        def learn(self, *args):
            self.go.wait(20)
            return super().learn(*args)

    learner = Slow()
    pipeline, failures, _ = make(learner, rows=1)
    pipeline.start()
    handed = 0

    async def feed():
        nonlocal handed
        for offset in range(50):
            await pipeline.put(run([record(offset)]))
            handed += 1

    feeding = asyncio.ensure_future(feed())
    longest = 0.0
    began = time.monotonic()
    while time.monotonic() - began < 0.5:
        tick = time.monotonic()
        await asyncio.sleep(0.01)
        longest = max(longest, time.monotonic() - tick)
    assert not feeding.done()
    assert handed <= RUNS_WAITING + 5  # what the two queues and the threads hold
    assert longest < 0.3
    learner.go.set()
    await feeding
    await until(lambda: learner.examples_seen == 50)
    await pipeline.stop()
    assert failures == []


async def test_examples_that_cannot_be_learned_are_dead_letters_before_a_capture_relies_on_them():
    class Picky(FakeLearner):
        def learn(self, batch, *args):
            if 40 in batch.keys[:, 0]:
                raise UpdateNotFinite("too large")
            return super().learn(batch, *args)

    learner = Picky()
    pipeline, failures, letters = make(learner)

    class Numbered(ExampleDecoder):
        def decode(self, run):
            return columns([record.offset for record in run.records])

    pipeline._decoder = Numbered(SCHEMA)
    pipeline.start()
    await pipeline.put(run([record(offset) for offset in range(64)]))
    await until(lambda: learner.examples_seen == 63)
    captured = (await pipeline.between_batches(Training.capture_version)).position
    assert captured.offsets == {0: 64}
    assert [(letter.reason, letter.offset) for letter in letters] == [("not_finite_update", 40)]
    await pipeline.stop()
    assert failures == []


async def test_stopping_leaves_what_waits_untrained():
    learner = FakeLearner()
    pipeline, failures, _ = make(learner, age_s=1e9)
    pipeline.start()
    await pipeline.put(run([record(offset) for offset in range(40)]))
    await until(lambda: learner.examples_seen == 32)
    await pipeline.stop()
    assert pipeline.training.capture_version().position.offsets == {0: 32}
    assert failures == []


async def test_what_is_raised_between_two_batches_is_the_callers_and_training_goes_on():
    learner = FakeLearner()
    pipeline, failures, _ = make(learner)
    pipeline.start()

    def other_rows(training):
        raise SnapshotMismatch("the anchor has other rows")

    with pytest.raises(SnapshotMismatch, match="other rows"):
        await pipeline.between_batches(other_rows)
    await pipeline.put(run([record(offset) for offset in range(64)]))
    await until(lambda: learner.examples_seen == 64)
    assert (await pipeline.between_batches(Training.capture_version)).position.offsets == {0: 64}
    await pipeline.stop()
    assert failures == []


@pytest.mark.parametrize("broken", ["decoding", "training"])
async def test_a_failure_in_a_thread_is_fatal(broken):
    class Diverged(FakeLearner):
        def learn(self, *args):
            raise RuntimeError("diverged")

    class Unreadable(ExampleDecoder):
        def decode(self, run):
            raise RuntimeError("bug")

    learner = Diverged() if broken == "training" else FakeLearner()
    pipeline, failures, _ = make(learner, decoder=Unreadable(SCHEMA) if broken == "decoding" else None)
    pipeline.start()
    await pipeline.put(run([record(offset) for offset in range(32)]))
    await until(lambda: failures)
    [(what, error)] = failures
    assert what == f"{broken} thread"
    assert isinstance(error, RuntimeError)
    await pipeline.stop()


async def test_a_real_learner_in_the_thread_learns():
    learner = Learner(SCHEMA, MODEL, device="cpu")
    pipeline, failures, _ = make(learner)
    pipeline.start()
    await pipeline.put(run([record(offset) for offset in range(3_000)]))
    await until(lambda: learner.examples_seen == 3_000)
    report = (await pipeline.between_batches(Training.capture_version)).evaluation.report()
    await pipeline.stop()
    assert report["progressive", "window"].auc > 0.9  # which user it is says it all
    assert failures == []
