"""The slots of a key table, in which the row of each key is found.

Slots lie in buckets of 16, as many as fill a line of the processor's cache. A key's hash names its home slot. A key that is
added takes its home slot, or else another slot of that bucket, or else one of the next bucket, and so on. So a lookup ends at
the first bucket that has a free slot.

A slot is a word: the key's row, and above it a tag of some bits of the key's hash. In a table of 10 million keys these are 7
bits, so about one in 128 other keys looks like the one that is looked up. Tags only save time: which key a row has is in the
table's list of keys by row, and a lookup compares that key.
"""

from __future__ import annotations

import numpy as np
import torch

from model.errors import ModelError

__all__ = ["ABSENT_ROW", "Slots"]

ABSENT_ROW = 0

_BUCKET = 16
_FREE = 0  # the word of a slot that no key has had
_LEAST_TAG = 2  # 0 is the tag of a free slot, 1 that of a slot whose key was removed
_LEAST_SIZE = 1024
_LARGEST_OF_32_BITS = 1 << 29  # more slots than these leave no bits for tags in words of 32 bits

_MULTIPLIER = -7046029254386353131  # 2**64 / golden ratio as a signed odd integer: Fibonacci hashing (Knuth, 6.4)
_LOW_HALF = (1 << 32) - 1

# Buckets that are read at once for a key that isn't found in its own. At 60 % load, keys are hardly ever further away.
_WINDOW = 4
# A lookup of at most so many keys is bound by the number of passes, a larger one by memory.
_SMALL_LOOKUP = 2048
# Keys that are added at once, so that what a pass over them needs stays in the processor's cache.
_ADDED_AT_ONCE = 1 << 18


