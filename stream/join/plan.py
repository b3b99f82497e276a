"""What a step of the join decided, and what it may read of the state to decide it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from state.held_click import HeldClick
from state.join_state import Chunk, Entry, Pending, TimeOffset
from stream.join.memory import EarlyClick
from stream.join.settings_history import NEVER_MS
from stream.records.dead_letter import DeadLetter
from stream.records.example import Example

__all__ = ["Plan", "StoredState"]


class StoredState(Protocol):
    """What the logic reads of `state.join_state.JoinState`. Tests implement it with dictionaries."""

    def entries(self, keys: list[bytes]) -> list[Entry | None]: ...
    def packed_entries(self, keys: list[bytes]) -> list[bytes | None]: ...
    def pending(self, impressions: list[TimeOffset]) -> list[Pending | None]: ...
    def pending_between(self, begin: TimeOffset, end: TimeOffset) -> Iterator[Pending]: ...
    def held(self, impressions: list[TimeOffset]) -> list[HeldClick | None]: ...
    def held_between(self, begin: TimeOffset, end: TimeOffset) -> dict[TimeOffset, HeldClick]: ...


@dataclass(slots=True)
class Plan:
    """What one step decided: what is sent in its transaction, and what changes in the state after it.

    Negatives left out are named by their impressions' offsets. `settled` counts first labels, those left out included.
    """

    examples: list[Example] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    held: dict[TimeOffset, HeldClick] = field(default_factory=dict)  # impressions whose label waits, and their click
    dropped_held: list[TimeOffset] = field(default_factory=list)
    set_aside: dict[TimeOffset, HeldClick] = field(
        default_factory=dict
    )  # the same for impressions whose positive label is too large
    settled: int = 0
    dead: list[DeadLetter] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    remembered: dict[bytes, Entry] = field(default_factory=dict)
    new_ids: list[bytes] = field(default_factory=list)
    first_offset: int = -1  # of the first impression remembered
    new_pending: dict[TimeOffset, tuple[bytes, bytes]] = field(default_factory=dict)  # id and value of each
    dropped_pending: list[TimeOffset] = field(default_factory=list)
    new_early: list[tuple[bytes, EarlyClick]] = field(default_factory=list)
    dropped_early: list[tuple[bytes, EarlyClick]] = field(default_factory=list)
    forgotten: list[Chunk] = field(default_factory=list)
    forget_before_ms: Callable[[int], int] = field(default=lambda offset: NEVER_MS)  # by offset; ids used again later are kept
    expired_until_ms: int = 0
    watermark_ms: int = NEVER_MS
