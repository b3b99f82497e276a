"""Reading a user's file as a table: Parquet, JSON lines, CSV or TSV, plain or compressed, with every value exactly as written.

Only types are guessed, and only where that loses nothing: text that looks like a time stays text, a whole number stays whole at
any length, `007` stays text.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pyarrow as pa

from deploy.datasets.json_lines import read_json_lines
from deploy.datasets.parquet_files import read_parquet
from deploy.datasets.refusal import listed, refuse
from deploy.datasets.separated import read_separated
from deploy.datasets.text_files import one_line

__all__ = ["FILE_KINDS", "read_table"]

FILE_KINDS = ("jsonl", "parquet", "csv", "tsv")


def read_table(
    path: Path, kind: str, drop: Collection[str] = (), *, text: Collection[str] = (), ids: Collection[str] = ()
) -> pa.Table:
    """The whole file without the columns of `drop`. If `features` is a column of objects, it becomes a struct column.

    Args:
        text: columns that stay text in formats without types (CSV, TSV); the file must have them.
        ids: further columns that stay text; the file may lack them.

    Raises:
        DataSetError: the file is missing, can't be read, has another format than `kind`, or lacks a column that is named.
    """
    if not path.exists():
        refuse(path, f"a file in the format {kind}", "nothing there", "Check --path.")
    if path.is_dir() and kind != "parquet":
        refuse(path, f"a file in the format {kind}", "a folder", "Pass one file (only Parquet may be a folder of parts).")
    if not path.is_dir() and not path.is_file():
        refuse(path, f"a file in the format {kind}", "a pipe or a device", "It is read twice: write it to a file first.")
    try:
        if kind == "parquet":
            table, names = read_parquet(path, drop)
        elif kind == "jsonl":
            table, names = read_json_lines(path, drop)
        else:
            table, names = read_separated(path, "\t" if kind == "tsv" else ",", drop, text={*text, *ids})
    except OSError as error:  # the file is gone or can't be opened, or its compression is broken
        refuse(path, f"a readable file in the format {kind}", one_line(error), "Check its permissions and its format.")
    for option, columns in (("--drop", drop), ("--text", text)):
        if unknown := sorted(set(columns) - set(names)):
            do = "Correct the name, or leave the option out."
            refuse(path, f"a column {unknown[0]!r} ({option})", listed(names), do)
    return table
