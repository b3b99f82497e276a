"""A collisionless hash table from 64-bit keys to dense rows, in plain torch: one code for CPU and CUDA.

Open addressing with linear probing; all probes of a batch go at once. Rows are 1, 2, 3, … in order of arrival, so that
whatever lies beside the table (embeddings, optimizer state) is contiguous and needs no compaction to be saved. Row 0
is for keys that aren't there.
"""

from __future__ import annotations

import torch

from model.hashing import EMPTY_KEY

__all__ = ["ABSENT_ROW", "KeyTable"]

ABSENT_ROW = 0

_MULTIPLIER = -7046029254386353131  # 2**64 / golden ratio as a signed integer, odd: Fibonacci hashing (Knuth, 6.4)

_MAX_LOAD = 2
"""Slots for each key at the least: at half full a hit takes 1.5 probes on average (Knuth, 6.4), at 90 % 5.5."""

_WINDOW = 8
"""Slots that a small lookup reads at once: few of its keys lie further from home, and a pass costs more than a read."""

_SMALL_LOOKUP = 2048
"""Keys up to which a lookup is bound by the number of passes, not by memory."""


class KeyTable:
    """Keys (int64, never `EMPTY_KEY`) to rows 1 … `len(self)`.

    table = KeyTable(torch.device("cpu"))
    rows = table.insert(keys)   # (N,), new keys get the next rows
    rows = table.lookup(keys)   # (N,), ABSENT_ROW for keys never inserted
    """

    def __init__(self, device: torch.device, expected: int = 0) -> None:
        self.device = device
        self._count = 0
        self._allocate(max(1024, _power_of_two(expected * _MAX_LOAD)))

    def __len__(self) -> int:
        return self._count

    def _allocate(self, slots: int) -> None:
        self._slot_keys = torch.full((slots,), EMPTY_KEY, dtype=torch.int64, device=self.device)
        self._slot_rows = torch.zeros(slots, dtype=torch.int32, device=self.device)
        self._mask = slots - 1
        self._shift = 64 - (slots.bit_length() - 1)
        self._window = torch.arange(_WINDOW, device=self.device)

    def _home(self, keys: torch.Tensor) -> torch.Tensor:
        return ((keys * _MULTIPLIER) >> self._shift) & self._mask

    def lookup(self, keys: torch.Tensor) -> torch.Tensor:
        """Rows (N,) int64 of `keys` (N,), `ABSENT_ROW` where a key isn't in the table. Repeated keys are fine."""
        slots = self._home(keys)
        places: torch.Tensor | None = None  # where in `rows` the keys still looked for belong
        if len(keys) <= _SMALL_LOOKUP:
            rows, open_ = self._probe(keys, slots)
            slots = slots + _WINDOW
        else:  # most keys are at home, and reading on for all of them would cost more than it saves
            found = self._slot_keys.index_select(0, slots)
            hit = found == keys
            rows = (self._slot_rows.index_select(0, slots) * hit).to(torch.int64)
            open_ = (hit | (found == EMPTY_KEY)).logical_not_()
            slots = slots + 1
        active = open_.nonzero().squeeze(1)
        while len(active):
            keys, slots = keys.index_select(0, active), slots.index_select(0, active)
            active_rows, open_ = self._probe(keys, slots)
            places = active if places is None else places.index_select(0, active)
            rows.index_copy_(0, places, active_rows)
            active = open_.nonzero().squeeze(1)
            slots = slots + _WINDOW
        return rows

    def _probe(self, keys: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (N,) of the keys found within a window of slots from `slots` (N,) on, 0 for the rest; and which of them
        may still lie further on."""
        near = (slots.unsqueeze(1) + self._window) & self._mask  # (N, W)
        found = self._slot_keys.index_select(0, near.flatten()).view(near.shape)
        hit = found == keys.unsqueeze(1)
        where = (near * hit).amax(1)  # the slot of the hit, if there is one
        is_hit = hit.any(1)
        rows = self._slot_rows.index_select(0, where) * is_hit
        return rows.to(torch.int64), (is_hit | (found == EMPTY_KEY).any(1)).logical_not_()

    def insert(self, keys: torch.Tensor) -> torch.Tensor:
        """Rows (N,) int64 of `keys` (N,). Keys that are new get the next rows, in ascending order of the keys."""
        rows = self.lookup(keys)
        absent = (rows == ABSENT_ROW).nonzero().squeeze(1)
        if len(absent):
            new, which = torch.unique(keys[absent], return_inverse=True)
            first = self._count + 1
            self._append(new)
            rows[absent] = which + first
        return rows

    def load(self, keys: torch.Tensor) -> None:
        """Fills an empty table with different `keys` (N,), rows in their order."""
        assert self._count == 0
        self._append(keys.to(self.device))

    def _append(self, keys: torch.Tensor) -> None:
        """Adds `keys` (N,), all new and all different."""
        if (self._count + len(keys)) * _MAX_LOAD > len(self._slot_keys):
            self._grow(self._count + len(keys))
        first = self._count + 1
        rows = torch.arange(first, first + len(keys), dtype=torch.int32, device=self.device)
        self._place(keys, rows)
        self._count += len(keys)

    def _grow(self, keys: int) -> None:
        used = (self._slot_keys != EMPTY_KEY).nonzero().squeeze(1)
        old_keys, old_rows = self._slot_keys[used], self._slot_rows[used]
        self._allocate(_power_of_two(keys * _MAX_LOAD))
        self._place(old_keys, old_rows)

    def _place(self, keys: torch.Tensor, rows: torch.Tensor) -> None:
        slots = self._home(keys)
        while len(keys):
            free = self._slot_keys[slots] == EMPTY_KEY
            self._slot_keys[slots[free]] = keys[free]  # of two keys for one slot one is written, the other goes on
            placed = self._slot_keys[slots] == keys
            self._slot_rows[slots[placed]] = rows[placed]
            left = placed.logical_not_()
            keys, rows, slots = keys[left], rows[left], (slots[left] + 1) & self._mask


def _power_of_two(at_least: int) -> int:
    return 1 << max(0, at_least - 1).bit_length()
