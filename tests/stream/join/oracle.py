"""The join as a reader of the rules would write it, with endless memory; and the real one without Kafka and RocksDB.

Whether an impression is clicked is one question, for every label policy the same; which records say so is each policy's own.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

from state.join_state import Chunk
from stream.join.events import Events
from stream.join.logic import NEVER_MS, Memory, Plan, Step, watermark
from stream.settings import JoinSettings
from tests.stream.join.fake_state import DictState

__all__ = ["Oracle", "Partition", "run_of"]

Row = tuple[bytes, int]  # id, event time


def run_of(rows: list[Row], first_offset: int, *, mark: int = -1) -> Events:
    """A run as `read_run` would have read it. Each record's value tells its offset."""
    offsets = list(range(first_offset, first_offset + len(rows)))
    values = [b"%d" % offset for offset in offsets]
    records: list[Any] = [
        SimpleNamespace(topic="t", partition=0, offset=offset, key=key, value=value, headers=())
        for offset, (key, _), value in zip(offsets, rows, values, strict=True)
    ]
    return Events([key for key, _ in rows], [time for _, time in rows], offsets, values, records, watermark_ms=mark)


class Partition:
    """Steps of the real logic over a `DictState`, with the positions that a partition keeps."""

    def __init__(self, settings: JoinSettings) -> None:
        self.settings, self.state, self.memory = settings, DictState(), Memory()
        self.impressions = self.clicks = self.examples = 0  # next offsets
        self.example_of: dict[int, int] = {}  # an impression's offset → its example's

    def step(self, runs: list[tuple[str, Events]], *, impressions_idle: bool = False, clicks_idle: bool = False) -> Plan:
        step = Step(self.settings, self.state, self.memory)
        before = self.examples
        for source, events in runs:
            if source == "impressions":
                step.impressions(events)
                self.impressions += len(events)
            else:
                step.clicks(events)
                self.clicks += len(events)
        self.allowed_ms = watermark(self.memory, impressions_idle=impressions_idle, clicks_idle=clicks_idle)
        plan = step.close(self.allowed_ms, "clicks", 0)
        chunk = None
        if plan.new_ids:
            chunk = Chunk(plan.first_offset, max(plan.remembered[key][0] for key in plan.new_ids), before)
            self.memory.add_chunk(chunk)
        self._apply(plan, chunk)
        for source_offset in (*plan.left_out, *plan.left_out_fake, *(example[3] for example in plan.examples)):
            self.example_of.setdefault(source_offset, self.examples)
            self.examples += 1
        return plan

    def _apply(self, plan: Plan, chunk: Chunk | None) -> None:
        batch = self.state.batch()
        batch.drop_pending_before(plan.expired_from_ms, plan.expired_until_ms)
        batch.drop_pending(plan.dropped_pending)
        batch.remember(plan.remembered.items())
        fake = self.settings.label_policy == "fnw"
        batch.add_pending(((*place, *row) for place, row in plan.new_pending.items()), labelled=fake)
        batch.add_early(plan.new_early)
        batch.drop_early(plan.dropped_early)
        if chunk is not None:
            batch.add_chunk(chunk, plan.new_ids)
        for forgotten in plan.forgotten:
            batch.forget(forgotten, plan.forget_before_ms, plan.remembered)
        batch.write()

    @property
    def forget_before_ms(self) -> int:
        return self.memory.watermark_ms - self.settings.window_ms - 2 * self.settings.dedupe_horizon_ms

    def low_water(self) -> tuple[int, int, int]:
        return self.memory.low_water(self.impressions, self.clicks, self.examples)


class Wait:
    """One label: when the click is there, or when none can come."""

    @staticmethod
    def came(oracle: Oracle, offset: int) -> None:
        pass

    @staticmethod
    def clicked(oracle: Oracle, offset: int, click_ms: int) -> None:
        assert offset not in oracle.firsts
        oracle.firsts[offset] = click_ms

    @staticmethod
    def passed(oracle: Oracle, offset: int) -> None:
        oracle.negative(offset)


class FakeNegatives:
    """A negative at once; when the click is there, a correction."""

    @staticmethod
    def came(oracle: Oracle, offset: int) -> None:
        oracle.negative(offset)

    @staticmethod
    def clicked(oracle: Oracle, offset: int, click_ms: int) -> None:
        assert offset not in oracle.corrections
        oracle.corrections[offset] = click_ms

    @staticmethod
    def passed(oracle: Oracle, offset: int) -> None:
        pass


