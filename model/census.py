"""Counts of rows by field: how many there are, were admitted, refused and evicted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from model.schema import FeatureSchema

__all__ = ["Census", "FieldCounts", "TableStats", "saved_counts"]

_KINDS = ("rows", "admitted", "refused", "evicted")


@dataclass(frozen=True, slots=True)
class FieldCounts:
    """One field of the table.

    rows      rows of its values now
    admitted  times that a value got a row
    refused   impressions of values that had no row and got none
    evicted   rows that were evicted
    """

    field: str
    rows: int
    admitted: int
    refused: int
    evicted: int


@dataclass(frozen=True, slots=True)
class TableStats:
    """The table of a learner.

    rows    rows now
    size    bytes of memory: keys, their slots, and all that is kept for each row
    fields  counts since the model began
    """

    rows: int
    size: int
    fields: tuple[FieldCounts, ...]

    @property
    def unknown(self) -> int:
        """Rows of which nobody knows the field: they were there before fields were counted, and weren't used since."""
        return max(self.rows - sum(each.rows for each in self.fields), 0)


class Census:
    """Counts by field index. Fields that share a hash space share rows, which are counted for the first that showed a value.

    Rows of which nobody knows the field, since an older release trained them, are counted for none.
    """

    def __init__(self, schema: FeatureSchema, device: torch.device) -> None:
        self.names = [field.name for field in (*schema.singles, *schema.lists)]
        """Names of the fields, in the order of their indices in batches."""
        self._counts = torch.zeros((len(_KINDS), len(self.names)), dtype=torch.int64, device=device)

    def admitted(self, fields: torch.Tensor) -> None:
        """Counts new rows by the indices of their fields (N,)."""
        counts = self._by_field(fields)
        self._counts[0] += counts
        self._counts[1] += counts

    def refused(self, fields: torch.Tensor) -> None:
        """Counts refused elements of a batch by the indices of their fields (N,)."""
        self._counts[2] += self._by_field(fields)

    def evicted(self, fields: torch.Tensor) -> None:
        """Counts evicted rows by the indices of their fields (N,); -1 where it isn't known."""
        counts = self._by_field(fields[fields >= 0])
        self._counts[0] -= counts
        self._counts[3] += counts

    def recognised(self, fields: torch.Tensor) -> None:
        """Counts rows that were there before, whose fields (N,) are known now."""
        self._counts[0] += self._by_field(fields)

    def set_rows(self, counts: torch.Tensor) -> None:
        """Replaces the numbers of rows (F,)."""
        self._counts[0] = counts

    def fields(self) -> tuple[FieldCounts, ...]:
        """The counts of each field. For any thread."""
        return _as_fields(self.names, self._counts.cpu())

    def state(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU, with the names of the fields."""
        names = torch.frombuffer(bytearray(json.dumps(self.names).encode()), dtype=torch.uint8)
        return {"counts": self._counts.to("cpu", copy=True), "fields": names}

    def restore(self, state: Mapping[str, torch.Tensor]) -> list[int] | None:
        """Goes on from what `state` gave; with none, or none that can be read, the counts begin at 0.

        Returns the present index of each field that the state has, -1 for a field that is no more; None if all have the
        same index as they had.
        """
        self._counts.zero_()
        saved = saved_counts(state)
        if saved is None:
            return None
        index = {name: at for at, name in enumerate(self.names)}
        where = [index.get(each.field, -1) for each in saved]
        for at, each in zip(where, saved, strict=True):
            if at >= 0:
                self._counts[:, at] = torch.tensor([each.rows, each.admitted, each.refused, each.evicted])
        return None if where == list(range(len(where))) else where

    def _by_field(self, fields: torch.Tensor) -> torch.Tensor:
        return torch.bincount(fields, minlength=len(self.names))


def saved_counts(state: Mapping[str, torch.Tensor]) -> tuple[FieldCounts, ...] | None:
    """The counts that `Census.state` saved; None if there are none, or in a layout that this release doesn't know."""
    counts, names = state.get("counts"), state.get("fields")
    if counts is None or names is None:
        return None
    try:
        found = json.loads(names.numpy().tobytes())
    except ValueError:
        return None
    if not isinstance(found, list) or counts.shape != (len(_KINDS), len(found)) or counts.dtype != torch.int64:
        return None
    return _as_fields([str(name) for name in found], counts)


def _as_fields(names: Sequence[str], counts: torch.Tensor) -> tuple[FieldCounts, ...]:
    return tuple(FieldCounts(name, *each) for name, each in zip(names, counts.t().tolist(), strict=True))
