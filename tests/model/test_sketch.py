"""Counts in bounded memory: never too low, exact while there is room, halved in time, and the same after a restart."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.sketch import DEPTH, LARGEST, Sketch
from tests.model.test_learner import assert_same

CPU = torch.device("cpu")


def added(sketch: Sketch, batch: list[int]) -> dict[int, int]:
    """Counts of the batch's keys once it is added."""
    keys, times = torch.unique(torch.tensor(batch), return_counts=True)
    return dict(zip(keys.tolist(), sketch.add(keys, times).tolist(), strict=True))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(-9, 9).map(lambda n: n * 0x9E3779B97F4A7), min_size=1, max_size=30), max_size=9))
def test_counts_are_never_too_low_and_a_restored_sketch_goes_on(batches: list[list[int]]) -> None:
    small, large, again = Sketch(1024, CPU), Sketch(1 << 20, CPU), Sketch(1024, CPU)
    truth: Counter[int] = Counter()
    for batch in batches:
        truth.update(batch)
        again.restore(small.state())
        counts = added(small, batch)
        assert added(again, batch) == counts
        assert_same(again.state(), small.state())
        assert all(counts[key] >= truth[key] for key in counts)
        assert added(large, batch) == {key: truth[key] for key in counts}


def test_few_of_many_keys_are_counted_too_high_before_the_counts_are_halved() -> None:
    sketch = Sketch(DEPTH << 14, CPU)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (1 << 14,), generator=generator)
    counts = torch.cat([sketch.add(part, torch.ones(len(part), dtype=torch.int64)) for part in keys[:-1].split(100)])
    assert 0.01 < float((counts > 1).float().mean()) < 0.08
    one = torch.ones(1, dtype=torch.int64)
    assert int(sketch.add(keys[:1], one * 6)) >= 7  # the addition after which all counts are halved
    assert int(sketch.add(keys[:1], one)) == 4
    assert float((sketch.add(keys[100:200], torch.zeros(100, dtype=torch.int64)) == 0).float().mean()) > 0.9


def test_a_counter_stays_at_the_largest_number() -> None:
    sketch = Sketch(1024, CPU)
    for _ in range(3):
        counts = added(sketch, [5] * 200)
    assert counts == {5: LARGEST}
