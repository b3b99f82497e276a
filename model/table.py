"""A table from 64-bit keys to row numbers, in plain torch: the same code and the same rows on CPU and CUDA.

Rows are numbered from 1 on without gaps, so that the arrays that they index (embeddings, optimizer state) stay small. Row 0 is
for keys that aren't in the table. Memory is about 15 bytes a key: 8 for the key and 7 for its slots (`model.slots`). After a
growth step it is up to 18, and up to 25 during one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from model.hashing import EMPTY_KEY
from model.reserve import reservable_rows, reserved
from model.slots import ABSENT_ROW, Slots

__all__ = ["ABSENT_ROW", "Choose", "Items", "KeyTable"]

Choose = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Says which of M new keys get a row, bool (M,), from the keys and from `absent` and `which` as in `Inserted`."""

# Share of slots that are taken when a table is made for a number of keys, and when it begins to grow. At 0.6, 3 in 4 keys are
# in their home slot and 1 in 250 isn't in its home bucket. At 0.75, lookups take up to twice as long.
_LOAD = 0.6
# The share at which a growth step that was put off has to be done at once.
_LARGEST_LOAD = 0.75
# After a growth step there are slots for so many times the keys: 0.4 of the slots are taken then.
_GROWTH = 1.5

# Rows that move to the new slots with each key that is added during a growth step, and at least at a time. Between 0.6 and
# 0.75, a key comes for each 4 rows that have to move: with 5 the step is done at 0.72. 5 rows take some 0.3 µs.
_MOVED_FOR_A_KEY = 5
_MOVED_AT_LEAST = 4096
# Rows at a time for growth that can't wait: they take some 5 MB of memory meanwhile.
_MOVED_AT_ONCE = 1 << 18


class Items(NamedTuple):
    """N keys and their rows, int64 (N,) each."""

    keys: torch.Tensor
    rows: torch.Tensor


class Inserted(NamedTuple):
    """What `KeyTable.insert` found and gave.

    rows    int64 (N,): the rows of the N keys; `ABSENT_ROW` for keys that get none
    new     the M keys that had no row before, in ascending order of the keys, with their rows
    absent  int64 (E,): which of the N keys are these new ones; a new key may be there several times
    which   int64 (E,): which of the M new keys each of these is
    """

    rows: torch.Tensor
    new: Items
    absent: torch.Tensor
    which: torch.Tensor


