"""The join as a reader of the rules would write it, with endless memory; and the real one without Kafka and RocksDB.

Each impression lives by the settings under which it was read; the oracle keeps them beside it.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

from state.join_state import Chunk
from stream.join.events import Events
from stream.join.logic import Step, watermark
from stream.join.memory import Memory
from stream.join.plan import Plan
from stream.join.settings_history import NEVER_MS, History
from stream.settings import JoinSettings
from tests.stream.join.fake_state import DictState

__all__ = ["ARRIVED_MS", "Oracle", "Partition", "run_of"]

Row = tuple[bytes, int]  # id, event time
ARRIVED_MS = 1_000_000  # arrival of the record at offset 0; each later one arrives a millisecond later


def run_of(rows: list[Row], first_offset: int, *, mark: int = -1) -> Events:
    """A run as `read_run` would have read it. Each record's value tells its offset."""
    offsets = list(range(first_offset, first_offset + len(rows)))
    values = [b"%d" % offset for offset in offsets]
    records: list[Any] = [
        SimpleNamespace(topic="t", partition=0, offset=offset, key=key, value=value, headers=(), timestamp=ARRIVED_MS + offset)
        for offset, (key, _), value in zip(offsets, rows, values, strict=True)
    ]
    return Events([key for key, _ in rows], [time for _, time in rows], offsets, values, records, watermark_ms=mark)


class Partition:
    """Steps of the real logic over a `DictState`, with the positions that a partition keeps."""

    def __init__(self, settings: JoinSettings) -> None:
        self.settings, self.state = settings, DictState()
        self.memory = Memory(History().with_settings(settings, form="", impressions=0, clicks=0, watermark_ms=NEVER_MS))
        self.impressions = self.clicks = self.examples = 0  # next offsets
        self.example_of: dict[int, int] = {}  # an impression's offset → its example's

    def change(self, settings: JoinSettings) -> None:
        """Go on under other settings, as a worker does that takes over."""
        self.settings, memory = settings, self.memory
        at = {"impressions": self.impressions, "clicks": self.clicks, "watermark_ms": memory.watermark_ms}
        memory.history = memory.history.with_settings(settings, form="", **at)
        memory.expired_ms = min(memory.expired_ms, memory.watermark_ms - memory.history.max_window_ms)

    def step(self, runs: list[tuple[str, Events]], *, impressions_idle: bool = False, clicks_idle: bool = False) -> Plan:
        memory = self.memory
        memory.history = memory.history.pruned(*self.low_water()[:2])
        step = Step(self.settings, self.state, memory)
        before = self.examples
        for source, events in runs:
            if source == "impressions":
                step.impressions(events)
                self.impressions += len(events)
            else:
                step.clicks(events)
                self.clicks += len(events)
        self.allowed_ms = watermark(memory, impressions_idle=impressions_idle, clicks_idle=clicks_idle)
        plan = step.close(self.allowed_ms, "clicks", 0)
        chunk = None
        if plan.new_ids:
            chunk = Chunk(plan.first_offset, max(plan.remembered[key][0] for key in plan.new_ids), before)
            memory.add_chunk(chunk)
        self._apply(plan, chunk)
        for source_offset in (*plan.left_out, *(example.source_offset for example in plan.examples)):
            self.example_of.setdefault(source_offset, self.examples)
            self.examples += 1
        return plan

    def _apply(self, plan: Plan, chunk: Chunk | None) -> None:
        batch = self.state.batch()
        batch.drop_pending_before(self.memory.expired_ms, plan.expired_until_ms)
        self.memory.expired_ms = max(self.memory.expired_ms, plan.expired_until_ms)
        batch.drop_pending(plan.dropped_pending)
        batch.remember(plan.remembered.items())
        batch.add_pending((*place, *row) for place, row in plan.new_pending.items())
        batch.drop_held(plan.dropped_held)
        batch.hold(plan.held.items())
        batch.add_early(plan.new_early)
        batch.drop_early(plan.dropped_early)
        if chunk is not None:
            batch.add_chunk(chunk, plan.new_ids)
        for forgotten in plan.forgotten:
            batch.forget(forgotten, plan.forget_before_ms, plan.remembered)
        batch.write()

    def low_water(self) -> tuple[int, int, int]:
        return self.memory.low_water(self.impressions, self.clicks, self.examples)