POLICIES: dict[str, Any] = {"wait": Wait, "fnw": FakeNegatives}


class Oracle:
    """The rules of the join, one record after another, nothing forgotten. It is told where the watermark went.

    `settings` may be changed for others that differ in policy and rate: an impression lives by the policy it came under, and a
    negative is kept or not by the rate at the time.
    """

    def __init__(self, settings: JoinSettings) -> None:
        self.settings = settings
        self.window, self.skew, self.horizon = settings.window_ms, settings.negative_skew_ms, settings.dedupe_horizon_ms
        self.watermark_ms = NEVER_MS
        self.accepted: dict[int, Row] = {}  # by offset
        self.last: dict[bytes, int] = {}  # id → offset of the newest accepted one
        self.lives_by: dict[int, Any] = {}
        self.labels: dict[int, int] = {}  # what is decided: offset → time of its click, -1 for none
        self.firsts: dict[int, int] = {}  # and what is sent of it
        self.corrections: dict[int, int] = {}
        self.left_out: set[int] = set()
        self.waiting: dict[tuple[bytes, int], int] = {}  # early clicks: id and time → offset
        self.counts: Counter[str] = Counter()
        self.dead: set[tuple[str, int]] = set()

    def counts_for(self, click_ms: int, impression_ms: int) -> bool:
        return -self.skew <= click_ms - impression_ms <= self.window

    def impression(self, key: bytes, time_ms: int, offset: int) -> None:
        if time_ms < self.watermark_ms - self.window - self.horizon:
            self.counts["late_impressions"] += 1
            self.dead.add(("late_impression", offset))
            return
        if key in self.last and time_ms <= self.accepted[self.last[key]][1] + self.horizon:
            self.counts["duplicate_impressions"] += 1
            return
        self.counts["impressions"] += 1
        self.accepted[offset], self.last[key] = (key, time_ms), offset
        self.lives_by[offset] = POLICIES[self.settings.label_policy]
        self.lives_by[offset].came(self, offset)
        counting = sorted(time for who, time in self.waiting if who == key and self.counts_for(time, time_ms))
        if counting:
            self.labels[offset] = counting[0]
            self.lives_by[offset].clicked(self, offset, counting[0])
            self.counts["matched_clicks"] += 1
            self.counts["duplicate_clicks"] += len(counting) - 1
            for time in counting:
                del self.waiting[key, time]

    def click(self, key: bytes, time_ms: int, offset: int) -> None:
        self.counts["clicks"] += 1
        place = self.last.get(key)
        if place is not None:
            impression_ms = self.accepted[place][1]
            remembered = impression_ms >= self.watermark_ms - self.window - 2 * self.horizon
            if remembered and self.counts_for(time_ms, impression_ms):
                if self.labels.get(place, -1) >= 0:
                    self.counts["duplicate_clicks"] += 1
                elif impression_ms + self.window < self.watermark_ms:
                    self.counts["late_clicks"] += 1
                else:
                    self.counts["matched_clicks"] += 1
                    self.labels[place] = time_ms
                    self.lives_by[place].clicked(self, place, time_ms)
                return
        if time_ms + self.skew < self.watermark_ms:
            self.orphan(offset)
        elif (key, time_ms) in self.waiting:
            self.counts["duplicate_clicks"] += 1
        else:
            self.waiting[key, time_ms] = offset

    def orphan(self, offset: int) -> None:
        self.counts["orphan_clicks"] += 1
        self.dead.add(("orphan_click", offset))

    def move(self, watermark_ms: int) -> None:
        self.watermark_ms = watermark_ms
        for offset, (_, time_ms) in self.accepted.items():
            if offset not in self.labels and time_ms + self.window < watermark_ms:
                self.labels[offset] = -1
                self.lives_by[offset].passed(self, offset)
        for (key, time_ms), offset in list(self.waiting.items()):
            if time_ms + self.skew < watermark_ms:
                del self.waiting[key, time_ms]
                self.orphan(offset)

    def negative(self, offset: int) -> None:
        share = int.from_bytes(blake2b(self.accepted[offset][0], digest_size=8).digest(), "big") / 2**64
        assert offset not in self.firsts
        if share < self.settings.negative_rate:
            self.firsts[offset] = -1
            self.counts["negatives"] += 1
        else:
            self.left_out.add(offset)

    def pending(self) -> set[int]:
        return self.accepted.keys() - self.labels.keys()