class KeyTable:
    """Maps keys (int64, never `EMPTY_KEY`) to rows from 1 on.

        table = KeyTable(torch.device("cpu"))
        rows = table.insert(keys).rows  # (N,), new keys get rows
        rows = table.lookup(keys)  # (N,), ABSENT_ROW for keys that aren't in the table
        freed = table.delete(keys) # (M,), rows of the keys that were in it

    A new key gets the row that was freed last, else the next row; so rows don't depend on the device. `expected` keys fit
    without growing.

    One thread changes the table. Others may look keys up meanwhile, but not during `insert`, `load` and `delete`. Growth
    doesn't need that: `reserve`, called before, does its work beside lookups.
    """

    def __init__(self, device: torch.device, expected: int = 0) -> None:
        self.device = device
        self._count = 0
        self._last_row = 0
        self._freed: list[torch.Tensor] = []  # rows by the deletion that freed them, each in ascending order
        self._before_holes: torch.Tensor | None = None  # while it is filled
        self._slots = Slots(_slots_for(expected), device)
        self._grown: Slots | None = None  # the new slots during a growth step
        self._moved = 0  # rows up to this one are in the new slots
        self._keys = self._allocate(max(expected, 1024) + 1)

    @property
    def size(self) -> int:
        """Bytes of memory."""
        grown = self._grown
        slots = (self._slots,) if grown is None else (self._slots, grown)
        return (self._last_row + 1) * self._keys.itemsize + sum(each.bytes for each in slots)

    @property
    def is_growing(self) -> bool:
        """Whether a growth step is under way."""
        return self._grown is not None

    @property
    def free(self) -> torch.Tensor:
        """Rows (N,) int64 whose keys were deleted, in the order in which new keys get them."""
        return torch.cat(self._freed[::-1]) if self._freed else torch.empty(0, dtype=torch.int64, device=self.device)

    def begin_fill(self, free: torch.Tensor) -> None:
        """Begins to fill this empty table with the keys of another one, whose `free` is given (N,).

        Keys get the rows that they have there, if they are loaded in the order of their rows. Call `end_fill` then.
        """
        holes = free.to(self.device, torch.int64).sort().values
        self._keys.index_fill_(0, holes, EMPTY_KEY)
        # How many keys come before each hole.
        self._before_holes = holes - torch.arange(1, len(holes) + 1, device=self.device)

    def end_fill(self, free: torch.Tensor) -> None:
        """Ends it. From now on the two tables behave alike."""
        self._before_holes = None
        self._freed = [free.to(self.device, torch.int64)] if len(free) else []
        self._last_row = self._count + len(free)

    def __len__(self) -> int:
        """Number of keys."""
        return self._count

    @property
    def last_row(self) -> int:
        """The largest row that a key has had; as many rows are in use as keys are in the table if none was freed."""
        return self._last_row

    def lookup(self, keys: torch.Tensor) -> torch.Tensor:
        """Rows (N,) int64 of `keys` (N,), `ABSENT_ROW` for a key that isn't in the table. Keys may repeat."""
        slots = self._slots  # before the keys: they may be replaced meanwhile, and newer keys have all rows of older slots
        return slots.find(keys, self._keys)

    def keys_of(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Keys int64 (N,) of rows, `EMPTY_KEY` for a row without a key. A slice shares memory with the table."""
        return self._keys[rows]

    def items(self) -> Items:
        """All keys with their rows, in ascending order of the rows."""
        keys = self._keys[: self._last_row + 1]
        rows = (keys != EMPTY_KEY).nonzero().squeeze(1)
        return Items(keys[rows], rows)

    def insert(self, keys: torch.Tensor, choose: Choose | None = None) -> Inserted:
        """Finds `keys` (N,), and gives rows to those that have none, in ascending order of the keys.

        choose  says which of them get one; all when None
        """
        rows = self.lookup(keys)
        absent = (rows == ABSENT_ROW).nonzero().squeeze(1)
        if not len(absent):
            return Inserted(rows, Items(absent, absent), absent, absent)
        new, which = torch.unique(keys[absent], return_inverse=True)
        if choose is not None:
            chosen = choose(new, absent, which)
            gets_one = chosen.index_select(0, which)
            absent, which = absent[gets_one], (chosen.cumsum(0) - 1).index_select(0, which[gets_one])
            new = new[chosen]
        self.reserve(len(new))
        new_rows = self.load(new)
        rows[absent] = new_rows[which]
        return Inserted(rows, Items(new, new_rows), absent, which)

    def load(self, keys: torch.Tensor) -> torch.Tensor:
        """Adds distinct `keys` (N,) that aren't in the table, without looking for them. Returns their rows (N,) int64.

        Rows are given in the order of the keys: in a table that none was deleted from, the next ones.
        """
        keys = keys.to(self.device)
        self._make_slots(len(keys))
        last = self._last_row
        rows = self._take_rows(len(keys))
        self._make_room(self._last_row + 1)
        if self._last_row - last == len(keys):  # the next ones
            self._keys[last + 1 : self._last_row + 1] = keys
        else:
            self._keys.index_copy_(0, rows, keys)
        self._slots.add(keys, rows)
        if self._grown is not None:
            moved = rows <= self._moved
            self._grown.add(keys[moved], rows[moved])
        self._count += len(keys)
        return rows

    def delete(self, keys: torch.Tensor) -> torch.Tensor:
        """Removes `keys` (N,). Returns the freed rows (M,) int64, ascending; keys that aren't in the table have none.

        The next new keys get these rows, the lowest first.
        """
        rows = self.lookup(keys.to(self.device))
        rows = torch.unique(rows[rows != ABSENT_ROW])
        if not len(rows):
            return rows
        gone = self._keys.index_select(0, rows)
        self._slots.remove(gone, rows)
        if self._grown is not None:
            moved = rows <= self._moved
            self._grown.remove(gone[moved], rows[moved])
        self._keys.index_fill_(0, rows, EMPTY_KEY)
        self._freed.append(rows)
        self._count -= len(rows)
        return rows

    def reserve(self, count: int) -> None:
        """Prepares for `count` new keys, beside lookups: does the part of a growth step that is due."""
        if self._too_full(count):
            return  # too many for a step by step: `load` grows at once
        if self._grown is None:
            if self._count + self._slots.removed + count <= _LOAD * self._slots.size:
                return
            self._grown, self._moved = self._larger(count), 0
        self._move(max(_MOVED_AT_LEAST, _MOVED_FOR_A_KEY * count))

    def _too_full(self, count: int) -> bool:
        """Whether the slots are too few for `count` more keys."""
        return self._count + self._slots.removed + count > _LARGEST_LOAD * self._slots.size

    def _larger(self, count: int) -> Slots:
        """Empty slots for all keys and `count` more to come; never fewer than now, so that they have bits for all rows."""
        return Slots(max(self._slots.size, _slots_for(_GROWTH * (self._count + count))), self.device)

    def _move(self, rows: int) -> None:
        """Adds the next `rows` rows to the new slots of a growth step, and changes over to them once they have all."""
        assert self._grown is not None
        last = min(self._moved + rows, self._last_row)
        self._grown.add(*self._used(self._moved + 1, last))
        self._moved = last
        if last == self._last_row:
            self._slots, self._grown = self._grown, None

    def _used(self, first: int, last: int) -> Items:
        """The keys of rows `first` to `last`, with these rows."""
        keys, rows = self._keys[first : last + 1], torch.arange(first, last + 1, device=self.device)
        holes = self._before_holes
        if self._freed or (holes is not None and len(holes)):
            used = (keys != EMPTY_KEY).nonzero().squeeze(1)
            return Items(keys.index_select(0, used), rows.index_select(0, used))
        return Items(keys, rows)

    def _make_slots(self, count: int) -> None:
        """Slots for `count` more keys, at once."""
        if self._too_full(count):
            self._grown, self._moved = self._larger(count), 0
            while self._grown is not None:
                self._move(_MOVED_AT_ONCE)

    def _make_room(self, rows: int) -> None:
        """Room for the keys of at least `rows` rows."""
        if rows > len(self._keys):
            old = self._keys
            self._keys = self._allocate(max(rows, 2 * len(old)))
            self._keys[: len(old)] = old

    def _allocate(self, rows: int) -> torch.Tensor:
        """Keys by row for at least `rows` rows, none of them in use."""
        if self.device.type == "cpu":
            keys = reserved((reservable_rows(rows, row_bytes=8),), torch.int64)
        else:
            keys = torch.zeros(rows, dtype=torch.int64, device=self.device)
        keys[ABSENT_ROW] = EMPTY_KEY
        return keys

    def _take_rows(self, count: int) -> torch.Tensor:
        """Rows (N,) for `count` new keys."""
        holes = self._before_holes
        if holes is not None and len(holes):
            numbers = torch.arange(self._count, self._count + count, device=self.device)
            rows = numbers + 1 + torch.searchsorted(holes, numbers, right=True)
            self._last_row = int(rows[-1]) if count else self._last_row
            return rows
        parts = []
        while count and self._freed:
            rows = self._freed.pop()
            parts.append(rows[:count])
            if len(rows) > count:
                self._freed.append(rows[count:])
            count -= len(parts[-1])
        parts.append(torch.arange(self._last_row + 1, self._last_row + count + 1, device=self.device))
        self._last_row += count
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _slots_for(keys: float) -> int:
    """Slots for so many keys."""
    return math.ceil(keys / _LOAD)
