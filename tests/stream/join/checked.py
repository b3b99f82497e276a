"""The join's decisions over a log, each step checked against an oracle that never forgets."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import strategies as st

from stream.records.example import CORRECTION, FIRST
from stream.settings import JoinSettings
from tests.stream.join.oracle import ARRIVED_MS, Oracle, Partition, run_of

__all__ = ["END_MS", "SETTINGS", "Checked", "join_settings"]


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
            arrived_ms = -1 if click_ms < 0 else ARRIVED_MS + self.oracle.deciding[offset]
            assert example.click_arrived_ms == arrived_ms
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
        assert {offset: click.click_ms for (_, offset), click in state.held_clicks.items()} == {
            offset: click for offset, click in oracle.clicks.items() if not oracle.is_out(offset)
        }
        assert all(click.arrived_ms == ARRIVED_MS + oracle.deciding[offset] for (_, offset), click in state.held_clicks.items())
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
