"""What `examples` says about the impressions and clicks that a rebuild reads again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from state.join_state import Place
from stream.records.dead_letter import REPLAY_HEADER
from stream.records.example import left_out_of, matched_of

__all__ = ["Clicked", "Labels"]


class Clicked(NamedTuple):
    """An impression with a positive label."""

    key: bytes
    time_ms: int
    offset: int


class Labels:
    """Labels and notes of the join, gathered from `examples`.

    Attributes:
        resolved: impressions that have their first label or were left out, by offset: whether they are clicked.
        held: impressions whose click waited for the first label, by (event time, offset): the time of the earliest such click.
        matched: clicks that are accounted for, by id and event time.
        foreign: records that the join has not written.
    """

    def __init__(self) -> None:
        self.resolved: dict[int, bool] = {}
        self.held: dict[Place, int] = {}
        self.matched: set[tuple[bytes, int]] = set()
        self.foreign = 0

    def note(self, records: Sequence[Any]) -> list[Clicked]:
        """Note what these records say. Returns the impressions that they label as clicked."""
        clicked: list[Clicked] = []
        for record in records:
            headers = dict(record.headers)
            if REPLAY_HEADER in headers:
                continue  # a copy of the record that became a dead letter; a correction may have followed that record
            try:
                left_out, matched = left_out_of(record), matched_of(record)
                if left_out is not None:
                    self.resolved.update(dict.fromkeys(left_out, False))
                elif matched is not None:
                    for offset, time_ms, click_ms in matched:
                        impression = _storable(time_ms), _storable(offset)
                        self.held[impression] = min(click_ms, self.held.get(impression, click_ms))
                elif (positive := self._label(record.key, headers)) is not None:
                    clicked.append(positive)
            except (KeyError, TypeError, ValueError, msgspec.DecodeError):
                self.foreign += 1
        return clicked

    def _label(self, key: bytes | None, headers: dict[str, bytes]) -> Clicked | None:
        """Note one label. Returns the impression if it is clicked.

        Raises:
            KeyError, TypeError, ValueError: the record isn't one of the join's.
        """
        kind, label = headers["kind"], headers["label"]
        if key is None or kind not in (b"first", b"correction") or label not in (b"0", b"1"):
            raise ValueError(kind)
        offset, time_ms = _storable(int(headers["source_offset"])), _storable(int(headers["impression_ms"]))
        if label == b"0":
            if kind == b"first":
                self.resolved[offset] = False
            return None  # the join writes no correction to 0; after a foreign one the impression stays clicked
        self.matched.add((key, int(headers["click_ms"])))
        self.resolved[offset] = True
        return Clicked(key, time_ms, offset)

    @property
    def furthest(self) -> int:
        """The largest offset in `impressions` that anything was said about, -1 without any."""
        return max(max(self.resolved, default=-1), max((offset for _, offset in self.held), default=-1))

    def clear(self) -> None:
        """Forget all but `foreign`."""
        for noted in (self.resolved, self.held, self.matched):
            noted.clear()


def _storable(number: int) -> int:
    """Raises ValueError for what no event time and no offset can be."""
    if not 0 <= number < 1 << 63:
        raise ValueError(number)
    return number
