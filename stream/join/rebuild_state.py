"""Decides again what a rebuild reads, and writes it into the state.

Each record is decided under the settings that it was decided under then (`settings_history.py`). An impression that nothing in
`examples` accounts for is pending, or was late; a click that nothing accounts for waits for its impression.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from state.join_state import Chunk, Entry, JoinMeta, JoinState, StateBatch, TimeOffset
from stream.join.events import Events
from stream.join.memory import EarlyClick
from stream.join.rebuild_labels import Labels
from stream.join.settings_history import History, Terms
from stream.records.example import Example

__all__ = ["RebuiltState"]

_END = (1 << 63, 0)  # beyond every impression


class RebuiltState:
    """The state of a partition while it is rebuilt.

    The first write deletes the positions, and `settle` writes the new ones. So the state that an unfinished rebuild leaves has
    no positions, and is deleted when it is opened again.

    Args:
        labels: what `examples` says. It must be complete before `accept`, `hold` and `keep_clicks`.
        history: the settings that records were decided under.
        watermark_ms: the committed one; with `cut`, first labels are out below it.
        examples_from: the position of `examples` that the rebuild reads from.
    """

    def __init__(
        self, state: JoinState, labels: Labels, history: History, *, watermark_ms: int, cut: int, examples_from: int
    ) -> None:
        self._state, self._labels, self._history = state, labels, history
        self._watermark_ms, self._cut, self._examples_from = watermark_ms, cut, examples_from

    def _batch(self) -> StateBatch:
        batch = self._state.batch()
        batch.drop_meta()
        return batch

    def _first_is_out(self, impression: TimeOffset) -> bool:
        """Whether the committed watermark has passed the hold of an impression, given by (event time, offset)."""
        time_ms, offset = impression
        return (time_ms + self._history.of(offset).hold_ms, offset) < (self._watermark_ms, self._cut)

    def mark_clicked(self, clicked: Sequence[Example]) -> None:
        """Mark the impressions of an older local state that were clicked after that state was written."""
        entries = self._state.entries([each.key for each in clicked])
        batch = self._batch()
        batch.remember(
            (each.key, (each.impression_ms, each.source_offset, True))
            for each, entry in zip(clicked, entries, strict=True)
            if entry is not None and entry[:2] == (each.impression_ms, each.source_offset)
        )
        batch.drop_pending((each.impression_ms, each.source_offset) for each in clicked)
        batch.write()

    def accept(self, terms: Terms, events: Events) -> None:
        """Remember the impressions that were accepted then: labelled since, or pending at the committed watermark.

        All others were duplicates or late.
        """
        labels, history = self._labels, self._history
        stored = self._state.entries(events.keys)
        remembered: dict[bytes, Entry] = {}
        pending: list[tuple[int, int, bytes, bytes]] = []
        labelled: list[tuple[int, int, bytes, bytes]] = []  # by 0.1.0, before the watermark passed them
        first_offset = -1  # not taken from `remembered`, which has only the later offset of an id used twice
        for index, (key, time_ms, offset) in enumerate(zip(events.keys, events.times_ms, events.offsets, strict=True)):
            known = remembered.get(key) or stored[index]
            if known is not None and time_ms <= known[0] + history.of(known[1]).horizon_ms:
                continue
            clicked, is_out = labels.resolved.get(offset), self._first_is_out((time_ms, offset))
            if clicked is False and (time_ms, offset) in labels.held:  # its positive label was too large
                clicked = True
                labels.matched.add((key, labels.held[time_ms, offset].click_ms))
            if clicked is None and (is_out or time_ms < terms.late_floor_ms):
                continue
            remembered[key] = (time_ms, offset, bool(clicked))
            first_offset = offset if first_offset < 0 else first_offset
            if not clicked and time_ms + terms.window_ms >= self._watermark_ms:
                rows = pending if clicked is None or is_out else labelled
                rows.append((time_ms, offset, key, events.values[index]))
        if remembered:
            batch = self._batch()
            batch.remember(remembered.items())
            batch.add_pending(pending)
            batch.add_pending(labelled, labelled=True)
            latest = max(time_ms for time_ms, _, _ in remembered.values())
            batch.add_chunk(Chunk(first_offset, latest, self._examples_from), list(remembered))
            batch.write()

    def hold(self) -> None:
        """Keep the clicks that wait for their impressions' labels, and mark these impressions as clicked.

        Impressions whose positive label was too large are marked as clicked, too.
        """
        labels = self._labels
        batch = self._batch()
        waiting = [each for each in labels.held if each[1] not in labels.resolved and not self._first_is_out(each)]
        too_large = [each for each in labels.held.keys() - set(waiting) if not labels.resolved.get(each[1])]
        found = [row for row in self._state.pending(too_large) if row is not None]
        for (time_ms, offset, key, *_), entry in zip(found, self._state.entries([row[2] for row in found]), strict=True):
            impression = time_ms, offset
            labels.matched.add((key, labels.held[impression].click_ms))
            batch.drop_pending([impression])
            if entry is not None and entry[:2] == impression:
                batch.remember([(key, (*impression, True))])
        rows, stored = self._state.pending(waiting), self._state.held(waiting)
        known = [(each, row[2], held) for each, row, held in zip(waiting, rows, stored, strict=True) if row is not None]
        entries = self._state.entries([key for _, key, _ in known])
        for (impression, key, held), entry in zip(known, entries, strict=True):
            click = labels.held[impression]
            labels.matched.add((key, click.click_ms))
            batch.hold([(impression, click if held is None or click.click_ms < held.click_ms else held)])
            if entry is not None and entry[:2] == impression:
                batch.remember([(key, (*impression, True))])
        batch.write()

    def keep_clicks(self, runs: Iterable[Events]) -> None:
        """Keep the clicks that still wait for their impression; the others are accounted for."""
        batch = self._batch()
        for events in runs:
            entries = self._state.entries(events.keys)
            for key, time_ms, offset, record, entry in zip(
                events.keys, events.times_ms, events.offsets, events.records, entries, strict=True
            ):
                if self._waits(key, time_ms, offset, entry):
                    batch.add_early([(key, EarlyClick.of(record, time_ms))])
        batch.write()

    def _waits(self, key: bytes, click_ms: int, offset: int, entry: Entry | None) -> bool:
        """Whether a click is not accounted for yet. `entry` is the impression that is remembered under its id.

        `matched` is looked at first: a click that labelled an earlier use of the id may lie outside the window of the newer
        use, and would seem to wait.
        """
        history = self._history
        if (key, click_ms) in self._labels.matched or click_ms + history.max_skew_ms < self._watermark_ms:
            return False
        if history.was_orphan(offset, click_ms):
            return False
        if entry is None:
            return True
        terms = history.of(entry[1])
        # An impression that may be forgotten by now is too old for a click that may still wait (as in `Step.clicks`).
        remembered = entry[0] >= history.late_before(self._watermark_ms) - terms.horizon_ms
        return not (remembered and terms.counts(click_ms, entry[0]))

    def settle(self, meta: JoinMeta) -> list[tuple[bytes, EarlyClick]]:
        """Drop what has been settled since an older local state was written, and write the positions. This ends the rebuild.

        Returns:
            The clicks that still wait for their impression, in order of offset.
        """
        batch = self._state.batch()
        batch.drop_pending_before(0, self._watermark_ms - self._history.max_window_ms)
        labelled = [each for each in self._state.held_between((0, 0), _END) if self._first_is_out(each)]
        batch.drop_held(labelled)
        batch.drop_pending(labelled)
        early = sorted(((key, EarlyClick(*click)) for key, click in self._state.early_clicks()), key=lambda row: row[1].offset)
        entries = self._state.entries([key for key, _ in early])
        waiting: dict[tuple[bytes, int], tuple[bytes, EarlyClick]] = {}
        for (key, click), entry in zip(early, entries, strict=True):
            if not self._waits(key, click.time_ms, click.offset, entry) or (key, click.time_ms) in waiting:
                batch.drop_early([(key, click)])
            else:
                waiting[key, click.time_ms] = (key, click)
        batch.set_meta(meta)
        batch.write()
        return list(waiting.values())

    def count_pending(self) -> int:
        """Impressions whose first label is not out yet."""
        if any(terms.legacy for terms in self._history.terms):
            rows = self._state.pending_between((0, 0), _END)
            return sum(not labelled and not self._first_is_out((time_ms, offset)) for time_ms, offset, _, _, labelled in rows)
        return sum(not self._first_is_out(each) for each in self._state.pending_impressions())
