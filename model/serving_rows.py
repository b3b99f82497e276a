"""The rows of serving weights that a predictor reads: the average row of each field, and rows by key."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.digest import row_hashes
from model.embedding import take
from model.growing import Growing
from model.hashing import EMPTY_KEY
from model.rows import Rows, serving_columns
from model.table import ABSENT_ROW, KeyTable

__all__ = ["Averages", "ServingRows"]


class Averages(NamedTuple):
    """The average row of each of F fields: embeddings (F, D) and first-order weights (F,)."""

    embedding: torch.Tensor
    first_order: torch.Tensor


class ServingRows:
    """Average rows of F fields, and rows by key.

    keys         the number of each key's row, from 1 on
    embedding    float32: the F average rows, then the rows by number (D columns)
    first_order  float32, likewise
    history      float32, likewise (2 columns): 0 for the average rows; None in a model without row history

    One thread changes them. Others may read meanwhile, but not during `load`, `write`, `delete` and `set_averages`.
    """

    def __init__(self, fields: int, dim: int, expected: int, device: torch.device, *, history: bool = False) -> None:
        self._dim, self._fields = dim, fields
        self.device = device
        # An eighth more keys than are expected, so that those that come soon don't make the slots grow.
        self.keys = KeyTable(device, expected=expected + expected // 8)
        self._columns = Growing(serving_columns(dim, history=history), fields + expected, device)

    @property
    def embedding(self) -> torch.Tensor:
        return self._columns["embedding"]

    @property
    def first_order(self) -> torch.Tensor:
        return self._columns["first_order"]

    @property
    def history(self) -> torch.Tensor | None:
        return self._columns["history"] if "history" in self._columns.columns else None

    def lookup(self, keys: torch.Tensor, fields: torch.Tensor) -> torch.Tensor:
        """Where the weights of `keys` (N,) are; for a key without a row, where the average row of its field (N,) is."""
        rows = self.keys.lookup(keys)
        return torch.where(rows == ABSENT_ROW, fields, self._where(rows))

    def averages(self) -> Averages:
        """The average rows; they share memory with these."""
        return Averages(self.embedding[: self._fields], self.first_order[: self._fields])

    def set_averages(self, averages: Averages) -> None:
        """Replaces the average rows."""
        for mine, new in zip(self.averages(), averages, strict=True):
            mine.copy_(new)

    def checked(self, rows: Rows) -> Rows:
        """Rows on this device. Raises SnapshotMismatch if they have another shape or dtype."""
        found = rows.parts()
        count = len(take(found, "keys", (-1,), torch.int64))
        take(found, "embedding", (count, self._dim))
        take(found, "first_order", (count,))
        if self.history is not None:
            take(found, "history", (count, 2))
        return rows.map(lambda part: part.to(self.device))

    def reserve(self, count: int) -> None:
        """Prepares for `count` new rows, beside readers."""
        self.keys.reserve(count)
        self._columns.make_room(self._fields + self.keys.last_row + count)

    def load(self, rows: Rows) -> torch.Tensor:
        """Adds rows whose keys are distinct and new, without looking for them. Returns their numbers (N,)."""
        last = self.keys.last_row
        numbers = self.keys.load(rows.keys)
        if self.keys.last_row == last + len(rows):  # no freed row among them
            self.write_from(last + 1, rows)
        else:
            self._columns.make_room(self._fields + self.keys.last_row)
            self.write(numbers, rows)
        return numbers

    def write_from(self, first: int, rows: Rows) -> None:
        """Writes the weights of rows (N,) with the numbers `first` to `first` + N - 1, and makes room for them."""
        part = slice(first + self._fields - 1, first + self._fields - 1 + len(rows))
        self._columns.make_room(part.stop)
        for name, values in rows.parts().items():
            if name != "keys":
                self._columns[name][part] = values

    def write(self, numbers: torch.Tensor, rows: Rows) -> None:
        """Replaces the weights of the rows with these numbers (N,)."""
        where = self._where(numbers)
        if self.device.type == "cpu":  # a row as one element: half the time, and readers wait for it
            _as_elements(self.embedding)[where.numpy()] = _as_elements(rows.embedding)
        else:
            self.embedding.index_copy_(0, where, rows.embedding)
        self.first_order.index_copy_(0, where, rows.first_order)
        if rows.history is not None:
            self._columns["history"].index_copy_(0, where, rows.history)

    def hashes(self, numbers: torch.Tensor) -> torch.Tensor:
        """Hashes (N,) of the rows with these numbers (N,), as they are in memory (`model.digest`)."""
        return row_hashes(self._read(self.keys.keys_of(numbers), numbers))

    def check(self, first: int, last: int) -> torch.Tensor | None:
        """Hashes (N,) of the N rows with numbers `first` to `last` that have keys, as they are in memory.

        None if one of their keys isn't found where its hash leads.
        """
        keys = self.keys.keys_of(slice(first, last + 1))
        used = (keys != EMPTY_KEY).nonzero().squeeze(1)
        keys, numbers = keys.index_select(0, used), used + first
        if not torch.equal(self.keys.lookup(keys), numbers):
            return None
        return row_hashes(self._read(keys, numbers))

    def _read(self, keys: torch.Tensor, numbers: torch.Tensor) -> Rows:
        """Copies of the rows with these keys and numbers (N,)."""
        where = self._where(numbers)
        return Rows.of({"keys": keys, **{name: self._columns[name].index_select(0, where) for name in self._columns.columns}})

    def _where(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers + (self._fields - 1)


def _as_elements(rows: torch.Tensor) -> npt.NDArray[np.void]:
    """Rows (N, D) on the CPU as an array (N,) that shares their memory, if they are contiguous."""
    array = rows.contiguous().numpy()
    return array.view(np.dtype((np.void, array.shape[1] * array.itemsize))).reshape(len(array))
