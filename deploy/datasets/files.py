"""Any log in a file: Parquet or JSON lines, with a mapping of columns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from deploy.datasets.base import CHUNK_ROWS, Chunk, Int64s, Progress, draw_delays, make_chunk
from deploy.datasets.encode import members, strings
from deploy.errors import DataSetError
from model.schema import FeatureSchema, FieldSpec
from stream.time_units import MAX_AGE_MS, unit_of, wrong_unit

__all__ = ["Columns", "FileDataSet"]

_UNITS_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_SHORT = {"seconds": "s", "milliseconds": "ms", "microseconds": "us", "nanoseconds": "ns"}
# Time zones and clocks aside, a log is of the past.
MAX_FUTURE_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column is what. None: the file has none.

    A feature is a column that isn't mapped to something else, or a member of a column `features` of objects.
    """

    timestamp: str = "timestamp"  # event time: a timestamp type, or a number in `unit`
    id: str | None = None  # `impression_id` where there is such a column, else the row number
    clicked: str | None = "clicked"  # true or 1
    click_timestamp: str | None = None  # null: no click, where `clicked` is None too
    user: str | None = None
    item: str | None = None
    candidate: tuple[str, ...] = ()  # features that belong to the thing shown; `item` is one of them
    unit: str = "ms"  # of times that are numbers: s, ms, us or ns


