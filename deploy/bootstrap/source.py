"""What `headrace bootstrap` reads, and how it recognises the same request again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from deploy.datasets import Columns, DataSet, FileDataSet, Limits, open_data_set
from deploy.datasets.base import Chunk
from deploy.errors import DataSetError
from model.schema import FeatureSchema
from model.settings import ModelSettings
from model.table_settings import TableSettings

__all__ = ["Source", "fingerprint", "history"]


@dataclass(frozen=True, slots=True)
class Source:
    """A data set, and the part of it that is learned.

    Attributes:
        seed: seed of the click delays that are drawn.
        window_ms: clicks later than this after their impression don't count, as in the join.
        until_ms: only impressions before this time (ms since epoch); None: all.
        limit: this many impressions; None: all. Those of one millisecond stay together, so it may be some more.
    """

    name: str
    schema: FeatureSchema
    window_ms: int
    seed: int = 0
    path: Path | None = None
    columns: Columns | None = None
    limits: Limits | None = None
    until_ms: int | None = None
    limit: int | None = None

    def open(self) -> DataSet:
        """The data set. A file is read whole and checked.

        Raises:
            DataSetError: there is no such data set, or the pipeline would reject something in it.
        """
        found = open_data_set(self.name, seed=self.seed, path=self.path, columns=self.columns, limits=self.limits)
        if isinstance(found, FileDataSet):
            found.check(self.schema)
        return found

    def total(self, data_set: DataSet) -> int | None:
        """About how many impressions will be read; None where that isn't known."""
        size = data_set.size()
        return self.limit if size is None else min(size, self.limit or size)


def fingerprint(source: Source, model: ModelSettings, table: TableSettings | None = None) -> str:
    """A hash of everything that the learned weights depend on: the data's files, by size and time, settings and options.

    Args:
        table: which values have rows; None: the default. Default values are left out, as releases before 0.2.0 have none.

    Raises:
        DataSetError: there is no such data set.
    """
    at = open_data_set(source.name, seed=source.seed, path=source.path).find()
    files = [] if at is None else sorted(at.iterdir()) if at.is_dir() else [at]
    found: dict[str, Any] = {
        "name": source.name,
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()],
        "seed": source.seed,
        "window_ms": source.window_ms,
        "until_ms": source.until_ms,
        "limit": source.limit,
        "columns": None if source.columns is None else {k: _plain(v) for k, v in asdict(source.columns).items()},
        "schema": source.schema.model_dump(mode="json"),
        "model": model.model_dump(mode="json"),
    }
    if table is not None and (limits := table.model_dump(mode="json", exclude_defaults=True)):
        found["table"] = limits
    return hashlib.sha256(msgspec.json.encode(found, order="deterministic")).hexdigest()[:32]


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, frozenset) else value


def history(source: Source, data_set: DataSet, first_row: int = 0) -> Iterator[Chunk]:
    """The chunks of the impressions to learn, from row `first_row` on, in event-time order.

    Raises:
        DataSetError: an impression is older than the one before it, or the data set can't be read.
    """
    row, last_ms = 0, -1
    for chunk in data_set.chunks():
        times_ms = chunk.timestamps_ms
        if not len(chunk):
            continue
        if times_ms[0] < last_ms or (np.diff(times_ms) < 0).any():
            raise DataSetError(
                f"{source.name}: expected event times that never fall, found an earlier one after a later one. Sort the "
                "impressions by time."
            )
        rows = len(chunk)
        if source.until_ms is not None:
            rows = int(np.searchsorted(times_ms, source.until_ms))
        if source.limit is not None and row + rows > source.limit:
            # The cut-off is a time: a part of the impressions of one millisecond could be neither learned nor skipped.
            at = source.limit - row
            end_ms = last_ms if at <= 0 else int(times_ms[at - 1])
            rows = min(rows, int(np.searchsorted(times_ms, end_ms, side="right")))
        if row + rows > first_row:
            yield _rows(chunk, max(0, first_row - row), rows)
        row, last_ms = row + rows, int(times_ms[-1])
        if rows < len(chunk):
            return


def _rows(chunk: Chunk, start: int, stop: int) -> Chunk:
    """Impressions `start` to `stop`, with what learning needs of them only."""
    part = slice(start, stop)
    return Chunk(
        ids=chunk.ids[part],
        timestamps_ms=chunk.timestamps_ms[part],
        features=chunk.features[part],
        clicked=chunk.clicked[part],
        click_timestamps_ms=chunk.click_timestamps_ms[part],
        contexts=[],
        candidates=[],
        users=[],
        items=[],
    )
