"""A batch of hashed features: the decoder builds it and the model reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["FeatureBatch", "Float32Array", "Int64Array", "gather_ranges"]

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


def gather_ranges(values: Int64Array, starts: Int64Array, lengths: Int64Array) -> Int64Array:
    """The ranges `values[starts[i] : starts[i] + lengths[i]]` for each i, concatenated."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return values[np.arange(total) + np.repeat(starts - (ends - lengths), lengths)]


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """Features of B examples as 64-bit keys: S single-valued fields and L list fields, each in the order of the schema.

    keys          int64 (B, S)    key of each single-valued field
    scales        float32 (B, S)  factor of the field's embedding; None when no field of the schema is scaled
    list_keys     int64 (N,)      keys of all list elements: row by row, and within a row list by list
    list_offsets  int64 (B*L+1,)  start of each list in `list_keys`; no list is empty (an empty one holds the "missing" key)
    lists         L

    A slice shares memory with the batch that it is taken from.
    """

    keys: Int64Array
    list_keys: Int64Array
    list_offsets: Int64Array
    lists: int
    scales: Float32Array | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def slice(self, start: int, stop: int) -> FeatureBatch:
        """Rows `start` to `stop`, with the meaning that a Python slice gives them."""
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
        """Rows `index` (M,), in its order; negative numbers count from the end."""
        rows = np.asarray(index, dtype=np.int64)
        if not len(rows):
            return self.slice(0, 0)
        rows = np.where(rows < 0, rows + len(self), rows)
        lists = (rows[:, None] * self.lists + np.arange(self.lists)).ravel()
        starts = self.list_offsets[lists]
        lengths = self.list_offsets[lists + 1] - starts
        return FeatureBatch(
            keys=self.keys[rows],
            list_keys=gather_ranges(self.list_keys, starts, lengths),
            list_offsets=np.concatenate(([0], np.cumsum(lengths))),
            lists=self.lists,
            scales=None if self.scales is None else self.scales[rows],
        )

    @classmethod
    def concat(cls, batches: Sequence[FeatureBatch]) -> FeatureBatch:
        """All rows of `batches`, which have the same schema. Raises ValueError for no batches."""
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
