"""Serving rows as they were at earlier moments, read while training goes on: copy on write, in layers.

A moment lies between two batches. From then on, a row's serving values are saved when the row is touched for the first time,
and only for the newest moment. So what training pays doesn't grow with the number of moments. A moment costs 4 bytes a row of
the table and some 76 bytes a row that was touched until the next moment (dimension 16; 84 with row history), so at most as much
as all serving rows.

To read rows as of a moment, take the live rows, and put what was saved over them: what the newest moment has first, what the
asked moment has last. A row that was saved for one moment was the same at the moment before, unless it was saved for that too.

Everything here is for the training thread. A key that is evicted after a moment reads, as of that moment, like one that wasn't
there: keys are found by the live table. A row that another key gets afterwards isn't known as of earlier moments any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from model.errors import ModelError
from model.growing import Column, Growing
from model.reserve import reserved
from model.rows import Rows

__all__ = ["Moment", "Moments", "SavedRows"]

_LATER = -1
"""Mark of rows that came after the moment; marks above 0 are of saved rows, 0 is of rows that weren't touched since."""


class SavedRows:
    """What was saved for one moment. Rows 1 to `count` were there at the moment."""

    def __init__(self, count: int, columns: Mapping[str, Column], device: torch.device) -> None:
        self.count = count
        if device.type == "cpu":
            self._marks = reserved((count + 2,), torch.int32)
        else:
            self._marks = torch.zeros(count + 2, dtype=torch.int32, device=device)
        self._marks[count + 1] = _LATER
        self._values = tuple(columns)
        self._saved = Growing({**columns, "number": Column(dtype=torch.int32)}, 1, device)
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def known(self, numbers: torch.Tensor) -> torch.Tensor:
        """The row numbers (N,), 0 for a row that didn't belong to its present key at the moment."""
        later = self._marks.index_select(0, numbers.clamp(max=self.count + 1)) == _LATER
        return numbers.masked_fill(later, 0)

    def given_away(self, numbers: torch.Tensor) -> None:
        """Takes note that rows (N,) belong to other keys from now on."""
        within = numbers[numbers <= self.count]
        if len(within):
            self._marks.index_fill_(0, within, _LATER)

    def missing(self, numbers: torch.Tensor) -> torch.Tensor:
        """Those of the row numbers (N,) that were there at the moment and aren't saved yet."""
        return numbers[self._marks.index_select(0, numbers.clamp(max=self.count + 1)) == 0]

    def put(self, numbers: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Saves values of distinct rows (N,) by name, or replaces what is saved of them."""
        marks = self._marks.index_select(0, numbers)
        new = (marks == 0).nonzero().squeeze(1)
        end = self._used + len(new)
        self._saved.make_room(end)
        marks[new] = torch.arange(self._used + 1, end + 1, dtype=torch.int32, device=marks.device)
        where = marks.long().sub_(1)
        for name in self._values:
            self._saved[name].index_copy_(0, where, values[name])
        self._saved["number"].index_copy_(0, where, numbers.int())
        self._marks.index_copy_(0, numbers, marks)
        self._used = end

    def over(self, numbers: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Puts what is saved over the values of rows (N,) by name, whose numbers are at most `count`."""
        if not self._used:
            return
        marks = self._marks.index_select(0, numbers)
        at = (marks > 0).nonzero().squeeze(1)
        where = marks.index_select(0, at).long().sub_(1)
        for name in self._values:
            values[name].index_copy_(0, at, self._saved[name].index_select(0, where))

    def take_over(self, later: SavedRows) -> None:
        """Saves what the next moment has saved and this one hasn't, so that the next one isn't needed any more."""
        numbers = later._saved["number"][: len(later)].long()
        at = (self._marks.index_select(0, numbers.clamp(max=self.count + 1)) == 0).nonzero().squeeze(1)
        self.put(numbers.index_select(0, at), {name: later._saved[name].index_select(0, at) for name in self._values})


class Moments:
    """All moments of a table, oldest first.

    Args:
        live: gives the present serving values of rows (N,), as copies.
        columns: which values these are (`model.rows.serving_columns`).
    """

    def __init__(self, live: Callable[[torch.Tensor], Rows], columns: Mapping[str, Column], device: torch.device) -> None:
        self._live, self._columns, self._device = live, columns, device
        self._saved: list[SavedRows] = []

    def touch(self, numbers: torch.Tensor) -> None:
        """Call it before distinct rows (N,) change."""
        if not self._saved:
            return
        newest = self._saved[-1]
        missing = newest.missing(numbers)
        if len(missing):
            newest.put(missing, self._live(missing).parts())

    def given_away(self, numbers: torch.Tensor) -> None:
        """Call it when rows (N,) get keys: some of them may have had other keys before."""
        for saved in self._saved:
            saved.given_away(numbers)

    def add(self, count: int) -> Moment:
        """A new moment: rows 1 to `count` as they are now."""
        self._saved.append(SavedRows(count, self._columns, self._device))
        return Moment(self, self._saved[-1])

    def add_oldest(self, count: int) -> Moment:
        """A moment before all others, with the values of the next one, or the present ones; `Moment.correct` changes them.

        Raises:
            ModelError: another moment has fewer rows, so it was before this one.
        """
        if self._saved and count > self._saved[0].count:
            raise ModelError(
                f"moment of {count} rows: expected at most {self._saved[0].count}, as the oldest open one has, found more. "
                "Close that one first"
            )
        self._saved.insert(0, SavedRows(count, self._columns, self._device))
        return Moment(self, self._saved[0])

    def forget(self) -> None:
        """Ends all moments."""
        self._saved = []

    def holds(self, saved: SavedRows) -> bool:
        """Whether a moment is one of these."""
        return any(each is saved for each in self._saved)

    def read(self, saved: SavedRows, numbers: torch.Tensor) -> Rows:
        """Copies of rows (N,) as of a moment. Their numbers are at most its `count`; 0 reads zeros."""
        rows = self._live(numbers)
        values = rows.parts()
        for each in reversed(self._saved):
            each.over(numbers, values)
            if each is saved:
                return rows
        raise ModelError(f"moment of {saved.count} rows: expected one that is open, found one that was closed; make another")

    def drop(self, saved: SavedRows) -> None:
        """Ends a moment. The one before it takes over what it needs."""
        at = next((at for at, each in enumerate(self._saved) if each is saved), None)
        if at is None:
            return
        if at:
            self._saved[at - 1].take_over(saved)
        del self._saved[at]


class Moment:
    """The rows of a table at one moment. Close it when it isn't needed any more."""

    def __init__(self, moments: Moments, saved: SavedRows) -> None:
        self._moments, self._saved = moments, saved

    @property
    def count(self) -> int:
        """Number of rows at that moment: those numbered 1 to `count`."""
        return self._saved.count

    @property
    def saved(self) -> int:
        """Number of rows that were saved for it."""
        return len(self._saved)

    @property
    def is_open(self) -> bool:
        """Whether it can be read."""
        return self._moments.holds(self._saved)

    def known(self, numbers: torch.Tensor) -> torch.Tensor:
        """The row numbers (N,), 0 for a row that didn't belong to its present key then."""
        return self._saved.known(numbers)

    def read(self, numbers: torch.Tensor) -> Rows:
        """Copies of rows (N,) as they were. Numbers are at most `count`; 0 reads zeros. Raises ModelError once it is closed."""
        return self._moments.read(self._saved, numbers)

    def correct(self, first: int, rows: Rows) -> None:
        """Says how rows numbered from `first` on were. Only what differs takes memory."""
        if not len(rows):
            return
        numbers = torch.arange(first, first + len(rows), device=rows.keys.device)
        found, values = self.read(numbers).parts(), rows.parts()
        differs = torch.zeros(len(rows), dtype=torch.bool, device=rows.keys.device)
        for name in found.keys() - {"keys"}:
            differs |= _bits(found[name]).ne(_bits(values[name])).view(len(rows), -1).any(1)
        at = differs.nonzero().squeeze(1)
        self._saved.put(numbers[at], {name: each.index_select(0, at) for name, each in values.items()})

    def close(self) -> None:
        """Ends it; further calls do nothing."""
        self._moments.drop(self._saved)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)
