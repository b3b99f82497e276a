"""The decisions of the join, without Kafka: from a state and one step's events to labels, dead letters and state changes.

Times are event times in ms. W is the watermark. `window`, `hold`, `horizon` and `skew` come from the settings that an
impression was read under (`settings_history.py`):

- a click counts for its impression when -skew <= t_click - t_impression <= window;
- the first label leaves when t_impression + hold < W, in the order of impressions: positive if a click that has been read by
  then has t_click <= t_impression + hold, else negative. So the moment at which a label comes says nothing about the label
  (`first_labels.py`);
- a later click is a correction. One that was read before the first label waits for it. With hold = window there is none;
- a click without an impression is an orphan once t_click + skew < W;
- an impression older than W - window - max(horizon, skew) is late. The skew is there because an id must be remembered for as
  long as a click for it may wait;
- an impression is a duplicate of the remembered one with its id when it is at most `horizon` newer. The rule looks at the two
  records alone, not at W, so that a rebuild, which knows only today's W, decides as it was decided then;
- ids are remembered for one more horizon: an impression that isn't late can be a duplicate of one that is so old.

Only the negatives that `Sampling` keeps become examples. The offsets of the others are written too, so that every impression is
accounted for.

A step takes its runs as they came, and only then moves the watermark, labels and expires. So how a log was cut into steps never
changes a label that the watermark has not yet settled.
"""

from __future__ import annotations

from state.held_click import HeldClick
from state.join_state import Entry, TimeOffset
from stream.join.events import Events
from stream.join.first_labels import FirstLabels
from stream.join.memory import EarlyClick, Memory
from stream.join.plan import Plan, StoredState
from stream.join.settings_history import NEVER_MS
from stream.records.dead_letter import DeadLetter
from stream.records.example import CORRECTION, Example
from stream.records.record import Record
from stream.settings import JoinSettings

__all__ = ["Step", "watermark"]


