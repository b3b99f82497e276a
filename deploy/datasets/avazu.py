"""Avazu's click log in its public CSV format: a row for each impression, with `hour` as YYMMDDHH."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from deploy.datasets.base import CHUNK_ROWS, Chunk, draw_delays, make_chunk
from deploy.datasets.columns import labels
from deploy.datasets.encode import members, strings
from deploy.datasets.named import OwnFile
from deploy.datasets.refusal import refuse
from deploy.datasets.text_files import one_line, open_text
from deploy.errors import DataSetError
from model.schema import FeatureSchema, FieldSpec
from stream.records.times import MAX_AGE_MS

__all__ = ["Avazu"]

_HOUR_MS = 3_600_000
_CONTEXT = (
    *("C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
)
_ADVERT = tuple(f"C{i}" for i in range(14, 22))


class Avazu(OwnFile):
    """The data set `avazu`."""

    name = "avazu"
    title = "Avazu mobile advertising, the file in the public CSV format (train.csv or train.gz)"
    terms = "The terms of the competition that it was published for, agreed to when downloading. Changes made: times."
    clicks = (
        "Times are whole hours: the rows of an hour are spaced evenly within it, in the file's order. A click's delay is drawn "
        "within 60 s, seeded by row."
    )
    obtain = "Put train.csv (or train.csv.gz, train.gz, train) into a folder avazu in HEADRACE_DATA_DIR or data/."
    folder_name = "avazu"
    files = ("train.csv", "train.csv.gz", "train.gz", "train")

    def schema(self) -> FeatureSchema:
        """All columns as categories; `hour` is the hour of the day."""
        return FeatureSchema(fields=tuple(FieldSpec(name=name) for name in (*_CONTEXT, "hour", *_ADVERT)), embedding_dim=16)

    def chunks(self) -> Iterator[Chunk]:
        file = self._file()
        row = 0
        for hour in _hours(file):
            start_ms = _start_ms(hour["hour"][0].as_py(), file)
            for offset in range(0, len(hour), CHUNK_ROWS):
                rows = hour.slice(offset, CHUNK_ROWS)
                numbers = np.arange(offset, offset + len(rows), dtype=np.int64)  # within the hour
                yield make_chunk(
                    ids=strings(rows["id"]),
                    timestamps_ms=start_ms + numbers * _HOUR_MS // len(hour),
                    clicked=labels(file, "click", rows["click"], first_row=row + offset),
                    delays_ms=draw_delays(row + numbers, seed=self._seed),
                    context=members({name: rows[name] for name in _CONTEXT} | {"hour": _hour_of_day(rows)}),
                    candidate=members({name: rows[name] for name in _ADVERT}),
                    users=strings(rows["device_ip"]),
                    items=strings(rows["C14"]),
                )
            row += len(hour)


def _hour_of_day(rows: pa.Table) -> pa.Array:
    return pa.array(rows["hour"].to_numpy() % 100)


def _start_ms(hour: int, file: Path) -> int:
    try:
        start = datetime.strptime(f"{hour:08d}", "%y%m%d%H").replace(tzinfo=UTC)
        if not datetime.now(UTC) - timedelta(milliseconds=MAX_AGE_MS) < start < datetime.now(UTC):
            raise ValueError
        return int(start.timestamp() * 1_000)
    except ValueError as error:
        raise DataSetError(
            f"{file}: expected hours of the last 40 years as YYMMDDHH, found {hour}. Check that the file is as published."
        ) from error


def _hours(file: Path) -> Iterator[pa.Table]:
    """The rows of the file, one hour at a time."""
    gathered: list[pa.Table] = []
    row = 0
    for batch in _batches(file):
        table = pa.Table.from_batches([batch])
        for name, missing in (("id", pc.equal(table["id"], "")), ("hour", pc.is_null(table["hour"]))):
            if pc.any(missing).as_py():
                at = row + pc.index(missing, True).as_py()
                refuse(file, "a value in every row", "none", "Fill it, or leave the row out.", column=name, row=at)
        row += len(table)
        hours = table["hour"].to_numpy()
        cuts = [0, *(np.flatnonzero(np.diff(hours)) + 1).tolist(), len(table)]
        for start, stop in pairwise(cuts):
            if gathered and gathered[0]["hour"][0].as_py() != hours[start]:
                if hours[start] < gathered[0]["hour"][0].as_py():
                    raise DataSetError(
                        f"{file}: expected hours in rising order, found {hours[start]} after a later one. Sort it by hour."
                    )
                yield pa.concat_tables(gathered)
                gathered = []
            gathered.append(table.slice(start, stop - start))
    if gathered:
        yield pa.concat_tables(gathered)


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    types = {name: pa.string() for name in ("id", *_CONTEXT, *_ADVERT)} | {"click": pa.int8(), "hour": pa.int64()}
    read = pyarrow.csv.ReadOptions(block_size=1 << 23)
    parse = pyarrow.csv.ParseOptions(quote_char=False)
    convert = pyarrow.csv.ConvertOptions(column_types=types, include_columns=list(types))
    try:
        with open_text(file) as stream:
            yield from pyarrow.csv.open_csv(stream, read_options=read, parse_options=parse, convert_options=convert)
    except (pa.ArrowException, OSError) as error:
        refuse(
            file, "CSV with the columns id, click, hour, C1, …, C21", one_line(error), "Check that the file is as published."
        )
