"""Each click is followed to the first delta that has learned it, and to the first answer that knows this delta."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deploy.demo.freshness import Answers, Clicks, Deltas, follow_clicks


def clicks(*rows: tuple[int, int]) -> Clicks:
    """Clicks by (partition, offset). The one at an offset arrived at 1,000 + offset, and its label at 2,000 + offset."""
    partition, offset = np.array(rows, np.int64).reshape(-1, 2).T
    return Clicks(partition, offset, offset, 1_000 + offset, 2_000 + offset, np.zeros(len(rows), np.int64))


def deltas(*rows: tuple[int, int, int]) -> Deltas:
    """Deltas by sequence and the next offsets of two partitions. Each is taken at 3,000 + sequence, and there 10 later."""
    sequence, first, second = np.array(rows, np.int64).reshape(-1, 3).T
    return Deltas(sequence, 3_000 + sequence, 3_010 + sequence, {0: first, 1: second})


def answers(*rows: tuple[int, int]) -> Answers:
    sequence, written_ms = np.array(rows, np.int64).reshape(-1, 2).T
    return Answers(sequence, written_ms)


def test_the_first_delta_beyond_the_label_and_the_first_answer_at_or_beyond_it():
    found = follow_clicks(
        clicks((0, 4), (0, 5), (1, 0), (1, 7)),
        deltas((1, 5, 0), (2, 6, 1), (3, 6, 7), (4, 9, 8)),
        answers((0, 5_000), (1, 5_001), (3, 5_002), (4, 5_003)),
    )
    assert found.total == 4
    assert found.clicks.offset.tolist() == [4, 5, 0, 7]
    assert found.taken_ms.tolist() == [3_001, 3_002, 3_002, 3_004]
    assert found.logged_ms.tolist() == [3_011, 3_012, 3_012, 3_014]
    assert found.answered_ms.tolist() == [5_001, 5_002, 5_002, 5_003]  # no answer is by delta 2 exactly
    assert found.click_to_answer_ms.tolist() == [3_997, 3_997, 4_002, 3_996]


def test_what_no_delta_or_no_answer_reaches_is_left_out_and_counted():
    found = follow_clicks(clicks((0, 1), (0, 5), (1, 9)), deltas((1, 2, 9), (2, 6, 9)), answers((1, 5_000), (0, 5_001)))
    assert found.total == 3
    assert found.clicks.offset.tolist() == [1]
    assert found.answered_ms.tolist() == [5_000]


def test_nothing_at_all():
    assert follow_clicks(clicks(), deltas((1, 2, 2)), answers((1, 5_000))).total == 0
    assert len(follow_clicks(clicks((0, 1)), deltas(), answers((1, 5_000))).clicks) == 0
    assert len(follow_clicks(clicks((0, 1)), deltas((1, 2, 2)), answers()).clicks) == 0


OFFSETS = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30)), max_size=12), OFFSETS, OFFSETS, st.lists(st.integers(0, 13)))
def test_as_one_would_by_hand(where, first, second, answered):
    ends = list(zip(sorted(first), sorted(second), strict=False))
    made = deltas(*((number, *offsets) for number, offsets in enumerate(ends, 1)))
    found = follow_clicks(clicks(*where), made, answers(*((number, 5_000 + at) for at, number in enumerate(answered))))
    expected = []
    for partition, offset in where:
        learned = next((number for number, offsets in enumerate(ends, 1) if offsets[partition] > offset), None)
        at = next((at for at, number in enumerate(answered) if learned is not None and number >= learned), None)
        if learned is not None and at is not None:
            expected.append((offset, 3_000 + learned, 5_000 + at))
    rows = zip(found.clicks.offset.tolist(), found.taken_ms.tolist(), found.answered_ms.tolist(), strict=True)
    assert list(rows) == expected
