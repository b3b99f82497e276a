"""Criteo display advertising, the public text format: label, 13 integers, 26 hashed categories, tabs between, no header."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from deploy.datasets.base import CHUNK_ROWS, Chunk, Progress, draw_delays, look_for, make_chunk, not_there
from deploy.datasets.columns import labels
from deploy.datasets.encode import members
from deploy.datasets.refusal import refuse
from deploy.datasets.text_files import one_line, open_text
from deploy.errors import DataSetError
from model.schema import FeatureSchema, FieldSpec

__all__ = ["FOLDER", "SPACING_MS", "START_MS", "Criteo"]

FOLDER = "criteo"
FILES = ("train.txt", "train.txt.gz")

# The file has an order and no times. Its 45.8 M rows were seven days, so that is what even spacing makes of them; the date
# is of our choosing.
START_MS = 1_388_534_400_000  # 2014-01-01 UTC
SPACING_MS = 13

_NUMBERS = tuple(f"I{i}" for i in range(1, 14))
_CATEGORIES = tuple(f"C{i}" for i in range(1, 27))


class Criteo:
    """A file that the user has; the impression id is the row number."""

    name = "criteo"
    title = "Criteo display advertising, files in the public text format (train.txt)"
    terms = "Criteo's own terms of use, agreed to when downloading. Changes made: times added."
    clicks = (
        "No times at all: rows are spaced evenly, 13 ms apart, in the file's order, and a click's delay is drawn within 60 s, "
        "seeded by row. What the model learns of order is real, what it learns of clock time is not."
    )
    obtain = f"Put {FILES[0]} or {FILES[1]} into a folder {FOLDER} in HEADRACE_DATA_DIR or data/."

    def __init__(self, *, seed: int = 0, folder: Path | None = None) -> None:
        self._seed = seed
        self._folder = folder

    def schema(self) -> FeatureSchema:
        """13 numbers in log buckets, 26 categories."""
        numbers = tuple(FieldSpec(name=name, kind="numeric") for name in _NUMBERS)
        return FeatureSchema(fields=(*numbers, *(FieldSpec(name=name) for name in _CATEGORIES)), embedding_dim=16)

    def find(self) -> Path | None:
        if self._folder is not None:
            return self._folder
        return next((found for file in FILES if (found := look_for(FOLDER, (file,)))), None)

    def fetch(self, progress: Progress, archive: Path | None = None) -> Path:
        raise DataSetError(
            f"criteo: expected files that you have, found a fetch: its terms don't let others pass it on. {self.obtain}"
        )

    def size(self) -> None:
        return None  # 11 GB to count

    def chunks(self) -> Iterator[Chunk]:
        folder = self.find()
        file = next((folder / name for name in FILES if (folder / name).is_file()), None) if folder else None
        if file is None:
            raise not_there(self, folder, FILES)
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
                    candidate=None,  # the columns are anonymous: nobody knows which belong to the advert
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
        refuse(file, expected, one_line(error), "Check that it is train.txt as published.")
