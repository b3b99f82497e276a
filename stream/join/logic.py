"""The decisions of the join, pure: a state and one step's events in; labels, dead letters and state changes out.

Times are event times in ms. With W the watermark, `window`, `horizon` and `skew` from the settings:

- a click counts for its impression when -skew <= t_click - t_impression <= window;
- an impression is negative once t_impression + window < W; a click without one is an orphan once t_click + skew < W;
- an impression older than W - window - horizon is late;
- an impression is a duplicate of the remembered one with its id when it is at most `horizon` newer. The rule looks at the two
  records alone, not at W, so that a rebuild, which knows only today's W, decides as it was decided then;
- ids are remembered until W - window - 2 * horizon: the oldest that an impression which isn't late can be a duplicate of.

What goes out, and when, is the label policy's, and an impression lives to its end by the policy under which it came:

- `wait`: one label, positive when the click is matched, negative when the watermark passes the window;
- `fnw`: a negative at once (a fake one, as long as a click may come), and when the click is matched a correction. A click that
  was there before the impression makes the same two: the importance weights (`model/fake_negatives.py`) stand for a stream in
  which every impression was a negative first.

Of negatives only those that `Sampling` keeps go out; the offsets of the others do, so that every impression is accounted for.

A step takes its runs as they came, and only then moves the watermark and expires: how a log was cut into steps never changes a
label that the watermark has not yet settled.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from state.join_state import Chunk, Entry
from stream.dead_letters import DeadLetter, Header
from stream.join.events import Events
from stream.join.sampling import Sampling
from stream.settings import JoinSettings

__all__ = [
    "CORRECTION",
    "FAKE",
    "FIRST",
    "NEVER_MS",
    "EarlyClick",
    "Example",
    "Memory",
    "Plan",
    "Step",
    "StoredState",
    "packed_click",
    "watermark",
]

# Before the first event of a source. Event times are >= 0, and so is every watermark after the first event.
NEVER_MS = -(1 << 62)

FIRST = "first"  # the only label
FAKE = "fake"  # a negative that a correction may follow
CORRECTION = "correction"

# id, value, impression time, source offset, click time (-1: negative), one of the three above
Example = tuple[bytes, bytes, int, int, int, str]


class StoredState(Protocol):
    """What the logic reads of `state.join_state.JoinState`; tests put a dictionary behind it."""

    def entries(self, keys: list[bytes]) -> list[Entry | None]: ...
    def packed_entries(self, keys: list[bytes]) -> list[bytes | None]: ...
    def values(self, impressions: list[tuple[int, int]]) -> list[tuple[bytes, bool] | None]: ...
    def pending_between(self, from_ms: int, until_ms: int) -> Iterator[tuple[int, int, bytes, bytes, bool]]: ...


EarlyClick = tuple[int, int, bytes]  # event time, offset, the record as `packed_click` has it


def packed_click(record: Any) -> bytes:
    """What a click's dead letter will have of it, should no impression come: value and headers."""
    return msgspec.msgpack.encode((record.value, record.headers))


