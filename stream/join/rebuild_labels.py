"""What `examples` says about the impressions and clicks that a rebuild reads again."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from state.held_click import HeldClick
from state.join_state import TimeOffset
from stream.records.example import FIRST, REPLAY, Example, read_example
from stream.records.join_notes import Matched, read_left_out, read_matched
from stream.records.record import Record
from stream.records.replay import is_replayed

__all__ = ["Labels"]


class Labels:
    """Labels and notes of the join, gathered from `examples`.

    Attributes:
        resolved: offset → whether the impression is clicked; of impressions that have their first label or were left out.
        held: (event time, offset) → the earliest click; of impressions whose click waited for the first label.
        matched: clicks that are accounted for, by id and event time.
        foreign: records that the join has not written.
    """

    def __init__(self) -> None:
        self.resolved: dict[int, bool] = {}
        self.held: dict[TimeOffset, HeldClick] = {}
        self.matched: set[tuple[bytes, int]] = set()
        self.foreign = 0

    def note(self, records: Sequence[Record]) -> list[Example]:
        """Note what these records say. Returns the examples that label an impression as clicked."""
        clicked: list[Example] = []
        for record in records:
            if is_replayed(record):
                continue  # a copy of the record that became a dead letter; a correction may have followed that record
            try:
                left_out, matched = read_left_out(record), read_matched(record)
                if left_out is not None:
                    self.resolved.update(dict.fromkeys(left_out, False))
                elif matched is not None:
                    for click in matched:
                        self._hold(click)
                elif self._label(example := read_example(record)):
                    clicked.append(example)
            except (KeyError, TypeError, ValueError, msgspec.DecodeError):
                self.foreign += 1
        return clicked

    def _hold(self, click: Matched) -> None:
        """Note a matched click. Raises ValueError for numbers that can't be an event time or an offset."""
        impression = click.impression_ms, click.source_offset
        if not all(0 <= number < 1 << 63 for number in impression):
            raise ValueError(click)
        held = self.held.get(impression)
        if held is None or click.click_ms < held.click_ms:
            self.held[impression] = HeldClick(click.click_ms, click.arrived_ms)

    def _label(self, example: Example) -> bool:
        """Note one label. Returns whether the impression is clicked.

        Raises:
            ValueError: the record isn't one of the join's.
        """
        if example.kind == REPLAY:
            raise ValueError(example.kind)  # a replay writes this kind, with a header that this record lacks
        if example.click_ms < 0:
            if example.kind == FIRST:
                self.resolved[example.source_offset] = False
            return False  # the join writes no correction to 0; a foreign one leaves the impression clicked
        self.matched.add((example.key, example.click_ms))
        self.resolved[example.source_offset] = True
        return True

    @property
    def furthest(self) -> int:
        """The largest offset in `impressions` that a label or a note names, -1 without any."""
        return max(max(self.resolved, default=-1), max((offset for _, offset in self.held), default=-1))

    def clear(self) -> None:
        """Forget all but `foreign`."""
        for noted in (self.resolved, self.held, self.matched):
            noted.clear()
