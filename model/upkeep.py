"""What decides which keys have rows: admission, eviction, and the counts of both by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.census import Census
from model.distinct import Groups, group
from model.embedding import EmbeddingTable, Gathered
from model.eviction import Eviction
from model.frozen import ModelRows
from model.growing import Column
from model.network import Elements
from model.schema import FeatureSchema
from model.sketch import Sketch
from model.table import ABSENT_ROW
from model.table_settings import TableSettings
from model.typical import Typical

__all__ = ["Read", "Upkeep"]

_MIB = 1 << 20
_LATEST = 255  # the latest impression with which a value can get its row, by the settings
_AT_ONCE = 1 << 20  # rows whose fields are read at once after a restore


class Read(NamedTuple):
    """The rows that the N elements of a batch read.

    gathered     the U rows that the batch changes, for the K elements that have one
    own          int64 (K,): these elements; None: all have a row
    which        int64 (N,): which of the rows below each element reads
    embedding    float32 (R, D): the gathered rows, then the average rows of the fields if an element reads one
    first_order  float32 (R,), likewise
    """

    gathered: Gathered
    own: torch.Tensor | None
    which: torch.Tensor
    embedding: torch.Tensor
    first_order: torch.Tensor

    def of_own(self, values: torch.Tensor) -> torch.Tensor:
        """The values (K,) of elements that have a row, from those of all elements (N,)."""
        return values if self.own is None else values.index_select(0, self.own)


class Upkeep:
    """Admission and eviction for one table. With the default settings it only counts rows by field."""

    def __init__(self, schema: FeatureSchema, settings: TableSettings, rows: ModelRows, table: EmbeddingTable) -> None:
        self._settings, self._rows, self._table = settings, rows, table
        self.census = Census(schema, rows.device)
        self._sketch = Sketch(settings.admit_memory_mb * _MIB, rows.device) if settings.admits_late else None
        after = [settings.admitted_after(cross=spec.kind == "cross") for spec in (*schema.singles, *schema.lists)]
        self._admitted_after = torch.tensor(after, device=rows.device)
        self._eviction = Eviction(settings, rows, table.keys) if settings.evicts else None
        self._refuses = self._sketch is not None or bool(settings.max_rows)
        self._inserted = 0
        self._counted: tuple[torch.Tensor, torch.Tensor] | None = None  # keys without a row and how often, until `learned`
        self._fields_known = True

    @staticmethod
    def columns(settings: TableSettings) -> Mapping[str, Column]:
        """The columns that it needs: none unless rows are evicted."""
        return Eviction.COLUMNS if settings.evicts else {}

    def follow(self, impression_ms: npt.ArrayLike | None) -> None:
        """Moves event time on to the impressions (B,) of a batch that is about to be learned."""
        if self._eviction is not None and impression_ms is not None:
            self._eviction.follow(np.asarray(impression_ms, np.float64))

    def read(self, elements: Elements, averages: Typical, corrections: torch.Tensor | None) -> Read:
        """The rows of a batch that is about to be learned; values that are new get rows, if they are admitted.

        corrections  bool (B,): examples that are no impressions of their own, since they correct an earlier label
        """
        self._counted = None  # that of a batch that wasn't learned, whose parts are read again
        keys = group(elements.keys)
        rows = self._insert(elements, keys, averages, corrections)
        own = self._own(rows, keys, elements)
        if own is None:
            gathered = self._table.gather(keys._replace(distinct=rows))
            return Read(gathered, None, gathered.inverse, gathered.embedding, gathered.first_order)
        gathered = self._table.gather(group(rows.index_select(0, keys.inverse.index_select(0, own))))
        which = elements.fields().add_(len(gathered.distinct)).index_copy_(0, own, gathered.inverse)
        embedding = torch.cat((gathered.embedding, averages.embedding))
        first_order = torch.cat((gathered.first_order, averages.first_order))
        return Read(gathered, own, which, embedding, first_order)

    def _insert(self, elements: Elements, keys: Groups, averages: Typical, corrections: torch.Tensor | None) -> torch.Tensor:
        """Rows (U,) of the distinct keys, `ABSENT_ROW` for a key that is refused one."""

        def choose(new: torch.Tensor, absent: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
            shown, key = keys.members(absent)
            counted = which.index_select(0, key)
            if corrections is not None:
                counted = counted[~corrections[elements.owners().index_select(0, shown)]]
            after = self._admitted_after.index_select(0, elements.fields().index_select(0, shown))
            # A key that occurs as several fields is admitted by the lowest number, so that all devices agree.
            needed = after.new_full((len(new),), _LATEST).scatter_reduce_(0, which.index_select(0, key), after, "amin")
            return self._chosen(new, torch.bincount(counted, minlength=len(new)), needed)

        inserted = self._table.insert(
            keys, elements.fields, averages.embedding, averages.first_order, choose if self._refuses else None
        )
        self._inserted = len(inserted.kinds)
        if self._inserted:
            self.census.admitted(inserted.kinds)
            if self._eviction is not None:
                self._rows["field"].index_copy_(0, inserted.new_rows, inserted.kinds.add(1).to(torch.int16))
        return inserted.rows

    def _own(self, rows: torch.Tensor, keys: Groups, elements: Elements) -> torch.Tensor | None:
        """Which elements (K,) have rows, from those of the distinct keys (U,); None: all have. The others count as refused."""
        if not self._refuses:
            return None
        known = rows != ABSENT_ROW
        if known.all():
            return None
        known = known.index_select(0, keys.inverse)
        self.census.refused(elements.fields()[known.logical_not()])
        return known.nonzero().squeeze(1)

    def _chosen(self, keys: torch.Tensor, times: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
        """Which of the new keys (M,) get a row, that the batch shows so many times (M,), and that need so many (M,)."""
        chosen = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
        if self._sketch is not None:
            late = (needed > 1).nonzero().squeeze(1)
            self._counted = keys.index_select(0, late), times.index_select(0, late)
            chosen.index_copy_(0, late, self._sketch.seen(*self._counted) >= needed.index_select(0, late))
        if self._settings.max_rows:
            room = self._settings.max_rows - len(self._table)
            chosen &= chosen.cumsum(0) <= room
        return chosen

    def learned(self, elements: Elements, read: Read) -> torch.Tensor | None:
        """Keys (N,) whose rows are to be evicted after a batch; None: no rows are."""
        if self._sketch is not None and self._counted is not None:
            self._sketch.add(*self._counted)
        if self._eviction is None:
            return None
        self._eviction.used(read.gathered.distinct, read.gathered.inverse)
        if not self._fields_known:
            self._recognise(read.gathered, read.of_own(elements.fields()))
        due = self._eviction.due(self._inserted, len(elements.keys))
        return due if len(due) else None

    def evicted(self, rows: torch.Tensor) -> None:
        """Counts rows (N,) that are about to be evicted."""
        if self._eviction is not None:
            self.census.evicted(self._rows["field"].index_select(0, rows).long().sub_(1))

    def _recognise(self, gathered: Gathered, own_fields: torch.Tensor) -> None:
        """Notes the fields of rows that were there before fields were noted."""
        column = self._rows["field"]
        unknown = column.index_select(0, gathered.distinct) == 0
        fields = torch.full_like(gathered.distinct, len(self.census.names))
        fields.scatter_reduce_(0, gathered.inverse, own_fields, "amin")
        fields = fields[unknown]
        column.index_copy_(0, gathered.distinct[unknown], fields.add(1).to(torch.int16))
        self.census.recognised(fields)

    def state(self) -> dict[str, torch.Tensor]:
        """What versions hold besides the columns, by name: copies on the CPU."""
        parts = {"census": self.census.state()}
        if self._sketch is not None:
            parts["sketch"] = self._sketch.state()
        if self._eviction is not None:
            parts["eviction"] = self._eviction.state()
        return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from what `state` gave, once the rows are restored."""
        moved = self.census.restore(_under("census.", state))
        if self._sketch is not None:
            self._sketch.restore(_under("sketch.", state))
        if self._eviction is not None:
            self._eviction.restore(_under("eviction.", state), self._table.keys)
            self._restore_fields(moved)

    def _restore_fields(self, moved: list[int] | None) -> None:
        """Takes fields from their column, where `moved` has the present index of each field that it was saved with."""
        keys = self._table.keys
        column = self._rows["field"][: keys.last_row + 1]
        total = torch.zeros(len(self.census.names) + 1, dtype=torch.int64, device=column.device)
        where = None if moved is None else torch.tensor([0, *(each + 1 for each in moved)], device=column.device)
        for start in range(0, len(column), _AT_ONCE):
            part = column[start : start + _AT_ONCE]
            if where is not None:
                part.copy_(where[part.long()])
            total += torch.bincount(part.long(), minlength=len(total))
        self.census.set_rows(total[1:])
        self._fields_known = int(total[1:].sum()) == len(keys)


def _under(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