@dataclass(slots=True)
class Memory:
    """The part of a partition's state that is small enough to stand in memory; RocksDB has it too.

    Early clicks are those whose impression has not come, by id and event time; a chunk is what one step remembered. Both come
    in order of offset, and dictionaries keep that order, so the first of each is the low-water mark.
    """

    watermark_ms: int = NEVER_MS
    impressions_seen_ms: int = NEVER_MS
    clicks_seen_ms: int = NEVER_MS
    early: dict[bytes, dict[int, EarlyClick]] = field(default_factory=dict)
    _early_offsets: dict[int, None] = field(default_factory=dict)
    _early_due: list[tuple[int, int, bytes]] = field(default_factory=list)  # a heap; clicks matched since stay in it
    _chunks: dict[Chunk, None] = field(default_factory=dict)
    _chunks_due: list[tuple[int, Chunk]] = field(default_factory=list)  # a heap by largest event time

    @property
    def early_clicks(self) -> int:
        return len(self._early_offsets)

    def add_early(self, key: bytes, click: EarlyClick) -> None:
        self.early.setdefault(key, {})[click[0]] = click
        self._early_offsets[click[1]] = None
        heapq.heappush(self._early_due, (click[0], click[1], key))

    def drop_early(self, key: bytes, clicks: Iterable[EarlyClick]) -> None:
        waiting = self.early[key]
        for time_ms, offset, _ in clicks:
            del waiting[time_ms], self._early_offsets[offset]
        if not waiting:
            del self.early[key]

    def due_early(self, before_ms: int) -> Iterator[tuple[bytes, EarlyClick]]:
        """Take out the early clicks whose time is before `before_ms`."""
        while self._early_due and self._early_due[0][0] < before_ms:
            time_ms, offset, key = heapq.heappop(self._early_due)
            click = self.early.get(key, {}).get(time_ms)
            if click is not None and click[1] == offset:
                self.drop_early(key, [click])
                yield key, click

    def add_chunk(self, chunk: Chunk) -> None:
        self._chunks[chunk] = None
        heapq.heappush(self._chunks_due, (chunk.max_time_ms, chunk))

    def due_chunks(self, before_ms: int) -> list[Chunk]:
        """Take out the chunks whose every id may be forgotten."""
        due = []
        while self._chunks_due and self._chunks_due[0][0] < before_ms:
            due.append(heapq.heappop(self._chunks_due)[1])
            del self._chunks[due[-1]]
        return due

    def low_water(self, impressions: int, clicks: int, examples: int) -> tuple[int, int, int]:
        """The earliest offsets that what is remembered still needs, given the positions now."""
        for chunk in self._chunks:
            impressions, examples = min(impressions, chunk.first_offset), min(examples, chunk.examples_position)
            break
        for offset in self._early_offsets:
            clicks = min(clicks, offset)
            break
        return impressions, clicks, examples


