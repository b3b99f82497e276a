"""CSV and TSV as a table: a header line, then rows; types are found from the values where that loses nothing."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from deploy.datasets.refusal import refuse
from deploy.datasets.text_files import one_line, open_text

__all__ = ["read_separated"]

# What stands for a missing value, unless it is in quotes: nothing at all, and what pandas and databases write.
_NULLS = ["", "NaN", "nan", "NULL", "null", "NA", "N/A", "\\N"]
# Without leading zeros: `007` is a code and stays text.
_WHOLE = r"^-?(0|[1-9]\d*)$"
_NUMBER = r"^-?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^-?(?i:inf|infinity)$"
_TRUTH = r"^(?i:true|false)$"
_LONG_WHOLE = r"^-?\d{16,}$"  # from 2^53, which has 16 digits, not every whole number is a double


def read_separated(path: Path, delimiter: str, drop: Collection[str] = (), *, ids: str | None = None) -> pa.Table:
    """The whole file, without the columns of `drop`: whole numbers, numbers, true and false, or text; `ids` stay text.

    Raises:
        DataSetError: it isn't such a file.
        OSError: it can't be read.
    """
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        with open_text(path) as stream:
            names = pyarrow.csv.open_csv(stream, parse_options=parse).schema.names
        convert = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=_NULLS,
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )
        with open_text(path) as stream:
            table = pyarrow.csv.read_csv(stream, parse_options=parse, convert_options=convert)
    except pa.ArrowException as error:
        kind = "tab-separated values" if delimiter == "\t" else "comma-separated values"
        refuse(path, f"{kind} in UTF-8, with a header line", one_line(error), "Check the file, and --path.")
    if "" in names:
        refuse(path, "a header line with a name for each column", f"none for column {names.index('') + 1}", "Add it.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        refuse(path, "columns of different names", f"{twice[0]!r} twice", "Rename one of them.")
    kept = {name: table[name] if name == ids else _typed(path, name, table[name]) for name in names if name not in drop}
    return pa.table(kept)


def _typed(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if column.null_count == len(column):
        return column.cast(pa.null()) if len(column) == 0 else pa.chunked_array([pa.nulls(len(column))])
    if _all(column, _WHOLE):
        return _whole(column)
    if _all(column, _NUMBER):
        long = pc.match_substring_regex(column, _LONG_WHOLE)
        if pc.any(long).as_py():
            row = pc.index(long, True).as_py()
            expected = "numbers that a float holds, since the column has fractions"
            do = f"Round it, or leave the column out: --drop {name}."
            refuse(path, expected, column[row].as_py(), do, column=name, row=row)
        return column.cast(pa.float64())
    if _all(column, _TRUTH):
        return pc.equal(pc.utf8_lower(column), "true")
    return column


def _all(column: pa.ChunkedArray, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(column, pattern)).as_py())


def _whole(column: pa.ChunkedArray) -> pa.ChunkedArray:
    for kind in (pa.int64(), pa.uint64()):
        try:
            return column.cast(kind)
        except pa.ArrowInvalid:
            continue
    return column  # longer than 64 bits: text, digit by digit
