"""All that the model keeps row by row, and how it is read as of one moment while training goes on: copy on write.

A freeze costs the same whatever the table holds, since nothing is copied at that moment. From then on two threads take part:

- The training thread says which rows it is about to change (`ModelRows.touch`). Of the rows that were there at the freeze, that
  the writer hasn't read yet and that aren't saved, it first saves the values, then a mark for each of them, which says where.
- The writer reads a range of rows: it copies the range, then its marks, and puts saved values over the rows with marks.

So each row is saved once a freeze at most, and there is no lock, at which a writer of low priority could hold up training. The
order of the steps is enough. If the writer finds a row's mark, it uses the saved values. If it doesn't, then the mark was set
after the marks were copied, so the row was changed after it was copied, and the copy is right. Each step is whole before the
next begins, for other threads too: between two calls that do the work without Python's lock, a thread takes that lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.errors import ModelError
from model.growing import Column, Growing
from model.hashing import EMPTY_KEY
from model.moments import Moments
from model.reserve import reserved
from model.rows import ROW_PARTS, Rows
from model.touched import Touched

__all__ = ["Freeze", "FrozenModel", "ModelRows", "Piece"]

_READ = -1
"""Mark of a row that the writer has read. Marks above 0 are of saved rows, 0 is of rows that are neither."""


class ModelRows(Growing):
    """Everything that is indexed by row number: weights, state of the optimizer, what rows owe, and which were touched.

        rows.touch(numbers)          # before the rows of these numbers change
        freeze = rows.freeze(count)  # rows 1 to `count`, as they are now
        rows.moments = Moments(…)      # earlier moments that stay readable (`model.moments`); None when nobody wants any

    Whoever changes a part of a row that has existed before says so first by `touch`; of new rows, `touched` is enough. Row 0 is
    for unknown keys and never changes. The part `keys` of a row whose key was evicted is `EMPTY_KEY`.
    """

    def __init__(self, columns: Mapping[str, Column], room: int, device: torch.device) -> None:
        self.touched = Touched(self)
        self._freeze: Freeze | None = None
        self.moments: Moments | None = None
        work = {"scratch": Column(dtype=torch.int32), "touched": Column(dtype=torch.uint8)}
        super().__init__({**columns, **work}, room, device)

    def touch(self, rows: torch.Tensor) -> None:
        """Call it before distinct rows (U,) change. The tensor is kept, so it must not be changed later."""
        freeze = self._freeze  # the writer's thread may close it meanwhile
        if freeze is not None:
            freeze.save(rows)
        if self.moments is not None:
            self.moments.touch(rows)
        self.touched.add(rows)

    def freeze(self, count: int) -> Freeze:
        """Rows 1 to `count` as they are now, until `Freeze.close`.

        Raises:
            ModelError: the last freeze isn't closed.
        """
        if self._freeze is not None:
            raise ModelError(
                f"freeze of {count} rows: expected that the last freeze is closed, found it open with {self._freeze.count} "
                "rows; call its close() once its pieces are written"
            )
        self._freeze = Freeze(self, count)
        return self._freeze

    def require_no_freeze(self) -> None:
        """Raises ModelError if a freeze is open."""
        if (freeze := self._freeze) is not None:
            raise ModelError(
                f"replacing all rows: expected that no freeze is open, found one of {freeze.count} rows; call its close() first"
            )

    def release(self, freeze: Freeze) -> None:
        """Ends a freeze."""
        if self._freeze is freeze:
            self._freeze = None

    def clear(self, room: int) -> None:
        """Makes all rows zeros again, with room for at least `room` of them. None is touched then, and no moment is open.

        Raises:
            ModelError: a freeze is open.
        """
        self.require_no_freeze()
        if self.moments is not None:
            self.moments.forget()
        super().clear(room)
        self.touched.forget()


class Freeze:
    """Rows 1 to `count` as they were when it was made. `save` is for the training thread, the others are for the writer's."""

    def __init__(self, rows: ModelRows, count: int) -> None:
        self._rows = rows
        self.count = count
        if rows.device.type == "cpu":
            self._marks = reserved((count + 1,), torch.int32)
        else:
            self._marks = torch.zeros(count + 1, dtype=torch.int32, device=rows.device)
        self._saved = Growing({name: column for name, column in rows.columns.items() if column.parts}, 1, torch.device("cpu"))
        self._saved_count = 0

    @property
    def saved(self) -> int:
        """Number of rows that were changed before they were read."""
        return self._saved_count

    def save(self, rows: torch.Tensor) -> None:
        """Saves those of the distinct rows (U,) that are needed and not saved yet."""
        within = rows[rows <= self.count]
        needed = within[self._marks.index_select(0, within) == 0]
        if not len(needed):
            return
        first, end = self._saved_count, self._saved_count + len(needed)
        self._saved.make_room(end)
        for name in self._saved.columns:
            self._saved[name][first:end] = self._rows[name].index_select(0, needed)
        self._marks[needed] = torch.arange(first + 1, end + 1, dtype=torch.int32, device=self._marks.device)
        self._saved_count = end

    def read(self, first: int, end: int) -> dict[str, torch.Tensor]:
        """All parts of rows `first` to `end` - 1 by name, copied to the CPU. Read each row once only."""
        parts = {name: _copied(self._rows.part(name)[first:end]) for name in self._rows.parts}
        marks = _copied(self._marks[first:end])
        self._mark_as_read(first, end)  # a mark that was set since the copy isn't needed any more
        changed = np.flatnonzero(marks)
        if len(changed):
            where = marks[changed] - 1
            for name, values in parts.items():
                values[changed] = self._saved.part(name).numpy()[where]
        return {name: torch.from_numpy(values) for name, values in parts.items()}

    def _mark_as_read(self, first: int, end: int) -> None:
        if self._marks.device.type == "cpu":
            self._marks.numpy()[first:end] = _READ
        else:
            self._marks[first:end] = _READ

    def close(self) -> None:
        """Ends it: nothing is saved any more."""
        self._rows.release(self)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a frozen model, copies on the CPU.

    serving  their serving weights
    trainer  what further training needs of the same rows, by the names that versions use
    """

    serving: Rows
    trainer: dict[str, torch.Tensor]


class FrozenModel:
    """A model as of one moment, whatever is trained meanwhile.

        with learner.freeze() as frozen:                 # in the training thread, between batches
            ...                                          # the rest in the writer's thread
            for piece in frozen.pieces(100_000):
                write(piece)

    rows   number of rows with keys
    dense  serving tensors that are no rows, by name
    small  trainer tensors that are no rows, by name
    """

    def __init__(self, freeze: Freeze, rows: int, dense: dict[str, torch.Tensor], small: dict[str, torch.Tensor]) -> None:
        self._freeze: Freeze | None = freeze
        self._begun = False
        self._saved = 0
        self._last = freeze.count
        self.rows = rows
        self.dense = dense
        self.small = small

    def pieces(self, rows_per_piece: int) -> Iterator[Piece]:
        """All rows in the order of their numbers, once, as pieces of at most `rows_per_piece` rows.

        Raises:
            ModelError: it is closed, or its rows were read before. Also while it is iterated, if it is closed meanwhile.
        """
        self._require_open()
        if self._begun:
            raise ModelError(f"frozen model of {self.rows} rows: expected that its rows are read once, found a second reader")
        self._begun = True
        return self._read(rows_per_piece)

    def _read(self, rows_per_piece: int) -> Iterator[Piece]:
        for first in range(1, self._last + 1, rows_per_piece):
            parts = self._require_open().read(first, min(first + rows_per_piece, self._last + 1))
            self._require_open()  # rows that changed after it was closed weren't saved
            if self._last > self.rows:
                parts = _with_keys(parts)
            if len(parts["keys"]):
                yield Piece(Rows.of(parts), {name: part for name, part in parts.items() if name not in ROW_PARTS})

    @property
    def saved(self) -> int:
        """Number of rows that were saved because they changed before they were read; as of its end once it is closed."""
        return self._saved if self._freeze is None else self._freeze.saved

    def _require_open(self) -> Freeze:
        if self._freeze is None:
            raise ModelError(
                f"frozen model of {self.rows} rows: expected it open, found it closed; read its pieces before close()"
            )
        return self._freeze

    def close(self) -> None:
        """Ends it, and frees the memory of saved rows. Call it also if writing fails; further calls do nothing."""
        freeze, self._freeze = self._freeze, None
        if freeze is not None:
            self._saved = freeze.saved
            freeze.close()

    def __enter__(self) -> FrozenModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _with_keys(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same rows but for those whose keys were evicted."""
    used = (parts["keys"] != EMPTY_KEY).nonzero().squeeze(1)
    if len(used) == len(parts["keys"]):
        return parts
    return {name: values.index_select(0, used) for name, values in parts.items()}


def _copied(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A contiguous copy in the CPU's memory.

    NumPy copies in the calling thread. Torch would start a team of threads for the writer, which competes with training's.
    """
    if tensor.device.type == "cpu":
        return tensor.numpy().copy(order="C")
    return tensor.to("cpu", memory_format=torch.contiguous_format).numpy()
