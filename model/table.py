"""A collisionless hash table from 64-bit keys to row numbers, in plain torch: the same code for CPU and CUDA.

It uses open addressing with linear probing, and probes for all keys of a batch at once. Row numbers are 1, 2, 3, … in order of
insertion, so that the arrays that they index (embeddings, optimizer state) are contiguous and can be saved without compaction.
Row 0 is for keys that aren't in the table.
"""

from __future__ import annotations

import torch

from model.hashing import EMPTY_KEY

__all__ = ["ABSENT_ROW", "KeyTable"]

ABSENT_ROW = 0

_MULTIPLIER = -7046029254386353131  # 2**64 / golden ratio as a signed odd integer: Fibonacci hashing (Knuth, 6.4)

_SLOTS_PER_KEY = 2
"""Least slots for each key: in a table half full a hit takes 1.5 probes on average (Knuth, 6.4), in one 90 % full 5.5."""

_WINDOW = 8
"""Slots that a small lookup reads at once from a key's home slot on: few keys are further away, and a pass costs more."""

_SMALL_LOOKUP = 2048
"""A lookup of at most so many keys is bound by the number of passes, a larger one by memory."""


class KeyTable:
    """Maps keys (int64, never `EMPTY_KEY`) to rows 1 to `len(self)`.

    table = KeyTable(torch.device("cpu"))
    rows = table.insert(keys)   # (N,), new keys get the next rows
    rows = table.lookup(keys)   # (N,), ABSENT_ROW for keys that were never inserted

    `expected` keys fit without growing.
    """

    def __init__(self, device: torch.device, expected: int = 0) -> None:
        self.device = device
        self._count = 0
        self._allocate(max(1024, _power_of_two(expected * _SLOTS_PER_KEY)))

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
        """Rows (N,) int64 of `keys` (N,), `ABSENT_ROW` for a key that isn't in the table. Keys may repeat."""
        slots = self._home(keys)
        positions: torch.Tensor | None = None  # positions in `rows` of the keys that aren't found yet
        if len(keys) <= _SMALL_LOOKUP:
            rows, open_ = self._probe(keys, slots)
            slots = slots + _WINDOW
        else:  # most keys are in their home slot, and reading a window for all of them would cost more than it saves
            found = self._slot_keys.index_select(0, slots)
            hit = found == keys
            rows = (self._slot_rows.index_select(0, slots) * hit).to(torch.int64)
            open_ = (hit | (found == EMPTY_KEY)).logical_not_()
            slots = slots + 1
        active = open_.nonzero().squeeze(1)
        while len(active):
            keys, slots = keys.index_select(0, active), slots.index_select(0, active)
            active_rows, open_ = self._probe(keys, slots)
            positions = active if positions is None else positions.index_select(0, active)
            rows.index_copy_(0, positions, active_rows)
            active = open_.nonzero().squeeze(1)
            slots = slots + _WINDOW
        return rows

    def _probe(self, keys: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (N,) of the keys within a window from `slots` (N,) on, 0 for the others; and which of them may be further on."""
        near = (slots.unsqueeze(1) + self._window) & self._mask  # (N, W)
        found = self._slot_keys.index_select(0, near.flatten()).view(near.shape)
        hit = found == keys.unsqueeze(1)
        where = (near * hit).amax(1)  # the slot of the hit, if there is one
        is_hit = hit.any(1)
        rows = self._slot_rows.index_select(0, where) * is_hit
        return rows.to(torch.int64), (is_hit | (found == EMPTY_KEY).any(1)).logical_not_()

    def insert(self, keys: torch.Tensor) -> torch.Tensor:
        """Rows (N,) int64 of `keys` (N,). New keys get the next rows, in ascending order of the keys."""
        rows = self.lookup(keys)
        absent = (rows == ABSENT_ROW).nonzero().squeeze(1)
        if len(absent):
            new, which = torch.unique(keys[absent], return_inverse=True)
            first = self._count + 1
            self._append(new)
            rows[absent] = which + first
        return rows

    def load(self, keys: torch.Tensor) -> None:
        """Adds distinct `keys` (N,), none of which is in the table; they get the next rows in their order."""
        self._append(keys.to(self.device))

    def _append(self, keys: torch.Tensor) -> None:
        """Adds `keys` (N,), all new and distinct."""
        if (self._count + len(keys)) * _SLOTS_PER_KEY > len(self._slot_keys):
            self._grow(self._count + len(keys))
        first = self._count + 1
        rows = torch.arange(first, first + len(keys), dtype=torch.int32, device=self.device)
        self._write(keys, rows)
        self._count += len(keys)

    def _grow(self, keys: int) -> None:
        used = (self._slot_keys != EMPTY_KEY).nonzero().squeeze(1)
        old_keys, old_rows = self._slot_keys[used], self._slot_rows[used]
        self._allocate(_power_of_two(keys * _SLOTS_PER_KEY))
        self._write(old_keys, old_rows)

    def _write(self, keys: torch.Tensor, rows: torch.Tensor) -> None:
        """Writes keys that aren't in the table into free slots."""
        slots = self._home(keys)
        while len(keys):
            free = self._slot_keys[slots] == EMPTY_KEY
            self._slot_keys[slots[free]] = keys[free]  # if two keys want one slot, one is written and the other tries the next
            written = self._slot_keys[slots] == keys
            self._slot_rows[slots[written]] = rows[written]
            left = written.logical_not_()
            keys, rows, slots = keys[left], rows[left], (slots[left] + 1) & self._mask


def _power_of_two(at_least: int) -> int:
    return 1 << max(0, at_least - 1).bit_length()
