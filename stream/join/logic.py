"""The decisions of the join, pure: a state and one step's events in; labels, dead letters and state changes out.

Times are event times in ms. With W the watermark, and `window`, `hold`, `horizon` and `skew` from the settings that an
impression was read under (`terms.py`):

- a click counts for its impression when -skew <= t_click - t_impression <= window;
- the first label leaves when t_impression + hold < W, in the order of impressions: positive if a click that has been read by
  then has t_click <= t_impression + hold, else negative. So the moment at which a label comes says nothing about the label;
- a later click is a correction. One that was read before the first label waits for it. With hold = window there is none;
- a click without an impression is an orphan once t_click + skew < W;
- an impression older than W - window - max(horizon, skew) is late: an id is remembered while a click for it may wait;
- an impression is a duplicate of the remembered one with its id when it is at most `horizon` newer. The rule looks at the two
  records alone, not at W, so that a rebuild, which knows only today's W, decides as it was decided then;
- ids are remembered for one more horizon: the oldest that an impression which isn't late can be a duplicate of.

Of negatives only those that `Sampling` keeps go out; the offsets of the others do, so that every impression is accounted for.

A step takes its runs as they came, and only then moves the watermark, labels and expires: how a log was cut into steps never
changes a label that the watermark has not yet settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Protocol

import msgspec

from state.join_state import Chunk, Entry, Pending
from stream.join.events import Events
from stream.join.memory import EarlyClick, Memory
from stream.join.sampling import Sampling
from stream.join.settings_history import NEVER_MS, Terms
from stream.records.dead_letter import DeadLetter
from stream.records.record import Header
from stream.settings import JoinSettings

__all__ = [
    "CORRECTION",
    "FIRST",
    "Example",
    "Place",
    "Plan",
    "Step",
    "StoredState",
    "packed_click",
    "watermark",
]

FIRST = "first"
CORRECTION = "correction"  # of a negative that went out before

# id, value, impression time, source offset, click time (-1: negative), one of the two above
Example = tuple[bytes, bytes, int, int, int, str]
Place = tuple[int, int]  # an impression's event time and offset

# Bytes of impressions labelled in one transaction: what `max_outputs` of 1.6 kB come to.
MAX_OUTPUT_BYTES = 32 << 20


class StoredState(Protocol):
    """What the logic reads of `state.join_state.JoinState`; tests put a dictionary behind it."""

    def entries(self, keys: list[bytes]) -> list[Entry | None]: ...
    def packed_entries(self, keys: list[bytes]) -> list[bytes | None]: ...
    def pending(self, places: list[Place]) -> list[Pending | None]: ...
    def pending_between(self, begin: Place, end: Place) -> Iterator[Pending]: ...
    def held(self, places: list[Place]) -> list[int | None]: ...
    def held_between(self, begin: Place, end: Place) -> dict[Place, int]: ...


def packed_click(record: Any) -> bytes:
    """What a click's dead letter will have of it, should no impression come: value and headers."""
    return msgspec.msgpack.encode((record.value, record.headers))


@dataclass(slots=True)
class Plan:
    """What one step decided: what goes out in its transaction, and what changes in the state after it.

    Negatives left out are named by their impressions' offsets. `settled` counts first labels, those left out included.
    """

    examples: list[Example] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    held: dict[Place, int] = field(default_factory=dict)  # impressions whose label waits, and the time of their click
    dropped_held: list[Place] = field(default_factory=list)
    set_aside: dict[Place, int] = field(default_factory=dict)  # impressions whose positive label is too large, likewise
    settled: int = 0
    dead: list[DeadLetter] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    remembered: dict[bytes, Entry] = field(default_factory=dict)
    new_ids: list[bytes] = field(default_factory=list)
    first_offset: int = -1  # of the first impression remembered
    new_pending: dict[Place, tuple[bytes, bytes]] = field(default_factory=dict)
    dropped_pending: list[Place] = field(default_factory=list)
    new_early: list[tuple[bytes, EarlyClick]] = field(default_factory=list)
    dropped_early: list[tuple[bytes, EarlyClick]] = field(default_factory=list)
    forgotten: list[Chunk] = field(default_factory=list)
    forget_before_ms: Callable[[int], int] = field(default=lambda offset: NEVER_MS)  # by offset; newer uses of ids are kept
    expired_until_ms: int = 0
    watermark_ms: int = NEVER_MS


