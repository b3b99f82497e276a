"""A user's file as a table: Parquet, JSON lines, CSV or TSV, plain or compressed, every value exactly as it was written.

Nothing is guessed beyond types, and a type is guessed only where it loses nothing: a text that looks like a time stays text, a
whole number stays whole at any length, `007` stays text.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deploy.datasets.json_lines import read_json_lines
from deploy.datasets.refusal import refuse
from deploy.datasets.separated import read_separated
from deploy.datasets.text_files import one_line

__all__ = ["FILE_KINDS", "read_table"]

FILE_KINDS = ("jsonl", "parquet", "csv", "tsv")


def read_table(path: Path, kind: str, drop: Collection[str] = (), *, ids: str | None = None) -> pa.Table:
    """The whole file, without the columns of `drop`; an object column `features` is a struct column.

    Args:
        ids: the column of ids, which stays text where the format has no types.

    Raises:
        DataSetError: there is no such file, it can't be read, or it isn't what `kind` says.
    """
    try:
        if not path.exists():
            refuse(path, f"a file in the format {kind}", "nothing there", "Check --path.")
        if path.is_dir() and kind != "parquet":
            refuse(path, f"a file in the format {kind}", "a folder", "Pass one file (only Parquet may be a folder of parts).")
        if kind == "parquet":
            table = _read_parquet(path, drop)
        elif kind == "jsonl":
            table = read_json_lines(path, drop)
        else:
            table = read_separated(path, "\t" if kind == "tsv" else ",", drop, ids=ids)
    except OSError as error:  # the file is gone, may not be read, or its compression is broken
        refuse(
            path, f"a readable file in the format {kind}", one_line(error), "Check the path, its permissions and the format."
        )
    return table


def _read_parquet(path: Path, drop: Collection[str]) -> pa.Table:
    try:
        table = pq.read_table(path)
        table.validate(full=True)
    except pa.ArrowException as error:
        refuse(path, "Parquet", one_line(error), "Check that the file is whole and that it is Parquet.")
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        refuse(path, "columns of different names", f"{twice[0]!r} twice", "Rename one of them.")
    table = table.drop_columns([name for name in names if name in drop])
    at = table.schema.get_field_index("features")
    if at < 0 or not pa.types.is_struct(table.schema.field(at).type):
        return table
    features = table.column(at).combine_chunks()
    kept = [field.name for field in features.type if field.name not in drop]
    if features.null_count:
        row = features.is_null().index(pa.scalar(True)).as_py()
        refuse(path, "an object of features", "null", "Fill it, or leave the row out.", column="features", row=row)
    if twice := sorted({name for name in kept if kept.count(name) > 1}):
        refuse(path, "features of different names", f"{twice[0]!r} twice", "Rename one of them.", column="features")
    # flatten, not field: it applies the offset of a sliced array.
    parts = dict(zip([field.name for field in features.type], features.flatten(), strict=True))
    nested = pa.StructArray.from_arrays([parts[name] for name in kept], kept) if kept else None
    return table.drop_columns(["features"]) if nested is None else table.set_column(at, "features", nested)
