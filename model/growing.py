"""Tensors with one entry for each row of the model, which grow together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from model.reserve import reservable_rows, reserved

__all__ = ["Column", "Growing"]


@dataclass(frozen=True, slots=True)
class Column:
    """One tensor (R, *shape).

    parts     what versions hold of it: the part's name → its index in the last dimension. A column without parts is work
              memory, which no version holds
    optional  whether versions of older releases lack its parts, which are 0 then
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    parts: Mapping[str, int | slice] = field(default_factory=dict)
    optional: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape) * self.dtype.itemsize


class Growing:
    """Columns with room for at least `room` rows, all zeros at first.

        rows = Growing({"weight": Column((16,))}, room=1024, device=torch.device("cpu"))
        rows.make_room(5000)
        rows["weight"][4999] = 1

    On the CPU, address space is reserved for as many rows as this machine's memory could hold (`model.reserve`), so that they
    grow without a copy. Elsewhere, and where that isn't possible, the room doubles and the columns are copied. Therefore take a
    column anew for each use: an older tensor may be a copy that isn't current any more.
    """

    def __init__(self, columns: Mapping[str, Column], room: int, device: torch.device) -> None:
        self.columns = dict(columns)
        self.device = device
        self.clear(room)

    def __len__(self) -> int:
        """Number of rows that there is room for."""
        return self._room

    def __getitem__(self, name: str) -> torch.Tensor:
        """The column (R, *shape) of this name."""
        return self._tensors[name]

    def part(self, name: str) -> torch.Tensor:
        """A view of the part of this name, with one entry for each row."""
        column, index = self._parts[name]
        return self._tensors[column][..., index]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts."""
        return tuple(self._parts)

    def optional(self, part: str) -> bool:
        """Whether versions of older releases lack this part."""
        return self.columns[self._parts[part][0]].optional

    def used_bytes(self, last: int) -> int:
        """Bytes of rows 0 to `last` in all columns."""
        return (last + 1) * sum(column.row_bytes for column in self.columns.values())

    def clear(self, room: int) -> None:
        """Makes all rows zeros again, with room for at least `room` of them."""
        self._parts = {part: (name, index) for name, each in self.columns.items() for part, index in each.parts.items()}
        self._tensors: dict[str, torch.Tensor] = {}  # before new ones are made, so that the old memory is free
        self._room = room
        if self.device.type == "cpu":
            self._room = reservable_rows(room, row_bytes=sum(column.row_bytes for column in self.columns.values()))
        self._tensors = {name: self._zeros(column, self._room) for name, column in self.columns.items()}

    def make_room(self, rows: int) -> None:
        """Grows, if there is room for fewer than `rows` rows."""
        if rows <= self._room:
            return
        room = self._room
        while room < rows:
            room *= 2
        for name, column in self.columns.items():
            old = self._tensors[name]
            new = self._zeros(column, room)
            new[: len(old)] = old
            self._tensors[name] = new  # once it is whole: a freeze may be read in another thread
        self._room = room

    def _zeros(self, column: Column, room: int) -> torch.Tensor:
        if self.device.type == "cpu":
            return reserved((room, *column.shape), column.dtype)
        return torch.zeros((room, *column.shape), dtype=column.dtype, device=self.device)
