"""The decisions: against an oracle that never forgets, however the log is cut, and by hand where a rule has an edge."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state.join_state import Chunk
from stream.join import first_labels
from stream.join.logic import watermark
from stream.join.memory import Memory
from stream.join.settings_history import NEVER_MS, History
from stream.records.example import CORRECTION, FIRST
from stream.settings import JoinSettings
from tests.stream.join.oracle import Oracle, Partition, run_of

# Beyond every window and horizon below: settles everything.
END_MS = 10_000


def join_settings(**changed: Any) -> JoinSettings:
    return JoinSettings(**{"window_ms": 10, "lateness_ms": 3, "dedupe_horizon_ms": 8, "negative_skew_ms": 0, **changed})


SETTINGS = st.builds(
    join_settings,
    dedupe_horizon_ms=st.sampled_from([0, 3, 8, 30]),
    negative_skew_ms=st.sampled_from([0, 0, 2, 12]),
    max_outputs=st.sampled_from([1, 2, 5, 10_000]),
    hold_ms=st.sampled_from([0, 3, 10]),
    negative_rate=st.sampled_from([1.0, 1.0, 0.4]),
)
CHANGED = st.builds(
    join_settings,
    window_ms=st.sampled_from([4, 10, 25]),
    dedupe_horizon_ms=st.sampled_from([0, 3, 8, 30]),
    negative_skew_ms=st.sampled_from([0, 2, 12]),
    max_outputs=st.sampled_from([1, 2, 10_000]),
    hold_ms=st.sampled_from([0, 3, 10, 25]),
    negative_rate=st.sampled_from([1.0, 0.4]),
)
KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e", b"f"])
ROWS = st.lists(st.tuples(KEYS, st.integers(0, 60)), max_size=6)
RUNS = st.tuples(st.sampled_from(["impressions", "clicks"]), ROWS, st.sampled_from([-1, -1, -1, 5, 25, 45, 70]))
STEPS = st.lists(st.tuples(st.lists(RUNS, max_size=4), st.booleans(), st.booleans()), max_size=12)


class Checked:
    """The real logic and the oracle side by side; what must always hold is looked at after every step."""

    def __init__(self, chosen: JoinSettings) -> None:
        self.settings, self.real, self.oracle = chosen, Partition(chosen), Oracle(chosen)
        self.firsts: dict[int, int] = {}
        self.corrections: dict[int, int] = {}
        self.left_out: set[int] = set()
        self.dead: set[tuple[str, int]] = set()
        self.counts: Counter[str] = Counter()
        self.low = (0, 0, 0)

    def step(self, runs: list[tuple[str, list[tuple[bytes, int]], int]], impressions_idle: bool, clicks_idle: bool) -> Any:
        offsets = {"impressions": self.real.impressions, "clicks": self.real.clicks}
        cut = []
        for source, rows, mark in runs:
            cut.append((source, run_of(rows, offsets[source], mark=mark)))
            offsets[source] += len(rows)
        memory = self.real.memory
        was = memory.watermark_ms, memory.cut
        self.oracle.change(self.real.settings, memory.history.pruned(*self.real.low_water()[:2]))
        plan = self.real.step(cut, impressions_idle=impressions_idle, clicks_idle=clicks_idle)
        for source, events in cut:
            judge = self.oracle.impression if source == "impressions" else self.oracle.click
            for row in zip(events.keys, events.times_ms, events.offsets, strict=True):
                judge(*row)
        assert plan.watermark_ms == memory.watermark_ms
        assert (memory.watermark_ms, memory.cut) >= was
        self.oracle.move(memory.watermark_ms, memory.cut)
        self._hold_against_the_oracle(plan)
        self._hold_low_water()
        mine = {offset for source, events in cut if source == "impressions" for offset in events.offsets}
        stored = [*plan.left_out, *(each.source_offset for each in plan.examples if each.kind == FIRST)]
        stored = [offset for offset in stored if offset not in mine]
        assert len(stored) <= self.real.settings.max_outputs
        # Short of where it may go only because the transaction is full.
        if (memory.watermark_ms, memory.cut) < (self.real.allowed_ms, 0):
            corrections = sum(each.kind == CORRECTION for each in plan.examples)
            assert len(stored) >= max(self.real.settings.max_outputs - corrections, 1)
        return plan

    def _hold_against_the_oracle(self, plan: Any) -> None:
        for offset in plan.left_out:
            assert offset not in self.left_out | self.firsts.keys(), "left out twice, or a label as well"
            self.left_out.add(offset)
        for example in plan.examples:
            offset, click_ms = example.source_offset, example.click_ms
            if example.kind == CORRECTION:
                assert offset in self.firsts.keys() | self.left_out, "a correction of nothing"
                assert offset not in self.corrections, "a second correction"
                self.corrections[offset] = click_ms
            else:
                assert offset not in self.left_out | self.firsts.keys(), "a second first label"
                self.firsts[offset] = click_ms
            assert (example.key, example.impression_ms) == self.oracle.accepted[offset]
            assert example.value == b"%d" % offset
        leaves = []  # when real time would have sent it
        for example in plan.examples:
            chosen = self.oracle.lives_by[example.source_offset]
            due_ms = example.impression_ms + min(chosen.hold_ms, chosen.window_ms)
            leaves.append(max(due_ms, example.click_ms) if example.kind == CORRECTION else due_ms)
        assert leaves == sorted(leaves)
        for letter in plan.dead:
            assert letter.message
            assert (letter.reason, letter.offset) not in self.dead, "said twice"
            self.dead.add((letter.reason, letter.offset))
        self.counts.update(plan.counts)
        oracle, state = self.oracle, self.real.state
        assert (self.firsts, self.corrections, self.left_out) == (oracle.firsts, oracle.corrections, oracle.left_out)
        assert self.dead == oracle.dead
        assert self.counts == oracle.counts
        stored = {offset for _, offset in state.payloads}
        assert oracle.open() <= stored
        longest_ms = self.real.memory.history.max_window_ms  # what is expired is deleted by that at the latest
        assert all(time_ms >= self.real.memory.watermark_ms - longest_ms for time_ms, _ in state.payloads)
        assert not any(offset in oracle.clicks and oracle.is_out(offset) for offset in stored)
        assert {offset: click for (_, offset), click in state.held_clicks.items()} == {
            offset: click for offset, click in oracle.clicks.items() if not oracle.is_out(offset)
        }
        assert {(key, time, offset) for (key, time), offset in oracle.waiting.items()} == state.early.keys()
        waiting = [(key, click) for key, clicks in self.real.memory.early.items() for click in clicks.values()]
        assert {(key, time, offset) for key, (time, offset, _) in waiting} == state.early.keys()
        assert self.real.memory.early_clicks == len(state.early)
        # Every input is in one place.
        accounted = self.counts["impressions"] + self.counts["duplicate_impressions"] + self.counts["late_impressions"]
        assert accounted == self.real.impressions
        kinds = ("matched_clicks", "duplicate_clicks", "late_clicks", "orphan_clicks")
        assert sum(self.counts[kind] for kind in kinds) + len(state.early) == self.real.clicks == self.counts["clicks"]

    def _hold_low_water(self) -> None:
        impressions, clicks, examples = low = self.real.low_water()
        assert all(now >= was for now, was in zip(low, self.low, strict=True)), "low water fell"
        self.low = low
        assert all(offset >= impressions for _, offset in self.real.state.payloads)
        assert all(offset >= clicks for _, _, offset in self.real.state.early)
        for offset, (key, time_ms) in self.oracle.accepted.items():
            if self.oracle.remembered(offset):
                assert offset >= impressions
                assert self.real.example_of.get(offset, examples) >= examples
                if self.oracle.last[key] == offset:
                    assert self.real.state.ids[key] == (time_ms, offset, offset in self.oracle.clicks)

    def end(self) -> None:
        """A watermark record behind everything; as many steps as the cap needs."""
        self.step([("impressions", [], END_MS), ("clicks", [], END_MS)], False, False)
        for _ in range(1_000):
            if self.real.memory.watermark_ms == END_MS:
                break
            self.step([], False, False)
        self.step([], False, False)
        assert self.firsts.keys() | self.left_out == self.oracle.accepted.keys()
        state = self.real.state
        assert (state.payloads, state.held_clicks, state.early, state.ids, state.chunks) == ({}, {}, {}, {}, {})
        assert self.low == (self.real.impressions, self.real.clicks, self.real.examples)


@settings(max_examples=200, deadline=None)
@given(SETTINGS, STEPS)
def test_any_log_cut_anyhow(chosen, steps):
    checked = Checked(chosen)
    for runs, impressions_idle, clicks_idle in steps:
        checked.step(runs, impressions_idle, clicks_idle)
    checked.end()


@settings(max_examples=200, deadline=None)
@given(SETTINGS, st.lists(st.tuples(st.one_of(st.none(), CHANGED), STEPS), max_size=4))
def test_settings_change_in_the_middle(chosen, lives):
    """What was read before goes on under its own settings; nobody is labelled twice, and nobody never."""
    checked = Checked(chosen)
    for changed, steps in lives:
        if changed is not None:
            checked.real.change(changed)
        for runs, impressions_idle, clicks_idle in steps:
            checked.step(runs, impressions_idle, clicks_idle)
    checked.end()


@st.composite
def logs_in_order(draw):
    """Sources out of order within the lateness, repeated impressions and clicks, each id once: one right answer each."""
    chosen = draw(SETTINGS)
    lateness, window, skew = chosen.lateness_ms, chosen.window_ms, chosen.negative_skew_ms
    log: dict[str, list[tuple[bytes, int]]] = {"impressions": [], "clicks": []}
    times = draw(st.lists(st.integers(skew, 60), max_size=15))
    expected = {}
    for index, time_ms in enumerate(times):
        key = b"%d" % index
        log["impressions"] += [(key, time_ms)] * draw(st.integers(1, 2))
        delays = draw(st.lists(st.integers(-skew - 4, window + 4), max_size=3))
        log["clicks"] += [(key, max(time_ms + delay, 0)) for delay in delays]
        clicks = [time for who, time in log["clicks"] if who == key]
        expected[key, time_ms] = any(-skew <= click - time_ms <= window for click in clicks)
    for source, rows in log.items():
        arrivals = [time + draw(st.integers(0, lateness)) for _, time in rows]
        log[source] = [row for _, row in sorted(zip(arrivals, rows, strict=True), key=lambda pair: pair[0])]
    return chosen, log, expected


@settings(max_examples=100, deadline=None)
@given(logs_in_order(), st.data())
def test_in_order_every_cut_gives_the_labels_of_the_window_rule(given_log, data):
    chosen, log, expected = given_log
    checked, left = Checked(chosen), {source: list(rows) for source, rows in log.items()}
    while any(left.values()):
        runs = []
        for source in data.draw(st.permutations(["impressions", "clicks", "impressions", "clicks"])):
            count = data.draw(st.integers(0, 5))
            runs.append((source, left[source][:count], -1))
            del left[source][:count]
        checked.step(runs, False, False)
    checked.end()
    said = {**dict.fromkeys(checked.left_out, -1), **checked.firsts, **checked.corrections}
    found = {checked.oracle.accepted[offset]: click >= 0 for offset, click in said.items()}
    assert found == expected
    assert checked.counts["late_impressions"] == checked.counts["late_clicks"] == 0


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