@dataclass(slots=True)
class Plan:
    """What one step decided: what goes out in its transaction, and what changes in the state after it.

    Negatives left out are told by their impressions' offsets, those that a correction may follow apart. `settled` counts
    impressions that are pending no more.
    """

    examples: list[Example] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    left_out_fake: list[int] = field(default_factory=list)
    settled: int = 0
    dead: list[DeadLetter] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    remembered: dict[bytes, Entry] = field(default_factory=dict)
    new_ids: list[bytes] = field(default_factory=list)
    first_offset: int = -1  # of the first impression remembered
    new_pending: dict[tuple[int, int], tuple[bytes, bytes]] = field(default_factory=dict)
    dropped_pending: list[tuple[int, int]] = field(default_factory=list)
    new_early: list[tuple[bytes, EarlyClick]] = field(default_factory=list)
    dropped_early: list[tuple[bytes, EarlyClick]] = field(default_factory=list)
    forgotten: list[Chunk] = field(default_factory=list)
    forget_before_ms: int = NEVER_MS  # ids of `forgotten` used again since then are kept
    expired_from_ms: int = 0
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
        self._window, self._horizon, self._skew = (
            settings.window_ms,
            settings.dedupe_horizon_ms,
            settings.negative_skew_ms,
        )
        self._lateness, self._max_outputs = settings.lateness_ms, settings.max_outputs
        self._fake = settings.label_policy == "fnw"
        self._sampling = Sampling(settings.negative_rate)
        self._state, self._memory = state, memory
        self.plan = Plan(watermark_ms=memory.watermark_ms)
        self._late_before = memory.watermark_ms - self._window - self._horizon
        self._forget_before = self._late_before - self._horizon

    def impressions(self, events: Events) -> None:
        """Remember a run's impressions; those with an early click in the window are labelled at once."""
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
            if self._fake:
                self._fakes(zip(events.keys, events.values, events.times_ms, events.offsets, strict=True))
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
                bound = f"{self._late_before} (watermark - window - dedupe horizon)"
                message = f"expected an event time of at least {bound}, found {time_ms}"
                plan.dead.append(DeadLetter.of(events.records[index], "late_impression", "$.timestamp", message))
                plan.counts["late_impressions"] += 1
            elif known is not None and time_ms <= known[0] + self._horizon:
                plan.counts["duplicate_impressions"] += 1
            else:
                plan.counts["impressions"] += 1
                self._new_from(offset)
                plan.new_ids.append(key)
                plan.remembered[key] = (time_ms, offset, False)
                plan.new_pending[time_ms, offset] = (key, events.values[index])
                if self._fake:
                    self._fakes([(key, events.values[index], time_ms, offset)])
                if key in self._memory.early:
                    self._match_early(key)

    def _new_from(self, offset: int) -> None:
        # Not from `remembered`: an id used twice in a step has only its later offset there.
        if self.plan.first_offset < 0:
            self.plan.first_offset = offset

    def _fakes(self, impressions: Iterable[tuple[bytes, bytes, int, int]]) -> None:
        """A negative of each: id, value, event time, offset."""
        plan, keeps = self.plan, self._sampling.keeps
        out: list[Example] = []
        for key, value, time_ms, offset in impressions:
            if keeps(key):
                out.append((key, value, time_ms, offset, -1, FAKE))
            else:
                plan.left_out_fake.append(offset)
        plan.examples.extend(out)
        plan.counts["negatives"] += len(out)

    def _match_early(self, key: bytes) -> None:
        """Label a new impression by the earliest early click that counts; the others in its window are duplicates of it."""
        time_ms, offset, _ = self.plan.remembered[key]
        waiting = self._memory.early[key]
        counting = sorted(click for click in waiting.values() if -self._skew <= click[0] - time_ms <= self._window)
        if not counting:
            return
        self._memory.drop_early(key, counting)
        self.plan.dropped_early.extend((key, click) for click in counting)
        self.plan.counts["matched_clicks"] += 1
        self.plan.counts["duplicate_clicks"] += len(counting) - 1
        self.plan.remembered[key] = (time_ms, offset, True)
        _, value = self.plan.new_pending.pop((time_ms, offset))
        self.plan.examples.append((key, value, time_ms, offset, counting[0][0], CORRECTION if self._fake else FIRST))
        self.plan.settled += 1

    def clicks(self, events: Events) -> None:
        """Match a run's clicks: a click in the window of a pending impression makes it positive."""
        plan = self.plan
        plan.dead.extend(events.dead)
        self._see("clicks", events)
        entries = self._state.entries(events.keys)
        matched: list[tuple[bytes, int, int, int]] = []
        for index, (key, time_ms, offset) in enumerate(zip(events.keys, events.times_ms, events.offsets, strict=True)):
            plan.counts["clicks"] += 1
            entry = plan.remembered.get(key) or entries[index]
            in_window = entry is not None and -self._skew <= time_ms - entry[0] <= self._window
            if entry is None or not in_window or entry[0] < self._forget_before:
                self._keep_early(events.records[index], key, time_ms, offset)
            elif entry[2]:
                plan.counts["duplicate_clicks"] += 1
            elif entry[0] + self._window < plan.watermark_ms:
                plan.counts["late_clicks"] += 1
            else:
                plan.counts["matched_clicks"] += 1
                plan.remembered[key] = (entry[0], entry[1], True)
                matched.append((key, entry[0], entry[1], time_ms))
        self._label_positive(matched)

    def _label_positive(self, matched: list[tuple[bytes, int, int, int]]) -> None:
        plan = self.plan
        stored = [(time_ms, offset) for _, time_ms, offset, _ in matched if (time_ms, offset) not in plan.new_pending]
        values = dict(zip(stored, self._state.values(stored), strict=True))
        plan.dropped_pending.extend(stored)
        plan.settled += len(matched)
        for key, time_ms, offset, click_ms in matched:
            new = plan.new_pending.pop((time_ms, offset), None)
            found = (new[1], self._fake) if new is not None else values[time_ms, offset]
            if found is None:
                raise RuntimeError(
                    f"impression {key!r} at offset {offset} is pending but its bytes are not in the state: "
                    "the state folder is damaged. Stop the worker, delete it and start again; it is rebuilt from the log."
                )
            value, labelled = found
            plan.examples.append((key, value, time_ms, offset, click_ms, CORRECTION if labelled else FIRST))

    def _keep_early(self, record: Any, key: bytes, time_ms: int, offset: int) -> None:
        if time_ms + self._skew < self._memory.watermark_ms:
            self._orphan(DeadLetter.of(record, "orphan_click", "$.impression_id", ""), time_ms)
        elif time_ms in self._memory.early.get(key, ()):
            self.plan.counts["duplicate_clicks"] += 1
        else:
            click = (time_ms, offset, packed_click(record))
            self._memory.add_early(key, click)
            self.plan.new_early.append((key, click))

    def _orphan(self, letter: DeadLetter, time_ms: int) -> None:
        message = (
            f"expected an impression with this id and {-self._skew} <= click - impression <= {self._window} ms, "
            f"found none by watermark {self._memory.watermark_ms} for the click at {time_ms}"
        )
        self.plan.dead.append(letter._replace(message=message))
        self.plan.counts["orphan_clicks"] += 1

    def _see(self, source: str, events: Events) -> None:
        seen = events.watermark_ms if events.watermark_ms >= 0 else NEVER_MS
        if events.times_ms:
            seen = max(seen, max(events.times_ms) - self._lateness)
        if source == "impressions":
            self._memory.impressions_seen_ms = max(self._memory.impressions_seen_ms, seen)
        else:
            self._memory.clicks_seen_ms = max(self._memory.clicks_seen_ms, seen)

    def close(self, watermark_ms: int, clicks_topic: str, partition: int) -> Plan:
        """Move the watermark to `watermark_ms` and expire what it settles, at most about `max_outputs` labels of it.

        Where that is too much for one transaction the watermark stops at what has been expired.
        `clicks_topic` and `partition` say where an orphan came from.
        """
        plan, memory = self.plan, self._memory
        start = memory.watermark_ms - self._window
        until = max(watermark_ms, memory.watermark_ms) - self._window
        stored: list[tuple[int, int, bytes, bytes, bool]] = []
        room = max(self._max_outputs - len(plan.examples), 1)
        dropped = set(plan.dropped_pending)
        for row in self._state.pending_between(start, until):
            if len(stored) >= room and row[0] != stored[-1][0]:
                until = row[0]  # everything before this time is settled, nothing at or after it
                break
            if (row[0], row[1]) not in dropped:
                stored.append(row)
        # Of this step's own impressions also those that came late, before what earlier steps have expired.
        due = [place for place in plan.new_pending if place[0] < until]
        own = [(*place, *plan.new_pending.pop(place), self._fake) for place in due]
        self._label_negative(own)
        self._label_negative(stored)
        # In the order in which real time would have labelled them: a step of a fast replay spans hours, and a model that
        # learns all of its positives before all of its negatives learns little (docs/experiments.md). The sort is stable: a
        # correction stays behind its negative also where a skewed click lies before the impression.
        window = self._window
        plan.examples.sort(
            key=lambda example: (
                (example[4] if example[4] >= 0 else example[2] + window) if example[5] == FIRST else max(example[4], example[2])
            )
        )
        plan.expired_from_ms, plan.expired_until_ms = start, until
        plan.watermark_ms = memory.watermark_ms = until + self._window
        for key, click in memory.due_early(memory.watermark_ms - self._skew):
            plan.dropped_early.append((key, click))
            value, headers = msgspec.msgpack.decode(click[2], type=tuple[bytes, tuple[Header, ...]])
            origin = (clicks_topic, partition, click[1], key, value, headers)
            self._orphan(DeadLetter("orphan_click", "", "$.impression_id", *origin), click[0])
        plan.forget_before_ms = memory.watermark_ms - self._window - 2 * self._horizon
        plan.forgotten = memory.due_chunks(plan.forget_before_ms)
        return plan

    def _label_negative(self, expired: list[tuple[int, int, bytes, bytes, bool]]) -> None:
        """Of what the watermark has passed: those whose first label isn't out become negatives."""
        plan, keeps = self.plan, self._sampling.keeps
        plan.settled += len(expired)
        if self._sampling.rate < 1:
            every, expired = expired, []
            for row in every:
                if row[4] or keeps(row[2]):
                    expired.append(row)
                else:
                    plan.left_out.append(row[1])
        out = [(key, value, time_ms, offset, -1, FIRST) for time_ms, offset, key, value, labelled in expired if not labelled]
        plan.examples.extend(out)
        plan.counts["negatives"] += len(out)