def watermark(memory: Memory, *, impressions_idle: bool, clicks_idle: bool) -> int:
    """The watermark that a partition's sources allow. It never falls, and does not move while both are idle."""
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

    The state is not changed. `Memory` is changed as decided, so the process must end when a step can't be committed.
    """

    def __init__(self, settings: JoinSettings, state: StoredState, memory: Memory) -> None:
        self._lateness_ms, self._state, self._memory = settings.lateness_ms, state, memory
        self._history, self._terms = memory.history, memory.history.current
        self.plan = Plan(watermark_ms=memory.watermark_ms)
        self._labels = FirstLabels(settings, state, memory, self.plan)
        self._late_before = self._history.late_before(memory.watermark_ms)

    def impressions(self, events: Events) -> None:
        """Remember a run's impressions. Early clicks that count for one of them are held until its label."""
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
            # All ids are new: the whole run is taken at once.
            plan.remembered.update(fresh)
            self._new_from(events.offsets[0])
            plan.new_ids.extend(events.keys)
            impressions = zip(events.times_ms, events.offsets, strict=True)
            plan.new_pending.update(zip(impressions, zip(events.keys, events.values, strict=True), strict=True))
            plan.counts["impressions"] += len(events)
            for key in fresh.keys() & memory.early.keys():
                self._match_early(key)
        else:
            self._impressions_one_by_one(events)

    def _impressions_one_by_one(self, events: Events) -> None:
        plan = self.plan
        entries = self._state.entries(events.keys)
        for index, (key, time_ms, offset) in enumerate(zip(events.keys, events.times_ms, events.offsets, strict=True)):
            if time_ms < self._late_before:
                bound = f"{self._late_before} (watermark - window - dedupe horizon, or skew where that is larger)"
                message = f"expected an event time of at least {bound}, found {time_ms}"
                plan.dead.append(DeadLetter.of(events.records[index], "late_impression", "$.timestamp", message))
                plan.counts["late_impressions"] += 1
            elif self._is_duplicate(time_ms, plan.remembered.get(key) or entries[index]):
                plan.counts["duplicate_impressions"] += 1
            else:
                plan.counts["impressions"] += 1
                self._new_from(offset)
                plan.new_ids.append(key)
                plan.remembered[key] = (time_ms, offset, False)
                plan.new_pending[time_ms, offset] = (key, events.values[index])
                if key in self._memory.early:
                    self._match_early(key)

    def _is_duplicate(self, time_ms: int, known: Entry | None) -> bool:
        if known is None:
            return False
        known_ms, known_offset, _ = known
        return time_ms <= known_ms + self._history.of(known_offset).horizon_ms

    def _new_from(self, offset: int) -> None:
        # `remembered` can't give the first offset: of an id used twice in a step it has only the later one.
        if self.plan.first_offset < 0:
            self.plan.first_offset = offset

    def _match_early(self, key: bytes) -> None:
        """Hold the earliest early click that counts for a new impression until its label; the others are duplicates."""
        time_ms, offset, _ = self.plan.remembered[key]
        waiting = self._memory.early[key]
        counting = sorted(click for click in waiting.values() if self._terms.counts(click.time_ms, time_ms))
        if not counting:
            return
        self._memory.drop_early(key, counting)
        self.plan.dropped_early.extend((key, click) for click in counting)
        self.plan.counts["matched_clicks"] += 1
        self.plan.counts["duplicate_clicks"] += len(counting) - 1
        self.plan.remembered[key] = (time_ms, offset, True)
        self.plan.held[time_ms, offset] = counting[0].held()

    def clicks(self, events: Events) -> None:
        """Match a run's clicks. A click in the window of its impression is held until the first label, or corrects it."""
        plan, memory = self.plan, self._memory
        plan.dead.extend(events.dead)
        self._see("clicks", events)
        entries = self._state.entries(events.keys)
        matched: list[tuple[TimeOffset, HeldClick]] = []  # of impressions whose label is out, or of version 0.1.0
        repeated: list[tuple[TimeOffset, HeldClick]] = []  # of impressions whose label is not out
        for index, (key, click_ms) in enumerate(zip(events.keys, events.times_ms, strict=True)):
            plan.counts["clicks"] += 1
            entry = plan.remembered.get(key) or entries[index]
            if entry is None:
                self._keep_early(events.records[index], key, click_ms)
                continue
            time_ms, offset, clicked = entry
            terms, impression = self._history.of(offset), (time_ms, offset)
            if not terms.counts(click_ms, time_ms) or time_ms < self._late_before - terms.horizon_ms:
                self._keep_early(events.records[index], key, click_ms)
                continue
            is_out = memory.first_is_out(time_ms, offset, terms) and impression not in plan.new_pending
            click = HeldClick(click_ms, events.records[index].timestamp)
            if clicked:
                plan.counts["duplicate_clicks"] += 1
                if not is_out:
                    repeated.append((impression, click))
            elif time_ms + terms.window_ms < plan.watermark_ms or (is_out and terms.hold_ms >= terms.window_ms):
                plan.counts["late_clicks"] += 1
            else:
                plan.counts["matched_clicks"] += 1
                plan.remembered[key] = (time_ms, offset, True)
                if is_out or terms.legacy:
                    matched.append((impression, click))
                else:
                    plan.held[impression] = click
        self._match_stored(matched)
        self._match_sooner(repeated)

    def _match_stored(self, matched: list[tuple[TimeOffset, HeldClick]]) -> None:
        """Correct the labels that are out. For an impression of version 0.1.0, its stored row says whether its label is out."""
        plan = self.plan
        rows = self._state.pending([impression for impression, _ in matched])
        for ((time_ms, offset), click), row in zip(matched, rows, strict=True):
            if row is None:
                raise RuntimeError(
                    f"impression at offset {offset} (event time {time_ms}) is pending but its bytes are not in the state: "
                    "the state folder is damaged. Stop the worker, delete it and start again; it is rebuilt from the log."
                )
            _, _, key, value, labelled = row
            if labelled or self._memory.first_is_out(time_ms, offset, self._history.of(offset)):
                plan.examples.append(Example(key, value, time_ms, offset, click.click_ms, CORRECTION, click.arrived_ms))
                plan.dropped_pending.append((time_ms, offset))
            else:
                plan.held[time_ms, offset] = click

    def _match_sooner(self, repeated: list[tuple[TimeOffset, HeldClick]]) -> None:
        """Keep the earliest of several clicks for an impression whose label waits; of clicks of one time, the first read."""
        found = self._state.held([impression for impression, _ in repeated]) if repeated else []
        for (impression, click), stored in zip(repeated, found, strict=True):
            held = self.plan.held.get(impression, stored)
            if held is not None and click.click_ms < held.click_ms:
                self.plan.held[impression] = click

    def _keep_early(self, record: Record, key: bytes, time_ms: int) -> None:
        """Keep a click until an impression comes that it counts for, or make it an orphan when its time is over."""
        if time_ms + self._history.max_skew_ms < self._memory.watermark_ms:
            self._orphan(DeadLetter.of(record, "orphan_click", "$.impression_id", ""), time_ms)
        elif time_ms in self._memory.early.get(key, ()):
            self.plan.counts["duplicate_clicks"] += 1
        else:
            click = EarlyClick.of(record, time_ms)
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
            seen = max(seen, events.newest_ms - self._lateness_ms)
        if source == "impressions":
            self._memory.impressions_seen_ms = max(self._memory.impressions_seen_ms, seen)
        else:
            self._memory.clicks_seen_ms = max(self._memory.clicks_seen_ms, seen)

    def close(self, watermark_ms: int, clicks_topic: str, partition: int) -> Plan:
        """Move the watermark to `watermark_ms`, label what is due by it and expire what it settles.

        When too many labels are due for one step, the watermark stops earlier (`FirstLabels.label_until`).

        Args:
            clicks_topic: full name of `clicks`; with `partition`, it says in the letters where an orphan came from.
        """
        plan, memory = self.plan, self._memory
        self._labels.label_until(watermark_ms)
        plan.expired_until_ms = plan.watermark_ms - self._history.max_window_ms
        for key, click in memory.due_early(plan.watermark_ms - self._history.max_skew_ms):
            plan.dropped_early.append((key, click))
            self._orphan(click.letter(key, clicks_topic, partition), click.time_ms)
        late_before, terms_of = self._history.late_before(plan.watermark_ms), self._history.of
        # The function must not refer to `self`, which has the plan: the cycle would keep all of a step in memory until Python
        # collects cycles, which is seldom.
        plan.forget_before_ms = lambda offset: late_before - terms_of(offset).horizon_ms
        plan.forgotten = memory.due_chunks(late_before)
        return plan
