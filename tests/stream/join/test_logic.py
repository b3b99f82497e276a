"""The decisions by hand, where a rule has an edge."""

from __future__ import annotations

from typing import Any

import pytest

from state.join_state import Chunk
from stream.join import first_labels
from stream.join.logic import watermark
from stream.join.memory import Memory
from stream.join.settings_history import NEVER_MS, History
from stream.records.example import CORRECTION, FIRST
from tests.stream.join.checked import END_MS, join_settings
from tests.stream.join.oracle import Partition, run_of


def labels(plan: Any) -> list[tuple[bytes, int, int]]:
    return [(each.key, each.impression_ms, each.click_ms) for each in plan.examples]


def moved(partition: Partition, mark: int) -> Any:
    """A step in which both sources say that they are this far."""
    marks = [("impressions", run_of([], partition.impressions, mark=mark)), ("clicks", run_of([], partition.clicks, mark=mark))]
    return partition.step(marks)


def test_a_label_leaves_when_its_hold_is_over_and_a_later_click_corrects_it():
    partition = Partition(join_settings(hold_ms=4))
    partition.step([("impressions", run_of([(b"early", 20), (b"late", 21), (b"never", 22)], 0))])
    assert labels(partition.step([("clicks", run_of([(b"early", 24)], 0))])) == []  # no label before its time
    assert labels(moved(partition, 24)) == []
    assert labels(moved(partition, 25)) == [(b"early", 20, 24)]
    assert labels(moved(partition, 27)) == [(b"late", 21, -1), (b"never", 22, -1)]
    plan = partition.step([("clicks", run_of([(b"late", 30), (b"late", 29)], 1))])
    assert [(each.key, each.click_ms, each.kind) for each in plan.examples] == [(b"late", 30, CORRECTION)]


def test_a_click_beyond_the_hold_that_was_read_before_the_label_corrects_it_at_once():
    partition = Partition(join_settings(hold_ms=4))
    partition.step([("impressions", run_of([(b"a", 20)], 0)), ("clicks", run_of([(b"a", 25)], 0))])
    plan = moved(partition, 25)
    assert [(each.click_ms, each.kind) for each in plan.examples] == [(-1, FIRST), (25, CORRECTION)]
    assert labels(partition.step([("clicks", run_of([(b"a", 22)], 1))])) == []  # a duplicate by now


def test_of_several_clicks_the_earliest_decides_also_when_it_comes_last():
    partition = Partition(join_settings(hold_ms=4))
    partition.step([("impressions", run_of([(b"a", 20)], 0)), ("clicks", run_of([(b"a", 25)], 0))])
    partition.step([("clicks", run_of([(b"a", 23), (b"a", 24)], 1))])
    assert labels(moved(partition, 25)) == [(b"a", 20, 23)]


def test_a_hold_as_long_as_the_window_never_corrects():
    partition = Partition(join_settings(max_outputs=1))
    partition.step([("impressions", run_of([(b"a", 20), (b"b", 20)], 0))])
    assert labels(moved(partition, 31)) == [(b"a", 20, -1)]
    assert partition.memory.watermark_ms == 30  # b is left for the next step, and a click of a could come still
    plan = partition.step([("clicks", run_of([(b"a", 29)], 0))])
    assert labels(plan) == [(b"b", 20, -1)]
    assert plan.counts["late_clicks"] == 1


def test_impressions_pending_keep_the_window_that_they_came_under():
    partition = Partition(join_settings())
    partition.step([("impressions", run_of([(b"old", 20)], 0))])
    partition.change(join_settings(window_ms=3))
    partition.step([("impressions", run_of([(b"new", 20)], 1)), ("clicks", run_of([(b"old", 29), (b"new", 29)], 0))])
    assert labels(moved(partition, 24)) == [(b"new", 20, -1)]
    assert labels(moved(partition, 31)) == [(b"old", 20, 29)]


def test_a_longer_horizon_counts_from_the_change_on():
    partition = Partition(join_settings(dedupe_horizon_ms=0))
    partition.step([("impressions", run_of([(b"a", 20)], 0))])
    moved(partition, 60)
    assert partition.state.ids == {}  # forgotten
    partition.change(join_settings(dedupe_horizon_ms=500))
    plan = partition.step([("impressions", run_of([(b"a", 20)], 1))])
    assert plan.counts["late_impressions"] == 1  # not a second first label


