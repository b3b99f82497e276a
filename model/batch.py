"""A batch of hashed features: what the decoder makes and the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["FeatureBatch", "Float32Array", "Int64Array", "gather_ranges"]

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


def gather_ranges(values: Int64Array, starts: Int64Array, lengths: Int64Array) -> Int64Array:
    """The ranges `values[starts[i] : starts[i] + lengths[i]]`, one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return values[np.arange(total) + np.repeat(starts - (ends - lengths), lengths)]


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """Features of B examples as 64-bit keys: S single-valued fields and L lists, each in the order of the schema.

    keys          int64 (B, S)    key of each single-valued field
    scales        float32 (B, S)  what the field's embedding is multiplied by; None when the schema scales nothing
    list_keys     int64 (N,)      keys of the lists' elements, row by row, in a row list by list
    list_offsets  int64 (B*L+1,)  where in `list_keys` each list starts; no list is empty (an empty one is "missing")
    lists         L

    Slicing shares memory with the batch it is taken from.
    """

    keys: Int64Array
    list_keys: Int64Array
    list_offsets: Int64Array
    lists: int
    scales: Float32Array | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def slice(self, start: int, stop: int) -> FeatureBatch:
        """Rows `start` to `stop`, as of a Python slice."""
        start, stop, _ = slice(start, stop).indices(len(self))
        stop = max(start, stop)
        offsets = self.list_offsets[start * self.lists : stop * self.lists + 1]
        return FeatureBatch(
            keys=self.keys[start:stop],
            list_keys=self.list_keys[offsets[0] : offsets[-1]],
            list_offsets=offsets - offsets[0],
            lists=self.lists,
            scales=None if self.scales is None else self.scales[start:stop],
        )

    def take(self, index: npt.NDArray[np.integer] | Sequence[int]) -> FeatureBatch:
        """The rows named by `index` (M,), in its order."""
        rows = np.asarray(index, dtype=np.int64)
        if not len(rows):
            return self.slice(0, 0)
        rows = np.where(rows < 0, rows + len(self), rows)
        each = (rows[:, None] * self.lists + np.arange(self.lists)).ravel()
        starts = self.list_offsets[each]
        lengths = self.list_offsets[each + 1] - starts
        return FeatureBatch(
            keys=self.keys[rows],
            list_keys=gather_ranges(self.list_keys, starts, lengths),
            list_offsets=np.concatenate(([0], np.cumsum(lengths))),
            lists=self.lists,
            scales=None if self.scales is None else self.scales[rows],
        )

    @classmethod
    def concat(cls, batches: Sequence[FeatureBatch]) -> FeatureBatch:
        """The batches one after the other; at least one, all of one schema."""
        if not batches:
            raise ValueError("FeatureBatch.concat: expected at least one batch, got none")
        if len(batches) == 1:
            return batches[0]
        first = batches[0]
        lengths = np.concatenate([np.diff(batch.list_offsets) for batch in batches])
        scales = [batch.scales for batch in batches if batch.scales is not None]
        return cls(
            keys=np.concatenate([batch.keys for batch in batches]),
            list_keys=np.concatenate([batch.list_keys for batch in batches]),
            list_offsets=np.concatenate(([0], np.cumsum(lengths))),
            lists=first.lists,
            scales=np.concatenate(scales) if first.scales is not None else None,
        )
