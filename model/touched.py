"""Which rows were touched since the last delta."""

from __future__ import annotations

import torch

from model.distinct import distinct_rows
from model.growing import Growing

__all__ = ["Touched"]

# Rows that are collected before they are looked up all at once. A lookup costs 0.2 ms and some ns a row, so one for each batch
# would slow training down at small batches. This many take 0.5 MB.
_COLLECTED = 65_536
# Pieces of the list at which they are made one, so that a list of which nobody takes isn't made of millions of small tensors.
_PIECES = 64


class Touched:
    """The set of rows that were touched.

        touched = Touched(rows)   # its flags are in columns of `rows`: "touched", uint8, and "scratch", int32
        touched.add(torch.tensor([5, 7, 5]))
        touched.take()            # 5 and 7, in any order; the set is empty then

    A row has one flag and is listed once, so memory is bounded by the table however long nobody takes.
    """

    def __init__(self, rows: Growing) -> None:
        self._rows = rows
        self._collected: list[torch.Tensor] = []  # may repeat rows, which may be listed already
        self._collected_count = 0
        self._listed: list[torch.Tensor] = []  # distinct
        self._listed_count = 0

    def __len__(self) -> int:
        self._look_up()
        return self._listed_count

    def add(self, rows: torch.Tensor) -> None:
        """Adds rows (N,) int64, which may repeat. The tensor is kept, so it must not be changed later."""
        self._collected.append(rows)
        self._collected_count += len(rows)
        if self._collected_count >= _COLLECTED:
            self._look_up()

    def take(self) -> torch.Tensor:
        """The touched rows (N,) int64, each once, in no particular order. None is touched any more then."""
        self._look_up()
        taken = self._listed
        rows = torch.cat(taken) if taken else torch.empty(0, dtype=torch.int64, device=self._rows.device)
        self._rows["touched"].index_fill_(0, rows, 0)
        self.forget()
        return rows

    def forget(self) -> None:
        """Empties the set without reading it. The flags must be 0 already."""
        self._collected, self._collected_count = [], 0
        self._listed, self._listed_count = [], 0

    def _look_up(self) -> None:
        """Lists the collected rows that aren't listed yet."""
        if not self._collected:
            return
        rows = torch.cat(self._collected)
        self._collected, self._collected_count = [], 0
        flags = self._rows["touched"]
        new = distinct_rows(rows[flags.index_select(0, rows) == 0], self._rows["scratch"])
        flags.index_fill_(0, new, 1)
        if len(new):
            self._listed.append(new)
            self._listed_count += len(new)
        if len(self._listed) > _PIECES:
            self._listed = [torch.cat(self._listed)]