def watermark(memory: Memory, *, impressions_idle: bool, clicks_idle: bool) -> int:
    """The watermark that a partition's sources allow; it never falls, and holds while both are idle."""
    if impressions_idle and clicks_idle:
        allowed = min(memory.impressions_seen_ms, memory.clicks_seen_ms)
    elif impressions_idle:
        allowed = memory.clicks_seen_ms
    elif clicks_idle:
        allowed = memory.impressions_seen_ms
    else:
        allowed = min(memory.impressions_seen_ms, memory.clicks_seen_ms)
    return max(memory.watermark_ms, allowed)


class Step:
    """One step over a partition. Call `impressions` and `clicks` for each run in order, then `close`.

    The state isn't touched; `Memory` is changed as decided, so a step that can't be committed ends the process.
    """

    def __init__(self, settings: JoinSettings, state: StoredState, memory: Memory) -> None:
        self._lateness, self._max_outputs = settings.lateness_ms, settings.max_outputs
        self._sampling = Sampling(settings.negative_rate)
        self._state, self._memory = state, memory
        self._history, self._terms = memory.history, memory.history.current
        self.plan = Plan(watermark_ms=memory.watermark_ms)
        self._late_before = self._history.late_before(memory.watermark_ms)

    def impressions(self, events: Events) -> None:
        """Remember a run's impressions; early clicks that count for one wait for its label."""
        plan, memory = self.plan, self._memory
        plan.dead.extend(events.dead)
        self._see("impressions", events)
        if not events.keys:
            return
        stored = self._state.packed_entries(events.keys)
        fresh = dict(zip(events.keys, zip(events.times_ms, events.offsets, [False] * len(events), strict=True), strict=True))
        if (
            len(fresh) == len(events)
            and stored.count(None) == len(stored)
            and min(events.times_ms) >= self._late_before
            and fresh.keys().isdisjoint(plan.remembered)
        ):
            # Nothing but new ids: the whole run at once.
            plan.remembered.update(fresh)
            self._new_from(events.offsets[0])
            plan.new_ids.extend(events.keys)
            places = zip(events.times_ms, events.offsets, strict=True)
            plan.new_pending.update(zip(places, zip(events.keys, events.values, strict=True), strict=True))
            plan.counts["impressions"] += len(events)
            for key in fresh.keys() & memory.early.keys():
                self._match_early(key)
        else:
            self._impressions_one_by_one(events)

    def _impressions_one_by_one(self, events: Events) -> None:
        plan = self.plan
        entries = self._state.entries(events.keys)
        for index, (key, time_ms, offset) in enumerate(zip(events.keys, events.times_ms, events.offsets, strict=True)):
            known = plan.remembered.get(key) or entries[index]
            if time_ms < self._late_before:
                bound = f"{self._late_before} (watermark - window - dedupe horizon, or skew where that is larger)"
                message = f"expected an event time of at least {bound}, found {time_ms}"
                plan.dead.append(DeadLetter.of(events.records[index], "late_impression", "$.timestamp", message))
                plan.counts["late_impressions"] += 1
            elif known is not None and time_ms <= known[0] + self._terms_of(known[1]).horizon_ms:
                plan.counts["duplicate_impressions"] += 1
            else:
                plan.counts["impressions"] += 1
                self._new_from(offset)
                plan.new_ids.append(key)
                plan.remembered[key] = (time_ms, offset, False)
                plan.new_pending[time_ms, offset] = (key, events.values[index])
                if key in self._memory.early:
                    self._match_early(key)

    def _terms_of(self, offset: int) -> Terms:
        return self._terms if offset >= self._terms.impressions_from else self._history.of(offset)

    def _new_from(self, offset: int) -> None:
        # Not from `remembered`: an id used twice in a step has only its later offset there.
        if self.plan.first_offset < 0:
            self.plan.first_offset = offset

    def _match_early(self, key: bytes) -> None:
        """The earliest early click that counts for a new impression waits for its label; the others are duplicates."""
        time_ms, offset, _ = self.plan.remembered[key]
        waiting = self._memory.early[key]
        counting = sorted(click for click in waiting.values() if self._terms.counts(click[0], time_ms))
        if not counting:
            return
        self._memory.drop_early(key, counting)
        self.plan.dropped_early.extend((key, click) for click in counting)
        self.plan.counts["matched_clicks"] += 1
        self.plan.counts["duplicate_clicks"] += len(counting) - 1
        self.plan.remembered[key] = (time_ms, offset, True)
        self.plan.held[time_ms, offset] = counting[0][0]

    def clicks(self, events: Events) -> None:
        """Match a run's clicks: one in the window of its impression waits for the first label, or corrects it."""
        plan, memory = self.plan, self._memory
        plan.dead.extend(events.dead)
        self._see("clicks", events)
        entries = self._state.entries(events.keys)
        matched: list[tuple[Place, int]] = []  # of impressions whose first label is out, or says itself whether it is
        repeated: list[tuple[Place, int]] = []  # of impressions whose label waits
        for index, (key, time_ms, offset) in enumerate(zip(events.keys, events.times_ms, events.offsets, strict=True)):
            plan.counts["clicks"] += 1
            entry = plan.remembered.get(key) or entries[index]
            if entry is None:
                self._keep_early(events.records[index], key, time_ms, offset)
                continue
            terms, place = self._terms_of(entry[1]), entry[:2]
            if not terms.counts(time_ms, entry[0]) or entry[0] < self._late_before - terms.horizon_ms:
                self._keep_early(events.records[index], key, time_ms, offset)
                continue
            is_out = memory.first_is_out(*place, terms) and place not in plan.new_pending
            if entry[2]:
                plan.counts["duplicate_clicks"] += 1
                if not is_out:
                    repeated.append((place, time_ms))
            elif entry[0] + terms.window_ms < plan.watermark_ms or (is_out and terms.hold_ms >= terms.window_ms):
                plan.counts["late_clicks"] += 1
            else:
                plan.counts["matched_clicks"] += 1
                plan.remembered[key] = (*place, True)
                if is_out or terms.legacy:
                    matched.append((place, time_ms))
                else:
                    plan.held[place] = time_ms
        self._match_stored(matched)
        self._match_sooner(repeated)

    def _match_stored(self, matched: list[tuple[Place, int]]) -> None:
        """Correct the labels that are out. Impressions of version 0.1.0 say themselves whether theirs is."""
        plan = self.plan
        for (place, click_ms), row in zip(matched, self._state.pending([place for place, _ in matched]), strict=True):
            if row is None:
                raise RuntimeError(
                    f"impression at offset {place[1]} (event time {place[0]}) is pending but its bytes are not in the state: "
                    "the state folder is damaged. Stop the worker, delete it and start again; it is rebuilt from the log."
                )
            time_ms, offset, key, value, labelled = row
            if labelled or self._memory.first_is_out(time_ms, offset, self._terms_of(offset)):
                plan.examples.append((key, value, time_ms, offset, click_ms, CORRECTION))
                plan.dropped_pending.append(place)
            else:
                plan.held[place] = click_ms

    def _match_sooner(self, repeated: list[tuple[Place, int]]) -> None:
        """Of several clicks for an impression whose label waits, the earliest counts."""
        stored = self._state.held([place for place, _ in repeated]) if repeated else []
        for (place, click_ms), held_ms in zip(repeated, stored, strict=True):
            held_ms = self.plan.held.get(place, held_ms)
            if held_ms is not None and click_ms < held_ms:
                self.plan.held[place] = click_ms

    def _keep_early(self, record: Any, key: bytes, time_ms: int, offset: int) -> None:
        if time_ms + self._history.max_skew_ms < self._memory.watermark_ms:
            self._orphan(DeadLetter.of(record, "orphan_click", "$.impression_id", ""), time_ms)
        elif time_ms in self._memory.early.get(key, ()):
            self.plan.counts["duplicate_clicks"] += 1
        else:
            click = (time_ms, offset, packed_click(record))
            self._memory.add_early(key, click)
            self.plan.new_early.append((key, click))

    def _orphan(self, letter: DeadLetter, time_ms: int) -> None:
        message = (
            f"expected an impression with this id and {-self._terms.skew_ms} <= click - impression <= "
            f"{self._terms.window_ms} ms, found none by watermark {self._memory.watermark_ms} for the click at {time_ms}"
        )
        self.plan.dead.append(letter._replace(message=message))
        self.plan.counts["orphan_clicks"] += 1

    def _see(self, source: str, events: Events) -> None:
        seen = events.watermark_ms if events.watermark_ms >= 0 else NEVER_MS
        if events.newest_ms >= 0:
            seen = max(seen, events.newest_ms - self._lateness)
        if source == "impressions":
            self._memory.impressions_seen_ms = max(self._memory.impressions_seen_ms, seen)
        else:
            self._memory.clicks_seen_ms = max(self._memory.clicks_seen_ms, seen)

    def close(self, watermark_ms: int, clicks_topic: str, partition: int) -> Plan:
        """Move the watermark to `watermark_ms`, label what is due by it and expire what it settles.

        Where that is more than about `max_outputs` labels the watermark stops at the first that is left for the next step.
        `clicks_topic` and `partition` say where an orphan came from.
        """
        plan, memory = self.plan, self._memory
        until = max((watermark_ms, 0), (memory.watermark_ms, memory.cut))
        stored, until = self._stored_due(until)
        hold_ms = self._terms.hold_ms
        own = sorted(place for place in plan.new_pending if (place[0] + hold_ms, place[1]) < until)
        held = self._held_due(until) if stored else {}
        memory.watermark_ms, memory.cut = until
        plan.watermark_ms = memory.watermark_ms
        self._label(stored, held)
        self._label_own(own)
        # In the order in which real time would have labelled them: a step of a fast replay spans hours, and a model that
        # learns all of its corrections before all of its negatives learns little (docs/experiments.md). The sort is stable: a
        # correction stays behind its negative.
        if len(self._history.terms) == 1 and not any(example[5] == CORRECTION for example in plan.examples):
            plan.examples.sort(key=itemgetter(2))
        else:
            plan.examples.sort(key=self._leaves_ms)
        plan.expired_until_ms = plan.watermark_ms - self._history.max_window_ms
        for key, click in memory.due_early(plan.watermark_ms - self._history.max_skew_ms):
            plan.dropped_early.append((key, click))
            value, headers = msgspec.msgpack.decode(click[2], type=tuple[bytes, tuple[Header, ...]])
            origin = (clicks_topic, partition, click[1], key, value, headers)
            self._orphan(DeadLetter("orphan_click", "", "$.impression_id", *origin), click[0])
        late_before, terms_of = self._history.late_before(plan.watermark_ms), self._history.of
        # Without `self`, which has the plan: a cycle would keep all of a step until Python looks for cycles, which is seldom.
        plan.forget_before_ms = lambda offset: late_before - terms_of(offset).horizon_ms
        plan.forgotten = memory.due_chunks(late_before)
        return plan

    def _leaves_ms(self, example: Example) -> int:
        due_ms = example[2] + self._terms_of(example[3]).hold_ms
        return max(due_ms, example[4]) if example[5] == CORRECTION else due_ms

    def _ranges(self, until: Place) -> Iterator[tuple[Terms, Place, Place]]:
        """Of each terms the pending impressions that are due from where labels are out up to `until`."""
        memory = self._memory
        for terms in self._history.terms:
            begin = max(memory.watermark_ms - terms.hold_ms, 0), memory.cut if memory.watermark_ms >= terms.hold_ms else 0
            yield terms, begin, (until[0] - terms.hold_ms, until[1])

    def _stored_due(self, until: Place) -> tuple[list[Pending], Place]:
        """The stored impressions whose first label is due, in order, and up to where (due time, offset) that is all of them."""
        room = max(self._max_outputs - len(self.plan.examples), 1)
        due: list[Pending] = []
        several = len(self._history.terms) > 1
        for terms, begin, end in self._ranges(until):
            count = size = 0
            for row in self._state.pending_between(begin, end):
                if several and self._terms_of(row[1]) is not terms:
                    continue
                if count >= room or size > MAX_OUTPUT_BYTES:
                    until = min(until, (row[0] + terms.hold_ms, row[1]))
                    break
                count, size = count + 1, size + len(row[3])
                due.append(row)
        if several:
            by_due = sorted((row[0] + self._terms_of(row[1]).hold_ms, row[1], index) for index, row in enumerate(due))
            if len(by_due) > room:
                until = min(until, by_due[room][:2])
            due = [due[index] for *place, index in by_due if tuple(place) < until]
        return due, until

    def _held_due(self, until: Place) -> dict[Place, int]:
        held: dict[Place, int] = {}
        for _, begin, end in self._ranges(until):
            held.update(self._state.held_between(begin, end))
        return held

    def _label(self, rows: Iterable[Pending], clicks: dict[Place, int]) -> None:
        """The first labels of stored impressions, and the corrections that waited for them."""
        plan, keeps, rate = self.plan, self._sampling.keeps, self._sampling.rate
        out, negatives = plan.examples, 0
        for time_ms, offset, key, value, labelled in rows:
            if labelled:
                continue
            plan.settled += 1
            place = time_ms, offset
            click_ms = plan.held.pop(place, -1)  # this step's is the earlier one, where the state has one as well
            if click_ms < 0:
                click_ms = clicks.get(place, -1)
            if click_ms < 0:
                if rate >= 1 or keeps(key):
                    out.append((key, value, time_ms, offset, -1, FIRST))
                    negatives += 1
                else:
                    plan.left_out.append(offset)
                continue
            plan.dropped_pending.append(place)
            plan.dropped_held.append(place)
            negatives += self._label_clicked(key, value, time_ms, offset, click_ms)
        plan.counts["negatives"] += negatives

    def _label_own(self, places: Iterable[Place]) -> None:
        """The same of this step's impressions; those that a later click may correct stay pending."""
        plan, keeps, window_ms = self.plan, self._sampling.keeps, self._terms.window_ms
        for place in places:
            plan.settled += 1
            key, value = plan.new_pending[place]
            click_ms = plan.held.pop(place, -1)
            if click_ms >= 0:
                plan.counts["negatives"] += self._label_clicked(key, value, *place, click_ms)
            elif keeps(key):
                plan.examples.append((key, value, *place, -1, FIRST))
                plan.counts["negatives"] += 1
            else:
                plan.left_out.append(place[1])
            if click_ms >= 0 or place[0] + window_ms < plan.watermark_ms:
                del plan.new_pending[place]

    def _label_clicked(self, key: bytes, value: bytes, time_ms: int, offset: int, click_ms: int) -> int:
        """One whose click is there: positive, or a negative and its correction; how many negatives went out."""
        plan = self.plan
        if click_ms <= time_ms + self._terms_of(offset).hold_ms:
            plan.examples.append((key, value, time_ms, offset, click_ms, FIRST))
            return 0
        kept = self._sampling.keeps(key)
        if kept:
            plan.examples.append((key, value, time_ms, offset, -1, FIRST))
        else:
            plan.left_out.append(offset)
        plan.examples.append((key, value, time_ms, offset, click_ms, CORRECTION))
        return int(kept)
