"""The part of a partition's state that is small enough to be kept in memory. RocksDB has it, too."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from state.held_click import NOT_KNOWN_MS, HeldClick
from state.join_state import Chunk
from stream.join.settings_history import NEVER_MS, History, Terms
from stream.records.dead_letter import DeadLetter
from stream.records.record import Header, Record

__all__ = ["EarlyClick", "LowWater", "Memory"]


class _ClickRecord(msgspec.Struct, frozen=True, array_like=True):
    """What the state keeps of the record of an early click. State of a layout before 5 has no `arrived_ms`."""

    value: bytes | None
    headers: tuple[Header, ...]
    arrived_ms: int = NOT_KNOWN_MS


class EarlyClick(NamedTuple):
    """A click whose impression has not come. `packed` has what its dead letter would need, and its arrival."""

    time_ms: int
    offset: int
    packed: bytes

    @classmethod
    def of(cls, record: Record, time_ms: int) -> EarlyClick:
        packed = msgspec.msgpack.encode(_ClickRecord(record.value, tuple(record.headers), record.timestamp))
        return cls(time_ms, record.offset, packed)

    def held(self) -> HeldClick:
        """The click once it is matched and waits for the first label."""
        return HeldClick(self.time_ms, msgspec.msgpack.decode(self.packed, type=_ClickRecord).arrived_ms)

    def letter(self, key: bytes, topic: str, partition: int) -> DeadLetter:
        """The click as a dead letter without an error text."""
        record = msgspec.msgpack.decode(self.packed, type=_ClickRecord)
        return DeadLetter(
            "orphan_click", "", "$.impression_id", topic, partition, self.offset, key, record.value, record.headers
        )


class LowWater(NamedTuple):
    """The earliest offset of each topic that is still needed."""

    impressions: int
    clicks: int
    examples: int


@dataclass(slots=True)
class Memory:
    """Watermarks, settings in force, early clicks and chunks of one partition.

    Early clicks are found by id and event time. A chunk names the ids that one step remembered. Both are added in order of
    offset, and dictionaries keep that order, so the first of each is the low-water mark.
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
    _early_due: list[tuple[int, int, bytes]] = field(default_factory=list)  # a heap: time, offset, id; also of matched clicks
    _chunks: dict[Chunk, None] = field(default_factory=dict)
    _chunks_due: list[tuple[int, Chunk]] = field(default_factory=list)  # a heap by largest event time + horizon

    @property
    def early_clicks(self) -> int:
        return len(self._early_offsets)

    def first_is_out(self, time_ms: int, offset: int, terms: Terms) -> bool:
        """Whether the steps before this one have moved the watermark past an impression's hold: its label is out."""
        due_ms = time_ms + terms.hold_ms
        return due_ms < self.watermark_ms or (due_ms == self.watermark_ms and offset < self.cut)

    def add_early(self, key: bytes, click: EarlyClick) -> None:
        self.early.setdefault(key, {})[click.time_ms] = click
        self._early_offsets[click.offset] = None
        heapq.heappush(self._early_due, (click.time_ms, click.offset, key))

    def drop_early(self, key: bytes, clicks: Iterable[EarlyClick]) -> None:
        waiting = self.early[key]
        for click in clicks:
            del waiting[click.time_ms], self._early_offsets[click.offset]
        if not waiting:
            del self.early[key]

    def due_early(self, before_ms: int) -> Iterator[tuple[bytes, EarlyClick]]:
        """Remove and return the early clicks whose event time is before `before_ms`, with their ids."""
        while self._early_due:
            time_ms, offset, key = self._early_due[0]
            if time_ms >= before_ms:
                return
            heapq.heappop(self._early_due)
            click = self.early.get(key, {}).get(time_ms)
            if click is not None and click.offset == offset:
                self.drop_early(key, [click])
                yield key, click

    def add_chunk(self, chunk: Chunk) -> None:
        self._chunks[chunk] = None
        heapq.heappush(self._chunks_due, (chunk.max_time_ms + self.history.of(chunk.first_offset).horizon_ms, chunk))

    def due_chunks(self, late_before_ms: int) -> list[Chunk]:
        """Remove and return the chunks of which all ids may be forgotten.

        An id may be forgotten once every impression that could be a duplicate of it would be late.
        """
        due: list[Chunk] = []
        while self._chunks_due:
            due_ms, chunk = self._chunks_due[0]
            if due_ms >= late_before_ms:
                break
            heapq.heappop(self._chunks_due)
            del self._chunks[chunk]
            due.append(chunk)
        return due

    def low_water(self, impressions: int, clicks: int, examples: int) -> LowWater:
        """The earliest offsets that early clicks and remembered ids still need.

        Args:
            impressions, clicks, examples: the positions now, which are the answer when nothing is remembered.
        """
        for chunk in self._chunks:
            impressions, examples = min(impressions, chunk.first_offset), min(examples, chunk.examples_position)
            break
        for offset in self._early_offsets:
            clicks = min(clicks, offset)
            break
        return LowWater(impressions, clicks, examples)
