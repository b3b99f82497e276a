"""Criteo's display advertising log in its public text format: label, 13 integers, 26 hashed categories; tabs, no header."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from deploy.datasets.base import CHUNK_ROWS, Chunk, draw_delays, make_chunk
from deploy.datasets.columns import labels
from deploy.datasets.encode import members
from deploy.datasets.named import OwnFile
from deploy.datasets.refusal import refuse
from deploy.datasets.text_files import one_line, open_text
from model.schema import FeatureSchema, FieldSpec

__all__ = ["SPACING_MS", "START_MS", "Criteo"]

# The file has an order, but no times. Its 45.8 M rows are seven days, which is 13 ms a row if they are spaced evenly. The date
# of the first row is made up.
START_MS = 1_388_534_400_000  # 2014-01-01 UTC
SPACING_MS = 13

_NUMBERS = tuple(f"I{i}" for i in range(1, 14))
_CATEGORIES = tuple(f"C{i}" for i in range(1, 27))


class Criteo(OwnFile):
    """The data set `criteo`. The impression id is the row number."""

    name = "criteo"
    title = "Criteo display advertising, files in the public text format (train.txt)"
    terms = "Criteo's own terms of use, agreed to when downloading. Changes made: times added."
    clicks = (
        "No times at all: rows are spaced evenly, 13 ms apart, in the file's order, and a click's delay is drawn within 60 s, "
        "seeded by row. What the model learns of order is real, what it learns of clock time is not."
    )
    obtain = "Put train.txt or train.txt.gz into a folder criteo in HEADRACE_DATA_DIR or data/."
    folder_name = "criteo"
    files = ("train.txt", "train.txt.gz")

    def schema(self) -> FeatureSchema:
        """13 numbers in logarithmic buckets, 26 categories."""
        numbers = tuple(FieldSpec(name=name, kind="numeric") for name in _NUMBERS)
        return FeatureSchema(fields=(*numbers, *(FieldSpec(name=name) for name in _CATEGORIES)), embedding_dim=16)

    def chunks(self) -> Iterator[Chunk]:
        file = self._file()
        row = 0
        for batch in _batches(file):
            for offset in range(0, len(batch), CHUNK_ROWS):
                rows = batch.slice(offset, CHUNK_ROWS)
                numbers = np.arange(row, row + len(rows), dtype=np.int64)
                clicked = labels(file, "label", rows["label"], first_row=row)
                row += len(rows)
                yield make_chunk(
                    ids=[str(number) for number in numbers.tolist()],
                    timestamps_ms=START_MS + SPACING_MS * numbers,
                    clicked=clicked,
                    delays_ms=draw_delays(numbers, seed=self._seed),
                    context=members({name: rows[name] for name in (*_NUMBERS, *_CATEGORIES)}),
                    candidate=None,  # the columns are anonymous: nobody knows which of them belong to the item
                    users=[""] * len(rows),
                    items=[""] * len(rows),
                )


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    types = {"label": pa.int8(), **dict.fromkeys(_NUMBERS, pa.int64()), **dict.fromkeys(_CATEGORIES, pa.string())}
    try:
        with open_text(file) as stream:
            yield from pyarrow.csv.open_csv(
                stream,
                read_options=pyarrow.csv.ReadOptions(column_names=list(types), block_size=1 << 23),
                parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
                convert_options=pyarrow.csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True),
            )
    except (pa.ArrowException, OSError) as error:
        expected = "lines of 40 columns with tabs between (label, I1 to I13, C1 to C26) and no header"
        refuse(file, expected, one_line(error), "Check that train.txt is as published.")