class FileDataSet:
    """One file, read whole and sorted by event time (stable)."""

    terms = "Yours."
    clicks = "As the file says (click_timestamp); where it only says whether, a drawn delay within 60 s, seeded by row."

    def __init__(self, path: Path, kind: str, columns: Columns | None = None, *, seed: int = 0) -> None:
        self.name = kind
        self.title = f"{path} ({kind})"
        self.obtain = "Pass the file with --path and its columns with --column."
        self._path = path
        self._columns = columns or Columns()
        self._seed = seed
        self._table: pa.Table | None = None

    def schema(self) -> FeatureSchema:
        """Guessed from the types: strings and integers are categories, floats numeric, lists lists."""
        table = self._read()
        kinds = {name: _kind(table.schema.field(name).type) for name in self._features(table)}
        return FeatureSchema(fields=tuple(FieldSpec.model_validate({"name": n, "kind": k}) for n, k in kinds.items()))

    def find(self) -> Path | None:
        return self._path if self._path.is_file() else None

    def fetch(self, progress: Progress, archive: Path | None = None) -> Path:
        raise DataSetError(f"{self.name}: expected a file that you have, found a fetch. {self.obtain}")

    def size(self) -> int:
        return len(self._read())

    def chunks(self) -> Iterator[Chunk]:
        table = self._read()
        columns = self._columns
        times_ms = self._times_ms(table, columns.timestamp)
        order = np.argsort(times_ms, kind="stable")
        table, times_ms = table.take(pa.array(order)), times_ms[order]
        clicked, delays_ms = self._clicks(table, times_ms, order)
        names = self._features(table)
        own = {name for name in (columns.item, *columns.candidate) if name is not None}
        if missing := own - set(names):
            raise self._no_column(table, sorted(missing)[0], "item or candidate")
        for start in range(0, len(table), CHUNK_ROWS):
            rows = table.slice(start, CHUNK_ROWS)
            part = slice(start, start + len(rows))
            context = {name: rows[name] for name in names if name not in own}
            candidate = {name: rows[name] for name in names if name in own}
            if not context and candidate:
                context, candidate = candidate, {}
            yield make_chunk(
                ids=strings(rows[columns.id]) if columns.id else [str(number) for number in order[part].tolist()],
                timestamps_ms=times_ms[part],
                clicked=clicked[part],
                delays_ms=delays_ms[part],
                context=members(context),
                candidate=members(candidate) if candidate else None,
                users=strings(rows[columns.user]) if columns.user else [""] * len(rows),
                items=strings(rows[columns.item]) if columns.item else [""] * len(rows),
            )

    def _read(self) -> pa.Table:
        if self._table is None:
            try:
                table = pq.read_table(self._path) if self.name == "parquet" else pyarrow.json.read_json(self._path)
            except (pa.ArrowException, OSError) as error:
                raise DataSetError(
                    f"{self._path}: expected {self.name}, found: {error}. Check the path and the format."
                ) from error
            if "features" in table.column_names and pa.types.is_struct(table.schema.field("features").type):
                nested = table["features"].combine_chunks()
                table = table.drop_columns(["features"])
                for index, field in enumerate(nested.type):
                    table = table.append_column(field.name, nested.field(index))
            if self._columns.id is None and "impression_id" in table.column_names:
                self._columns = replace(self._columns, id="impression_id")
            for name in (self._columns.timestamp, self._columns.id, self._columns.clicked, self._columns.click_timestamp):
                if name is not None and name not in table.column_names:
                    raise self._no_column(table, name, "one of the mapped columns")
            self._table = table
        return self._table

    def _features(self, table: pa.Table) -> list[str]:
        columns = self._columns
        taken = {columns.timestamp, columns.id, columns.clicked, columns.click_timestamp}
        names = [name for name in table.column_names if name not in taken]
        if not names:
            raise DataSetError(
                f"{self._path}: expected features beside {', '.join(sorted(n for n in taken if n))}, found none."
            )
        return names

    def _times_ms(self, table: pa.Table, name: str) -> Int64s:
        """Milliseconds since the epoch; -1 for null."""
        column = table[name]
        if pa.types.is_timestamp(column.type):
            numbers = column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
        elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            if self._columns.unit not in _UNITS_PER_SECOND:
                raise DataSetError(
                    f"unit: expected one of {', '.join(_UNITS_PER_SECOND)}, found {self._columns.unit!r}. Mend --unit."
                )
            per_second = _UNITS_PER_SECOND[self._columns.unit]
            if pa.types.is_floating(column.type):
                numbers = pc.round(pc.multiply(column.cast(pa.float64()), 1_000 / per_second))
            elif per_second >= 1_000:
                numbers = pc.divide(column.cast(pa.int64()), per_second // 1_000)
            else:
                numbers = pc.multiply(column.cast(pa.int64()), 1_000 // per_second)
        else:
            raise DataSetError(
                f"{self._path}, column {name}: expected a timestamp or a number, found {column.type}. Convert it, or map "
                "another column."
            )
        return pc.fill_null(numbers.cast(pa.int64()), -1).to_numpy()

    def _clicks(self, table: pa.Table, times_ms: Int64s, rows: Int64s) -> tuple[np.ndarray, Int64s]:
        columns = self._columns
        if times_ms.size and times_ms[0] < 0:  # sorted: a null comes first
            raise DataSetError(
                f"{self._path}, column {columns.timestamp}: expected a time in every row, found null or one before 1970."
            )
        self._check_unit(table, times_ms)
        delays_ms = draw_delays(rows.astype(np.int64), seed=self._seed)
        clicks_ms = self._times_ms(table, columns.click_timestamp) if columns.click_timestamp else None
        if columns.clicked is not None:
            clicked = pc.fill_null(table[columns.clicked].cast(pa.float64()), 0).to_numpy() == 1
        elif clicks_ms is not None:
            clicked = clicks_ms >= 0
        else:
            clicked = np.zeros(len(table), dtype=bool)
        if clicks_ms is not None:
            delays_ms = np.where(clicks_ms >= 0, clicks_ms - times_ms, delays_ms)
            if (clicked & (delays_ms < 0)).any():
                raise DataSetError(
                    f"{self._path}, column {columns.click_timestamp}: expected clicks at or after their impressions, found one "
                    "before. Mend the file, or check --unit."
                )
        return clicked, delays_ms

    def _check_unit(self, table: pa.Table, times_ms: Int64s) -> None:
        """Refuse times of which the join would make dead letters. `times_ms` never fall.

        Raises:
            DataSetError: a time is more than 40 years old or in the future; the message guesses the unit.
        """
        name, now_ms = self._columns.timestamp, time.time_ns() // 1_000_000
        for time_ms in times_ms[:1].tolist() + times_ms[-1:].tolist():
            if -MAX_AGE_MS <= time_ms - now_ms <= MAX_FUTURE_MS:
                continue
            where = f"{self._path}, column {name}: expected event times of the last 40 years"
            if pa.types.is_timestamp(table.schema.field(name).type):
                raise DataSetError(f"{where}, found {time_ms} ms since 1970. Fix the file.")
            unit = self._columns.unit
            value = time_ms * _UNITS_PER_SECOND[unit] // 1_000
            guess = _SHORT.get(unit_of(value, now_ms) or "", unit)
            found = f"found {value}{'' if guess == unit else wrong_unit(value, now_ms) or f', which is plausible in {guess}'}"
            raise DataSetError(f"{where} in {unit}, {found}. {'Fix the file' if guess == unit else f'Pass --unit {guess}'}.")

    def _no_column(self, table: pa.Table, name: str, what: str) -> DataSetError:
        return DataSetError(
            f"{self._path}: expected a column {name!r} ({what}), found {', '.join(table.column_names)}. Name the right one "
            "with --column."
        )


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "numeric"
    return "list" if pa.types.is_list(kind) or pa.types.is_large_list(kind) else "categorical"
