"""Batches are cut in the order received, and positions are exactly what has been cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stream.trainer.batching import BatchCutter
from tests.stream.trainer.factory import columns

# Runs of several partitions: (partition, offsets skipped before the run, examples in it, records without an example after)
RUNS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 20), st.integers(0, 2)), min_size=1, max_size=30)


def make_runs(shape):
    ends = {0: 0, 1: 0, 2: 0}
    runs = []
    for partition, skipped, examples, bad in shape:
        first = ends[partition] + skipped
        ends[partition] = first + examples + bad
        runs.append(columns(range(first, first + examples), partition=partition, after=ends[partition], letters=bad))
    return runs, ends


@given(RUNS, st.integers(1, 17))
def test_every_example_is_cut_once_in_order_and_positions_tell_which(shape, rows):
    runs, ends = make_runs(shape)
    cutter = BatchCutter(rows, dict.fromkeys(ends, 0))
    expected = [(run.partition, offset) for run in runs for offset in run.offsets.tolist()]
    cut: list[int] = []
    deltas: list[int] = []

    def check_positions():
        done = expected[: len(cut)]
        for partition, position in cutter.positions.items():
            mine = [offset for owner, offset in expected if owner == partition]
            trained = [offset for owner, offset in done if owner == partition]
            # Below the position: exactly what has been cut. So a restart reads the rest, and only the rest.
            assert [offset for offset in mine if offset < position] == trained

    for run in runs:
        cutter.add(run)
        check_positions()
        while cutter.waiting >= rows:
            batch = cutter.cut()
            assert len(batch) == rows
            cut += batch.batch.keys[:, 0].tolist()
            deltas += batch.slice(0, 1).deltas.tolist() + batch.slice(1, rows).deltas.tolist()
            check_positions()
    if cutter.waiting:
        last = cutter.cut()
        cut += last.batch.keys[:, 0].tolist()
        deltas += last.deltas.tolist()
    assert cut == [offset for _, offset in expected]
    assert deltas == [offset % 5 - 1 for _, offset in expected]
    assert cutter.waiting == 0
    read = {partition: end for partition, end in ends.items() if any(run.partition == partition for run in runs)}
    assert {partition: cutter.positions[partition] for partition in read} == read
    assert cutter.letters == sum(len(run.letters) for run in runs)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=10), st.lists(st.integers(1, 40), min_size=1, max_size=10))
def test_batches_do_not_depend_on_how_the_log_was_fetched(one_way, another_way):
    total = min(sum(one_way), sum(another_way))

    def batches(sizes):
        cutter, start, cut = BatchCutter(16, {0: 0}), 0, []
        for size in sizes:
            stop = min(start + size, total)
            if stop > start:
                cutter.add(columns(range(start, stop)))
            start = stop
            while cutter.waiting >= 16:
                cut.append((cutter.cut().batch.keys.tolist(), dict(cutter.positions)))
        return cut

    assert batches(one_way) == batches(another_way)


def test_a_run_without_examples_waits_for_what_is_older():
    cutter = BatchCutter(4, {0: 0, 1: 0})
    cutter.add(columns([0, 1], partition=0))
    cutter.add(columns([], partition=1, after=5, letters=5))
    assert cutter.positions == {0: 0, 1: 0}
    assert cutter.letters == 0
    cutter.add(columns([2, 3], partition=0))
    cutter.cut()
    assert cutter.positions == {0: 4, 1: 5}
    assert cutter.letters == 5


def test_letters_count_as_soon_as_the_position_reaches_into_their_run():
    cutter = BatchCutter(2, {0: 0})
    cutter.add(columns([0, 2, 4, 6], after=9, letters=3))
    assert cutter.letters == 0
    cutter.cut()
    assert cutter.positions == {0: 3}
    assert cutter.letters == 3
    cutter.cut()
    assert cutter.positions == {0: 9}
    assert cutter.letters == 3


def test_rates_and_corrections_of_runs_with_and_without():
    cutter = BatchCutter(3, {0: 0})
    rated = replace(columns([2, 3]), rates=np.array([0.5, 0.25]))
    for each in (columns([0, 1]), rated, replace(columns([4, 5]), corrects=np.array([True, False]))):
        cutter.add(each)
    first, second = cutter.cut(), cutter.cut()
    assert first.rates is not None
    assert (first.rates.tolist(), first.corrects) == ([1, 1, 0.5], None)
    assert second.rates is not None
    assert second.corrects is not None
    assert second.rates.tolist() == [0.25, 1, 1]
    assert second.corrects.tolist() == [False, True, False]


def test_arrivals_of_runs_with_and_without():
    cutter = BatchCutter(3, {0: 0})
    for each in (columns([0, 1]), replace(columns([2, 3]), arrived_ms=np.array([-1, 70])), columns([4, 5, 6, 7, 8])):
        cutter.add(each)
    first, second, third = cutter.cut(), cutter.cut(), cutter.cut()
    assert first.arrived_ms is not None
    assert second.arrived_ms is not None
    assert (first.arrived_ms.tolist(), second.arrived_ms.tolist()) == ([-1, -1, -1], [70, -1, -1])
    assert third.arrived_ms is None
    part = second.slice(1, 3).arrived_ms
    assert part is not None
    assert part.tolist() == [-1, -1]


def test_weights_are_left_out_only_where_all_are_one():
    cutter = BatchCutter(2, {0: 0})
    run = columns(range(4))
    run.weights[3] = 2.5
    cutter.add(run)
    assert cutter.cut().weights is None
    weights = cutter.cut().weights
    assert weights is not None
    assert np.array_equal(weights, [1, 2.5])
