"""The part of a partition's state that is small enough to stand in memory; RocksDB has it too."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from state.join_state import Chunk
from stream.join.settings_history import NEVER_MS, History, Terms

__all__ = ["EarlyClick", "LowWater", "Memory"]

EarlyClick = tuple[int, int, bytes]  # event time, offset, the record as `logic.packed_click` has it


class LowWater(NamedTuple):
    """The earliest offsets that taking over a partition without local state would read."""

    impressions: int
    clicks: int
    examples: int


@dataclass(slots=True)
class Memory:
    """Watermarks, settings in force, early clicks and chunks of one partition.

    Early clicks are those whose impression has not come, by id and event time; a chunk is what one step remembered. Both come
    in order of offset, and dictionaries keep that order, so the first of each is the low-water mark.
    """

    history: History
    watermark_ms: int = NEVER_MS
    cut: int = 0  # first labels are out below (watermark_ms, cut), by (event time + hold, offset)
    impressions_seen_ms: int = NEVER_MS
    clicks_seen_ms: int = NEVER_MS
    life: str = ""  # of the progress: another one after offsets were reset by hand
    expired_ms: int = 0  # pending impressions before this event time have been deleted
    early: dict[bytes, dict[int, EarlyClick]] = field(default_factory=dict)
    _early_offsets: dict[int, None] = field(default_factory=dict)
    _early_due: list[tuple[int, int, bytes]] = field(default_factory=list)  # a heap; clicks matched since stay in it
    _chunks: dict[Chunk, None] = field(default_factory=dict)
    _chunks_due: list[tuple[int, Chunk]] = field(default_factory=list)  # a heap by largest event time + horizon

    @property
    def early_clicks(self) -> int:
        return len(self._early_offsets)

    def first_is_out(self, time_ms: int, offset: int, terms: Terms) -> bool:
        """Whether the watermark has passed the hold of an impression, by all steps so far."""
        due_ms = time_ms + terms.hold_ms
        return due_ms < self.watermark_ms or (due_ms == self.watermark_ms and offset < self.cut)

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
        heapq.heappush(self._chunks_due, (chunk.max_time_ms + self.history.of(chunk.first_offset).horizon_ms, chunk))

    def due_chunks(self, late_before_ms: int) -> list[Chunk]:
        """Take out the chunks whose every id may be forgotten: no impression that isn't late can be a duplicate of one."""
        due = []
        while self._chunks_due and self._chunks_due[0][0] < late_before_ms:
            due.append(heapq.heappop(self._chunks_due)[1])
            del self._chunks[due[-1]]
        return due

    def low_water(self, impressions: int, clicks: int, examples: int) -> LowWater:
        """The earliest offsets that what is remembered still needs, given the positions now."""
        for chunk in self._chunks:
            impressions, examples = min(impressions, chunk.first_offset), min(examples, chunk.examples_position)
            break
        for offset in self._early_offsets:
            clicks = min(clicks, offset)
            break
        return LowWater(impressions, clicks, examples)