class Slots:
    """At least `count` slots, fewer than 2**31, for rows 1 to `count`.

    size     number of slots
    removed  number of slots whose key was removed while no slot of their bucket was free. They count as taken, since keys may
             lie behind them, but the next key can have them.

    A lookup needs the keys by row, int64 (R,): the key of each row, and `EMPTY_KEY` at row 0. Any number of threads may look
    keys up while no thread adds or removes any.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.size = -(-max(count, _LEAST_SIZE) // _BUCKET) * _BUCKET
        self.removed = 0
        wide = self.size >= _LARGEST_OF_32_BITS
        self._words = torch.zeros(self.size, dtype=torch.int64 if wide else torch.int32, device=device)
        self._buckets = self._words.view(-1, _BUCKET)
        self._row_bits = self.size.bit_length()
        self._row_mask = (1 << self._row_bits) - 1
        self._word_mask = (1 << (63 if wide else 31)) - 1  # no word is negative
        self._removed_word = 1 << self._row_bits

    @property
    def bytes(self) -> int:
        """Bytes of memory."""
        return self._words.nbytes

    def find(self, keys: torch.Tensor, keys_by_row: torch.Tensor) -> torch.Tensor:
        """Rows int64 (N,) of `keys` (N,), `ABSENT_ROW` for a key that isn't there. Keys may repeat."""
        hashes = keys * _MULTIPLIER
        slots = self._home(hashes)
        if len(keys) <= _SMALL_LOOKUP:
            return self._search(keys, hashes, slots, keys_by_row)
        # Most keys are at home, and reading a bucket for all of them would cost more than it saves.
        words = self._words.index_select(0, slots)
        rows = words & self._row_mask
        hit = keys_by_row.index_select(0, rows) == keys
        found = (rows * hit).to(torch.int64)
        left = _where(hit.logical_not_())
        if len(left):
            keys, hashes, slots = (each.index_select(0, left) for each in (keys, hashes, slots))
            found.index_copy_(0, left, self._search(keys, hashes, slots, keys_by_row))
        return found

    def add(self, keys: torch.Tensor, rows: torch.Tensor) -> None:
        """Adds distinct `keys` (N,) that aren't there, with their rows (N,). The caller sees to it that slots stay free."""
        for start in range(0, len(keys), _ADDED_AT_ONCE):
            part = slice(start, start + _ADDED_AT_ONCE)
            self._add(keys[part], rows[part])

    def remove(self, keys: torch.Tensor, rows: torch.Tensor) -> None:
        """Removes distinct `keys` (N,) that are there, with these rows (N,)."""
        buckets = self._home(keys * _MULTIPLIER).bitwise_right_shift_(4)
        while len(rows):
            words = self._buckets.index_select(0, buckets)  # (N, 16)
            free = words.amin(1) == _FREE
            slots = _where(((words & self._row_mask) == rows.unsqueeze(1)).flatten())
            which = slots >> 4
            free_beside = free.index_select(0, which)
            slots.bitwise_and_(_BUCKET - 1).add_(buckets.index_select(0, which).mul_(_BUCKET))
            self._words.index_copy_(0, slots, free_beside.logical_not().to(words.dtype).mul_(self._removed_word))
            self.removed += len(which) - int(free_beside.sum())
            elsewhere = torch.ones_like(free).index_fill_(0, which, False)
            if (free & elsewhere).any():
                raise ModelError("key table: expected each key where its hash leads, found one missing: memory has changed")
            rows, buckets = rows[elsewhere], self._next(buckets[elsewhere])

    def _home(self, hashes: torch.Tensor) -> torch.Tensor:
        """Home slots int64 (N,) by hash (N,): the upper half of the hash, scaled to the number of slots."""
        return (hashes >> 32).bitwise_and_(_LOW_HALF).mul_(self.size).bitwise_right_shift_(32)

    def _tags(self, hashes: torch.Tensor) -> torch.Tensor:
        """Tags (N,) at their bits of a word: the lowest bits of the hash."""
        tags = (hashes << self._row_bits).bitwise_and_(self._word_mask).clamp_(min=_LEAST_TAG << self._row_bits)
        return tags.to(self._words.dtype)

    def _next(self, buckets: torch.Tensor) -> torch.Tensor:
        """The buckets after these (N,), in place."""
        return buckets.add_(1).mul_(buckets < len(self._buckets))

    def _search(self, keys: torch.Tensor, hashes: torch.Tensor, slots: torch.Tensor, keys_by_row: torch.Tensor) -> torch.Tensor:
        """Rows int64 (N,) of `keys` with these hashes and home slots (N,), bucket by bucket."""
        buckets = slots >> 4
        words = self._buckets.index_select(0, buckets)  # (N, 16)
        taken = words.amin(1)  # 0 where a slot is free
        # Where the tag is right, the row is left, elsewhere a larger number. The least row whose tag is right is tried first.
        tags = self._tags(hashes).unsqueeze(1)  # (N, 1)
        row = words.bitwise_xor_(tags).amin(1)
        candidate = row <= self._row_mask
        row.mul_(candidate)
        hit = keys_by_row.index_select(0, row) == keys
        found = row.mul_(hit).to(torch.int64)
        left = _where(hit.logical_or_((taken == _FREE).logical_and_(candidate.logical_not())).logical_not_())
        if not len(left):
            return found
        # The few that another key with the same tag hid, or whose bucket was full: in several buckets at once.
        keys, buckets, tags = (each.index_select(0, left) for each in (keys, buckets, tags))
        window = torch.arange(_WINDOW, device=keys.device)
        while len(left):
            near = (buckets.unsqueeze(1) + window).remainder_(len(self._buckets))  # (N, W)
            words = self._buckets.index_select(0, near.flatten()).view(len(left), -1)  # (N, W * 16)
            full = words.amin(1) != _FREE
            slots = _where((words.bitwise_xor_(tags) <= self._row_mask).flatten())  # whose tag is right: the row is left
            row, owner = words.flatten().index_select(0, slots), slots // words.shape[1]
            hits = _where(keys_by_row.index_select(0, row) == keys.index_select(0, owner))
            owner = owner.index_select(0, hits)
            found.index_copy_(0, left.index_select(0, owner), row.index_select(0, hits).to(torch.int64))
            more = _where(full.index_fill_(0, owner, False))
            left, keys, buckets, tags = (each.index_select(0, more) for each in (left, keys, buckets, tags))
            buckets.add_(_WINDOW)
        return found

    def _add(self, keys: torch.Tensor, rows: torch.Tensor) -> None:
        hashes = keys * _MULTIPLIER
        slots, order = _ascending(self._home(hashes))
        words = self._tags(hashes).bitwise_or_(rows).index_select(0, order)
        # The first of the keys with the same home slot takes it, if it is open.
        open_ = self._words.index_select(0, slots) <= self._removed_word
        open_[1:].logical_and_(slots[1:] != slots[:-1])
        self._take(slots, words, open_)
        left = _where(open_.logical_not_())
        buckets, words = slots.index_select(0, left) >> 4, words.index_select(0, left)
        while len(words):
            left = _where(self._fill(buckets, words).logical_not_())
            buckets, words = self._next(buckets.index_select(0, left)), words.index_select(0, left)

    def _fill(self, buckets: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Puts words (N,) into open slots of their buckets (N,), which stand together where they are equal.

        Returns which of them found a slot, bool (N,).
        """
        distinct, which, counts = torch.unique_consecutive(buckets, return_inverse=True, return_counts=True)
        number = torch.arange(len(buckets), device=buckets.device) - _starts(counts).index_select(0, which)  # in its bucket
        open_ = self._buckets.index_select(0, distinct) <= self._removed_word  # (distinct buckets, 16)
        # A sum of 8 booleans: as the bytes of one number, times this, they add up in its highest byte.
        room = (open_.view(torch.int64) * 0x0101010101010101 >> 56).sum(1)
        fits = number < room.index_select(0, which)
        columns = _where(open_.flatten()).bitwise_and_(_BUCKET - 1)  # of all open slots, bucket by bucket
        if len(columns):
            index = _starts(room).index_select(0, which).add_(number).clamp_(max=len(columns) - 1)
            self._take(buckets * _BUCKET + columns.index_select(0, index), words, fits)
        return fits

    def _take(self, slots: torch.Tensor, words: torch.Tensor, which: torch.Tensor) -> None:
        """Writes those of `words` (N,) for which `which` (N,) is true into their open slots (N,)."""
        index = _where(which)
        slots = slots.index_select(0, index)
        if self.removed:
            self.removed -= int((self._words.index_select(0, slots) == self._removed_word).sum())
        self._words.scatter_(0, slots, words.index_select(0, index))


def _ascending(slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots (N,), below 2**31, in ascending order, and the index (N,) of each before. Equal ones stay in their order."""
    both = (slots << 32).bitwise_or_(torch.arange(len(slots), device=slots.device))
    if slots.device.type == "cpu":
        both.numpy().sort()  # several times as fast as torch's
    else:
        both = both.sort().values
    return both >> 32, both & _LOW_HALF


def _where(mask: torch.Tensor) -> torch.Tensor:
    """Indices int64 (M,) at which `mask` (N,) is true, ascending."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))  # several times as fast as torch's
    return mask.nonzero().squeeze(1)


def _starts(counts: torch.Tensor) -> torch.Tensor:
    """Where each of several runs of these lengths (N,) begins."""
    return counts.cumsum(0).sub_(counts)
