"""A sample of the clicks learned: their arrivals, at most 64, drawn evenly, and begun again after each delta."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stream.records.delta import Point
from stream.trainer.arrivals import MOST, ArrivalSample
from stream.trainer.batching import BatchCutter
from stream.trainer.captured import CapturedDelta
from stream.trainer.chain import Base, Chain, Published
from stream.trainer.columns import ExampleColumns
from stream.trainer.evaluation import Evaluation
from stream.trainer.training import Training
from tests.stream.trainer.factory import columns, metrics
from tests.stream.trainer.fakes import DeltaLog, FakeLearner


def batches_of(count: int, rows: int) -> list[ExampleColumns]:
    """Examples that arrived at the number of their row; two of seven are clicks."""
    cutter = BatchCutter(rows, {0: 0})
    cutter.add(replace(columns(range(count)), arrived_ms=np.arange(count)))
    return [cutter.cut() for _ in range(-(-count // rows))]


def clicks_of(count: int) -> list[int]:
    return [row for row in range(count) if row % 7 < 2]


@given(st.integers(1, 224), st.integers(1, 40))
def test_all_clicks_are_in_the_sample_while_there_is_room(count, rows):
    sample = ArrivalSample()
    for batch in batches_of(count, rows):
        sample.add(batch)
    assert sample.take() == tuple(clicks_of(count))
    assert sample.take() == ()


def test_a_sample_of_many_clicks_is_even_and_the_same_however_batches_were_cut():
    samples = []
    for rows in (17, 512):
        sample = ArrivalSample()
        for batch in batches_of(20_000, rows):
            sample.add(batch)
        samples.append(sample.take())
    first, second = samples
    assert first == second
    assert len(set(first)) == MOST
    assert set(first) <= set(clicks_of(20_000))
    # A uniform sample's mean is outside of this once in about 10,000 draws; this one is always the same.
    assert abs(np.mean(first) - 10_000) < 4 * 20_000 / np.sqrt(12 * MOST)


def test_clicks_that_are_taken_back_and_arrivals_that_are_not_known_are_left_out():
    [batch] = batches_of(8, 8)
    sample = ArrivalSample()
    sample.add(replace(batch, arrived_ms=None))
    sample.add(replace(batch, labels=np.zeros(8, np.float32)))
    sample.add(replace(batch, arrived_ms=np.full(8, -1)))
    assert sample.take() == ()
    sample.add(replace(batch, arrived_ms=np.where(np.arange(8) == 7, 5, -1)))
    assert sample.take() == (5,)


def test_the_earliest_is_first():
    [batch] = batches_of(200, 200)
    arrivals = list(range(200))
    random.Random(1).shuffle(arrivals)
    sample = ArrivalSample()
    sample.add(replace(batch, arrived_ms=np.array(arrivals)))
    taken = sample.take()
    assert list(taken) == sorted(taken)
    assert len(taken) == len(clicks_of(200))


async def arrivals_of(chain: Chain, log: DeltaLog, captured: CapturedDelta | None) -> tuple[int, ...]:
    """The arrivals in the header of the next delta."""
    assert captured is not None
    await chain.publish(captured)
    return log.deltas[-1].header.arrivals


async def test_a_delta_carries_the_clicks_learned_since_the_last_one_and_a_rebase_carries_none():
    learner: Any = FakeLearner()
    training = Training(learner, BatchCutter(10, {0: 0}), Evaluation(100), metrics(), max_batch_age_s=0.5)
    log = DeltaLog()
    chain = Chain("deepfm/1/0", log, None, learner.touched_keys)
    chain.begin()
    training.add(replace(columns(range(40)), arrived_ms=np.arange(40)))
    training.step(0.0)
    assert await arrivals_of(chain, log, training.capture_delta()) == (0, 1, 7, 8)
    training.step(0.0)
    learner.weight = np.inf
    assert training.capture_delta() is None  # withheld: its clicks are in no delta yet
    learner.weight = 1.0
    training.step(0.0)
    assert await arrivals_of(chain, log, training.capture_delta()) == (14, 15, 21, 22, 28, 29)
    training.step(0.0)
    rebase = Chain("deepfm/2/0", log, Base(Published(Point("deepfm/1/0", 2), 0), {}), learner.touched_keys)
    assert await arrivals_of(rebase, log, training.capture_delta()) == ()