class Oracle:
    """The rules of the join, one record after another, nothing forgotten. It is told where the watermark went, and up to where
    labels are out.

    `settings` may be changed for others: an impression lives by those that it came under, and a negative is kept or not by the
    rate at the time.
    """

    def __init__(self, settings: JoinSettings) -> None:
        self.settings = settings
        self.watermark_ms = NEVER_MS
        self.late_before_ms = NEVER_MS
        # The largest of all whose impressions are remembered.
        self.skew_ms = settings.negative_skew_ms
        self.late_ms = settings.window_ms + max(settings.dedupe_horizon_ms, settings.negative_skew_ms)
        self.accepted: dict[int, Row] = {}  # by offset
        self.lives_by: dict[int, JoinSettings] = {}
        self.last: dict[bytes, int] = {}  # id → offset of the newest accepted one
        self.clicks: dict[int, int] = {}  # offset → time of its earliest click, of those read before its first label
        self.deciding: dict[int, int] = {}  # offset → offset of that click in its own topic
        self.firsts: dict[int, int] = {}  # what was sent: time of the click, -1 for none
        self.corrections: dict[int, int] = {}
        self.left_out: set[int] = set()
        self.waiting: dict[tuple[bytes, int], int] = {}  # early clicks: id and time → offset
        self.counts: Counter[str] = Counter()
        self.dead: set[tuple[str, int]] = set()

    def change(self, settings: JoinSettings, history: History) -> None:
        """From here on impressions come under these settings. The history says which are not forgotten yet."""
        self.settings, self.skew_ms, self.late_ms = settings, history.max_skew_ms, history.max_late_ms
        self._raise_late_before()

    def _raise_late_before(self) -> None:
        self.late_before_ms = max(self.late_before_ms, self.watermark_ms - self.late_ms)

    def is_out(self, offset: int) -> bool:
        return offset in self.firsts or offset in self.left_out

    def counts_for(self, click_ms: int, offset: int) -> bool:
        chosen = self.lives_by[offset]
        return -chosen.negative_skew_ms <= click_ms - self.accepted[offset][1] <= chosen.window_ms

    def remembered(self, offset: int) -> bool:
        return self.accepted[offset][1] >= self.late_before_ms - self.lives_by[offset].dedupe_horizon_ms

    def impression(self, key: bytes, time_ms: int, offset: int) -> None:
        if time_ms < self.late_before_ms:
            self.counts["late_impressions"] += 1
            self.dead.add(("late_impression", offset))
            return
        if key in self.last:
            known = self.last[key]
            if time_ms <= self.accepted[known][1] + self.lives_by[known].dedupe_horizon_ms:
                self.counts["duplicate_impressions"] += 1
                return
        self.counts["impressions"] += 1
        self.accepted[offset], self.last[key] = (key, time_ms), offset
        self.lives_by[offset] = self.settings
        counting = sorted(time for who, time in self.waiting if who == key and self.counts_for(time, offset))
        if counting:
            self.clicks[offset], self.deciding[offset] = counting[0], self.waiting[key, counting[0]]
            self.counts["matched_clicks"] += 1
            self.counts["duplicate_clicks"] += len(counting) - 1
            for time in counting:
                del self.waiting[key, time]

    def click(self, key: bytes, time_ms: int, offset: int) -> None:
        self.counts["clicks"] += 1
        place = self.last.get(key)
        if place is not None and self.remembered(place) and self.counts_for(time_ms, place):
            chosen, impression_ms = self.lives_by[place], self.accepted[place][1]
            if place in self.clicks:
                self.counts["duplicate_clicks"] += 1
                if not self.is_out(place) and time_ms < self.clicks[place]:
                    self.clicks[place], self.deciding[place] = time_ms, offset
            elif impression_ms + chosen.window_ms < self.watermark_ms or (
                self.is_out(place) and chosen.hold_ms >= chosen.window_ms
            ):
                self.counts["late_clicks"] += 1
            else:
                self.counts["matched_clicks"] += 1
                self.clicks[place], self.deciding[place] = time_ms, offset
                if self.is_out(place):
                    self.corrections[place] = time_ms
        elif time_ms + self.skew_ms < self.watermark_ms:
            self.orphan(offset)
        elif (key, time_ms) in self.waiting:
            self.counts["duplicate_clicks"] += 1
        else:
            self.waiting[key, time_ms] = offset

    def orphan(self, offset: int) -> None:
        self.counts["orphan_clicks"] += 1
        self.dead.add(("orphan_click", offset))

    def move(self, watermark_ms: int, cut: int = 0) -> None:
        self.watermark_ms = watermark_ms
        for offset, (_, time_ms) in self.accepted.items():
            chosen = self.lives_by[offset]
            hold_ms = min(chosen.hold_ms, chosen.window_ms)
            if not self.is_out(offset) and (time_ms + hold_ms, offset) < (watermark_ms, cut):
                click_ms = self.clicks.get(offset, -1)
                if 0 <= click_ms <= time_ms + hold_ms:
                    self.firsts[offset] = click_ms
                else:
                    self.negative(offset)
                    if click_ms >= 0:
                        self.corrections[offset] = click_ms
        for (key, time_ms), offset in list(self.waiting.items()):
            if time_ms + self.skew_ms < watermark_ms:
                del self.waiting[key, time_ms]
                self.orphan(offset)
        self._raise_late_before()

    def negative(self, offset: int) -> None:
        share = int.from_bytes(blake2b(self.accepted[offset][0], digest_size=8).digest(), "big") / 2**64
        if share < self.settings.negative_rate:
            self.firsts[offset] = -1
            self.counts["negatives"] += 1
        else:
            self.left_out.add(offset)

    def pending(self) -> set[int]:
        """Offsets of impressions whose first label is not out."""
        return {offset for offset in self.accepted if not self.is_out(offset)}

    def open(self) -> set[int]:
        """Offsets of impressions that a click may still label or correct."""
        return self.pending() | {
            offset
            for offset, (_, time_ms) in self.accepted.items()
            if offset not in self.clicks and time_ms + self.lives_by[offset].window_ms >= self.watermark_ms
        }
