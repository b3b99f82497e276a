"""CSV and TSV as a table: a header line, then rows. A column gets another type than text only where that loses nothing."""

from __future__ import annotations

import csv
import sys
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from deploy.datasets.refusal import refuse, shown
from deploy.datasets.text_files import blocks, one_line, open_text

__all__ = ["read_separated"]

# How pandas and databases write a missing value. In quotes, these are text.
_NULLS = ["", "NaN", "nan", "NULL", "null", "NA", "N/A", "\\N"]
# Without leading zeros: `007` is a code and stays text.
_WHOLE = r"^-?(0|[1-9]\d*)$"
_NUMBER = r"^-?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^-?(?i:inf|infinity)$"
_TRUTH = r"^(?i:true|false)$"
_LONG_WHOLE = r"^-?\d{16,}$"  # from 2^53, which has 16 digits, not every whole number is a double


def read_separated(
    path: Path, delimiter: str, drop: Collection[str] = (), *, text: Collection[str] = ()
) -> tuple[pa.Table, list[str]]:
    """The whole file without the columns of `drop`, and the names of all columns.

    A column has whole numbers, numbers, true and false, or text; the columns of `text` stay text. Values in CSV may be in
    quotes (RFC 4180). In TSV, a quote is a character like any other.

    Raises:
        DataSetError: the file has another format.
        OSError: the file can't be read.
    """
    quoted = delimiter == ","
    if quoted:
        _check_quotes(path)
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=quoted, quote_char='"' if quoted else False)
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
    except (pa.ArrowException, UnicodeDecodeError) as error:
        kind = "comma-separated values" if quoted else "tab-separated values"
        refuse(path, f"{kind} in UTF-8, with a header line", one_line(error), "Check the file, and --path.")
    if "" in names:
        refuse(path, "a header line with a name for each column", f"none for column {names.index('') + 1}", "Add it.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        refuse(path, "columns of different names", f"{twice[0]!r} twice", "Rename one of them.")
    kept = {name: table[name] for name in names if name not in drop}
    if not quoted:
        _check_unquoted(path, kept)
    return pa.table({name: column if name in text else _typed(path, name, column) for name, column in kept.items()}), names


def _check_quotes(path: Path) -> None:
    """Reject wrong quotes: Arrow's reader accepts text after a closing quote, and reads on to the end after an open one."""
    if not any(b'"' in block for block in blocks(path)):
        return
    csv.field_size_limit(sys.maxsize)
    lines = (line for block in blocks(path) for line in block.decode("utf-8", "replace").splitlines(keepends=True))
    reader, row = csv.reader(lines, strict=True), -1
    try:
        for row, _ in enumerate(reader):  # noqa: B007  # the last row read, for the error
            pass
    except csv.Error as error:
        do = "A quote within quotes is written twice; other escapes aren't read."
        refuse(path, "values in quotes as RFC 4180 has them", f"{one_line(error)} near line {reader.line_num}", do, row=row)


def _check_unquoted(path: Path, columns: dict[str, pa.ChunkedArray]) -> None:
    """Reject values in quotes: nobody can say whether the quotes belong to the value."""
    for name, column in columns.items():
        in_quotes = pc.fill_null(pc.match_substring_regex(column, r'(?s)^".*"$'), False)
        if pc.any(in_quotes).as_py():
            row = pc.index(in_quotes, True).as_py()
            found = shown(column[row].as_py())
            refuse(path, "TSV, which has no quotes", found, "Write it without them, or as CSV.", column=name, row=row)


def _typed(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column))])
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
    return column  # longer than 64 bits: text, which keeps all digits
