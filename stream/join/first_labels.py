"""The first labels that are due by a watermark, and the corrections that waited for them.

An impression is due at (event time + hold, offset). Labels leave in that order, up to (watermark, cut): the cut is above 0 only
when more impressions of one time are due than one step takes. Due impressions are in the state, by event time, or came with the
step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import NamedTuple

from state.held_click import HeldClick
from state.join_state import Pending, TimeOffset
from stream.join.memory import Memory
from stream.join.plan import Plan, StoredState
from stream.join.sampling import Sampling
from stream.join.settings_history import Terms
from stream.records.example import CORRECTION, FIRST, Example
from stream.settings import JoinSettings

__all__ = ["FirstLabels"]

# Bytes of impressions labelled in one transaction: 32 MiB is what `max_outputs` impressions of 1.6 kB come to.
MAX_OUTPUT_BYTES = 32 << 20

_impression_ms = attrgetter("impression_ms")


class _Due(NamedTuple):
    """When the first label of an impression is due: event time + hold, then offset."""

    due_ms: int
    offset: int


class FirstLabels:
    """Moves the watermark of one step and adds the labels to the step's plan."""

    def __init__(self, settings: JoinSettings, state: StoredState, memory: Memory, plan: Plan) -> None:
        self._max_outputs, self._sampling = settings.max_outputs, Sampling(settings.negative_rate)
        self._state, self._memory, self._plan = state, memory, plan
        self._history, self._terms = memory.history, memory.history.current

    def label_until(self, watermark_ms: int) -> None:
        """Move the watermark to `watermark_ms` and label what is due by it.

        When more than about `max_outputs` labels are due, the watermark stops at the first label that is left to the next step.
        """
        plan, memory = self._plan, self._memory
        until = max(_Due(watermark_ms, 0), _Due(memory.watermark_ms, memory.cut))
        stored, until = self._stored_due(until)
        hold_ms = self._terms.hold_ms
        own = sorted((time_ms, offset) for time_ms, offset in plan.new_pending if (time_ms + hold_ms, offset) < until)
        held = self._held_due(until) if stored else {}
        memory.watermark_ms, memory.cut = until
        plan.watermark_ms = memory.watermark_ms
        self._label_stored(stored, held)
        self._label_own(own)
        # Sort the labels as they would have come in real time: a step of a fast replay spans hours, and a model that learns all
        # of its corrections before all of its negatives learns little (docs/experiments.md). The sort is stable, so a
        # correction stays after its negative.
        if len(self._history.terms) == 1 and not any(example.kind == CORRECTION for example in plan.examples):
            plan.examples.sort(key=_impression_ms)
        else:
            plan.examples.sort(key=self._leaves_ms)

    def _leaves_ms(self, example: Example) -> int:
        due_ms = example.impression_ms + self._history.of(example.source_offset).hold_ms
        return max(due_ms, example.click_ms) if example.kind == CORRECTION else due_ms

    def _ranges(self, until: _Due) -> Iterator[tuple[Terms, TimeOffset, TimeOffset]]:
        """For each terms, the range of pending impressions that are due once the watermark is at `until`: first, and end."""
        memory = self._memory
        for terms in self._history.terms:
            begin = max(memory.watermark_ms - terms.hold_ms, 0), memory.cut if memory.watermark_ms >= terms.hold_ms else 0
            yield terms, begin, (until.due_ms - terms.hold_ms, until.offset)

    def _stored_due(self, until: _Due) -> tuple[list[Pending], _Due]:
        """The stored impressions whose first label is due, in order, and the end up to which they are complete."""
        room = max(self._max_outputs - len(self._plan.examples), 1)
        due: list[Pending] = []
        several, terms_of = len(self._history.terms) > 1, self._history.of
        for terms, begin, end in self._ranges(until):
            count = size = 0
            for row in self._state.pending_between(begin, end):
                time_ms, offset, _, value, _ = row
                if several and terms_of(offset) is not terms:
                    continue
                if count >= room or size > MAX_OUTPUT_BYTES:
                    until = min(until, _Due(time_ms + terms.hold_ms, offset))
                    break
                count, size = count + 1, size + len(value)
                due.append(row)
        if several:
            by_due = sorted(
                (_Due(time_ms + terms_of(offset).hold_ms, offset), index) for index, (time_ms, offset, *_) in enumerate(due)
            )
            if len(by_due) > room:
                first_left, _ = by_due[room]
                until = min(until, first_left)
            due = [due[index] for when, index in by_due if when < until]
        return due, until

    def _held_due(self, until: _Due) -> dict[TimeOffset, HeldClick]:
        held: dict[TimeOffset, HeldClick] = {}
        for _, begin, end in self._ranges(until):
            held.update(self._state.held_between(begin, end))
        return held

    def _label_stored(self, rows: Iterable[Pending], clicks: dict[TimeOffset, HeldClick]) -> None:
        """The first labels of stored impressions, and the corrections that waited for them."""
        plan, keeps, rate = self._plan, self._sampling.keeps, self._sampling.rate
        out, negatives = plan.examples, 0
        for time_ms, offset, key, value, labelled in rows:
            if labelled:
                continue
            plan.settled += 1
            impression = time_ms, offset
            # A click that this step holds is earlier than the one in the state; otherwise the step would not hold it.
            click = plan.held.pop(impression, None) or clicks.get(impression)
            if click is None:
                if rate >= 1 or keeps(key):
                    out.append(Example(key, value, time_ms, offset, -1, FIRST))
                    negatives += 1
                else:
                    plan.left_out.append(offset)
                continue
            plan.dropped_pending.append(impression)
            plan.dropped_held.append(impression)
            negatives += self._label_clicked(key, value, time_ms, offset, click)
        plan.counts["negatives"] += negatives

    def _label_own(self, impressions: Iterable[TimeOffset]) -> None:
        """The first labels of this step's impressions. Those that a later click may correct stay pending."""
        plan, keeps, window_ms = self._plan, self._sampling.keeps, self._terms.window_ms
        for impression in impressions:
            time_ms, offset = impression
            plan.settled += 1
            key, value = plan.new_pending[impression]
            click = plan.held.pop(impression, None)
            if click is not None:
                plan.counts["negatives"] += self._label_clicked(key, value, time_ms, offset, click)
            elif keeps(key):
                plan.examples.append(Example(key, value, time_ms, offset, -1, FIRST))
                plan.counts["negatives"] += 1
            else:
                plan.left_out.append(offset)
            if click is not None or time_ms + window_ms < plan.watermark_ms:
                del plan.new_pending[impression]

    def _label_clicked(self, key: bytes, value: bytes, time_ms: int, offset: int, click: HeldClick) -> int:
        """Label a clicked impression: a positive, or a negative and its correction. Returns how many negatives were kept."""
        plan, (click_ms, arrived_ms) = self._plan, click
        if click_ms <= time_ms + self._history.of(offset).hold_ms:
            plan.examples.append(Example(key, value, time_ms, offset, click_ms, FIRST, arrived_ms))
            return 0
        kept = self._sampling.keeps(key)
        if kept:
            plan.examples.append(Example(key, value, time_ms, offset, -1, FIRST))
        else:
            plan.left_out.append(offset)
        plan.examples.append(Example(key, value, time_ms, offset, click_ms, CORRECTION, arrived_ms))
        return int(kept)