def test_the_edges_of_the_window():
    for skew, delay, positive in [(0, 0, True), (0, -1, False), (0, 10, True), (0, 11, False), (2, -2, True), (2, -3, False)]:
        for click_first in (False, True):
            partition = Partition(join_settings(negative_skew_ms=skew))
            runs = [("impressions", run_of([(b"a", 20)], 0)), ("clicks", run_of([(b"a", 20 + delay)], 0))]
            plans = [partition.step([run]) for run in (reversed(runs) if click_first else runs)]
            plans.append(moved(partition, 31))
            if not positive:
                assert [label for plan in plans for label in labels(plan)] == [(b"a", 20, -1)]
                continue
            assert [label for plan in plans for label in labels(plan)] == ([(b"a", 20, 20 + delay)] if positive else [])


def test_an_impression_waits_while_a_click_may_come():
    partition = Partition(join_settings())
    partition.step([("impressions", run_of([(b"a", 20)], 0))])
    assert labels(partition.step([("impressions", run_of([], 1, mark=30)), ("clicks", run_of([], 0, mark=30))])) == []
    assert labels(partition.step([("impressions", run_of([], 1, mark=31)), ("clicks", run_of([], 0, mark=31))])) == [
        (b"a", 20, -1)
    ]


def test_the_first_of_several_early_clicks_counts():
    partition = Partition(join_settings())
    partition.step([("clicks", run_of([(b"a", 27), (b"a", 22), (b"a", 22), (b"a", 99)], 0))])
    plan = partition.step([("impressions", run_of([(b"a", 20)], 0))])
    assert plan.counts == {"impressions": 1, "matched_clicks": 1, "duplicate_clicks": 1, "negatives": 0}
    assert labels(moved(partition, 31)) == [(b"a", 20, 22)]
    assert partition.state.early.keys() == {(b"a", 99, 3)}


def test_an_id_used_again_in_the_step_that_forgets_it():
    """Forgetting reads the state, which doesn't know yet what the same step remembers."""
    partition = Partition(join_settings(dedupe_horizon_ms=0))
    partition.step([("impressions", run_of([(b"a", 1)], 0, mark=50)), ("clicks", run_of([], 0, mark=3))])
    plan = partition.step([("impressions", run_of([(b"a", 200)], 1)), ("clicks", run_of([], 0, mark=150))])
    assert [chunk.first_offset for chunk in plan.forgotten] == [0]
    assert partition.state.ids == {b"a": (200, 1, False)}
    partition.step([("clicks", run_of([(b"a", 201)], 0))])
    assert labels(moved(partition, 300)) == [(b"a", 200, 201)]


def test_an_id_used_twice_in_one_step_holds_the_low_water_at_its_first_use():
    partition = Partition(join_settings(dedupe_horizon_ms=0))
    partition.step([("impressions", run_of([(b"a", 100), (b"b", 100), (b"a", 101)], 0))])
    assert partition.state.payloads.keys() == {(100, 0), (100, 1), (101, 2)}
    assert partition.low_water() == (0, 0, 0)


def no_horizon() -> History:
    return History().with_settings(join_settings(dedupe_horizon_ms=0), form="", impressions=0, clicks=0, watermark_ms=NEVER_MS)


def test_chunks_of_one_first_offset_are_forgotten_each():
    # Two rebuilds of which one was given up may have cut the same offsets in two ways.
    memory = Memory(no_horizon())
    for chunk in (Chunk(3, 5, 1), Chunk(3, 7, 1), Chunk(9, 6, 4)):
        memory.add_chunk(chunk)
    assert memory.low_water(20, 20, 20) == (3, 20, 1)
    assert memory.due_chunks(6) == [Chunk(3, 5, 1)]
    assert memory.low_water(20, 20, 20) == (3, 20, 1)
    assert memory.due_chunks(100) == [Chunk(9, 6, 4), Chunk(3, 7, 1)]
    assert memory.low_water(20, 20, 20) == (20, 20, 20)


def test_one_id_with_many_early_clicks_costs_no_more_than_many_ids():
    # All producers of a stream may share one broken id.
    partition = Partition(join_settings())
    rows = [(b"undefined", 100 + index) for index in range(20_000)]
    partition.step([("clicks", run_of(rows + rows, 0))])
    plan = partition.step([("impressions", run_of([], 0, mark=END_MS)), ("clicks", run_of([], 40_000, mark=END_MS))])
    partition.step([("impressions", run_of([], 0, mark=10**6)), ("clicks", run_of([], 40_000, mark=10**6))])
    assert partition.memory.early_clicks == 0
    assert plan.counts["orphan_clicks"] > 0


