"""What a version says of the model's table: rows, memory, and counts by field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from state.version_reader import VersionReader

__all__ = ["FieldReport", "TableReport", "table_report"]

_MINUTE_MS = 60_000


@dataclass(frozen=True, slots=True)
class FieldReport:
    """One field.

    rows       rows of its values
    admitted   times that a value got a row; None where nobody counted
    refused    impressions of values that had no row and got none
    evicted    rows that were evicted
    oldest_ms  event time, to the minute, at which its least recently used row was last used; None where nobody notes it
    """

    field: str
    rows: int
    admitted: int | None
    refused: int | None
    evicted: int | None
    oldest_ms: int | None


@dataclass(frozen=True, slots=True)
class TableReport:
    """The table of one version.

    size     bytes of the trainer's memory for it; None in versions of older releases
    fields   by name of the field, in the order of the model's inputs
    unknown  rows of which nobody knows the field: they were there before fields were counted, and weren't used since
    """

    version: int
    created_at_ms: int
    rows: int
    size: int | None
    fields: tuple[FieldReport, ...]
    unknown: int

    def total(self) -> FieldReport:
        """All fields together."""

        def added(numbers: list[int | None]) -> int | None:
            known = [number for number in numbers if number is not None]
            return sum(known) if known else None

        oldest = [each.oldest_ms for each in self.fields if each.oldest_ms is not None]
        return FieldReport(
            field="all",
            rows=self.rows,
            admitted=added([each.admitted for each in self.fields]),
            refused=added([each.refused for each in self.fields]),
            evicted=added([each.evicted for each in self.fields]),
            oldest_ms=min(oldest, default=None),
        )


def table_report(reader: VersionReader, on_progress: Callable[[int], None] = lambda rows: None) -> TableReport:
    """Read what a version says of its table. Where rows have stamps, the trainer's state of all rows is read for the oldest.

    Args:
        on_progress: gets the number of rows read since the last call.

    Raises:
        SnapshotCorrupt: a file is missing or damaged, or the version has no trainer state.
    """
    from model.census import saved_counts
    from model.eviction import FIELD, SEEN

    small, manifest = reader.small(), reader.manifest
    counts = saved_counts({name.removeprefix("upkeep.census."): tensor for name, tensor in small.items()}) or ()
    oldest: dict[int, int] = {}
    if "upkeep.eviction.round" in small:
        for state in reader.row_state():
            if SEEN in state and FIELD in state:
                _add_oldest(oldest, state[FIELD], state[SEEN])
                on_progress(len(state[SEEN]))
    fields = tuple(
        FieldReport(each.field, each.rows, each.admitted, each.refused, each.evicted, oldest.get(index + 1))
        for index, each in enumerate(counts)
    )
    size = manifest.metrics.get("table_bytes")
    rows = reader.row_count
    return TableReport(
        version=manifest.version,
        created_at_ms=manifest.created_at_ms,
        rows=rows,
        size=None if size is None else int(size),
        fields=fields,
        unknown=max(rows - sum(each.rows for each in fields), 0),
    )


def _add_oldest(oldest: dict[int, int], fields: torch.Tensor, seen: torch.Tensor) -> None:
    """Add rows (N,) to the oldest use of each field, in ms."""
    import torch

    used = seen > 0
    fields, seen = fields[used].long(), seen[used].long()
    if not len(fields):
        return
    least = torch.full((int(fields.max()) + 1,), torch.iinfo(torch.int64).max)
    least.scatter_reduce_(0, fields, seen, "amin")
    for field in (least < torch.iinfo(torch.int64).max).nonzero().squeeze(1).tolist():
        found_ms = int(least[field]) * _MINUTE_MS
        oldest[field] = min(found_ms, oldest.get(field, found_ms))