def test_what_one_transaction_may_hold_caps_the_watermark():
    partition = Partition(join_settings(max_outputs=3))
    rows = [(b"%d" % index, 100 + index // 2) for index in range(10)]
    partition.step([("impressions", run_of(rows, 0))])
    marks = [("impressions", run_of([], 10, mark=END_MS)), ("clicks", run_of([], 0, mark=END_MS))]
    plans = [partition.step(marks)]
    while plans[-1].watermark_ms < END_MS:
        plans.append(partition.step([]))
    assert [len(plan.examples) for plan in plans] == [3, 3, 3, 1]
    assert [plan.watermark_ms for plan in plans] == [111, 113, 114, END_MS]


def test_what_is_due_at_one_instant_is_cut_too():
    partition = Partition(join_settings(max_outputs=3))
    partition.step([("impressions", run_of([(b"%d" % index, 100) for index in range(8)], 0))])
    plans = [moved(partition, END_MS), partition.step([]), partition.step([])]
    assert [[example.source_offset for example in plan.examples] for plan in plans] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [plan.watermark_ms for plan in plans] == [110, 110, END_MS]


def test_a_transaction_is_cut_by_bytes_too(monkeypatch):
    monkeypatch.setattr(first_labels, "MAX_OUTPUT_BYTES", 2)
    partition = Partition(join_settings())
    partition.step([("impressions", run_of([(b"%d" % index, 100) for index in range(8)], 0))])  # values of one byte
    assert [len(plan.examples) for plan in (moved(partition, END_MS), partition.step([]), partition.step([]))] == [3, 3, 2]


def test_a_run_without_events_says_nothing_of_event_time():
    partition = Partition(join_settings())
    partition.step([("impressions", run_of([], 0)), ("clicks", run_of([], 0))])
    memory = partition.memory
    assert (memory.impressions_seen_ms, memory.clicks_seen_ms, memory.watermark_ms) == (NEVER_MS, NEVER_MS, NEVER_MS)


@pytest.mark.parametrize(
    ("was", "impressions", "clicks", "idle", "expected"),
    [
        (NEVER_MS, 50, 40, "", 40),
        (NEVER_MS, 50, NEVER_MS, "", NEVER_MS),
        (NEVER_MS, 50, NEVER_MS, "c", 50),
        (NEVER_MS, 50, 40, "c", 50),
        (NEVER_MS, 50, 40, "i", 40),
        (45, 50, 40, "", 45),
        (45, 50, 48, "", 48),
        (45, 50, 40, "ic", 45),
        (45, 70, 60, "ic", 60),  # watermark records move it also then
    ],
)
def test_the_watermark(was, impressions, clicks, idle, expected):
    memory = Memory(no_horizon(), watermark_ms=was, impressions_seen_ms=impressions, clicks_seen_ms=clicks)
    assert watermark(memory, impressions_idle="i" in idle, clicks_idle="c" in idle) == expected


def test_a_late_impression_says_why():
    partition = Partition(join_settings())
    partition.step([("impressions", run_of([], 0, mark=100)), ("clicks", run_of([], 0, mark=100))])
    plan = partition.step([("impressions", run_of([(b"a", 81), (b"b", 82)], 0))])
    [letter] = plan.dead
    assert (letter.reason, letter.path, letter.offset) == ("late_impression", "$.timestamp", 0)
    bound = "82 (watermark - window - dedupe horizon, or skew where that is larger)"
    assert letter.message == f"expected an event time of at least {bound}, found 81"
    assert labels(plan) == [(b"b", 82, -1)]


def test_an_orphan_says_why_and_keeps_its_bytes_and_headers():
    partition = Partition(join_settings())
    clicks = run_of([(b"a", 50)], 0)
    clicks.records[0].headers = (("traceparent", b"00-1"), ("none", None))
    partition.step([("clicks", clicks)])
    plan = partition.step([("impressions", run_of([], 0, mark=51)), ("clicks", run_of([], 1, mark=51))])
    assert [(letter.reason, letter.path, letter.topic, letter.offset, letter.key, letter.value) for letter in plan.dead] == [
        ("orphan_click", "$.impression_id", "clicks", 0, b"a", b"0")
    ]
    assert plan.dead[0].headers == clicks.records[0].headers
    assert "expected an impression with this id and 0 <= click - impression <= 10 ms" in plan.dead[0].message
