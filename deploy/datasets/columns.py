"""Ids, times, labels and served scores in a user's file, checked and converted to what is sent. See `features` for features.

Each function checks a whole column before anything is sent. For a value that the pipeline would reject, round or lose it
raises a DataSetError with the column and the row.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deploy.datasets.base import Int64s
from deploy.datasets.refusal import refuse, shown
from stream.records.times import MAX_AGE_MS, unit_of, wrong_unit

__all__ = [
    "EXACT_FLOAT",
    "UNITS_PER_SECOND",
    "TimeRules",
    "delta_counts",
    "digits",
    "first",
    "ids",
    "is_iso",
    "is_whole_decimal",
    "labels",
    "model_versions",
    "plain",
    "scores",
    "times_ms",
]

UNITS_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_SHORT = {"seconds": "s", "milliseconds": "ms", "microseconds": "us", "nanoseconds": "ns"}
_FAR = 1 << 62  # later than every time
EXACT_FLOAT = 2.0**53  # below it, every whole number is a double
# ISO 8601 with a time of day, as in JSON and CSV. A zone is Z, an offset, or UTC, which BigQuery writes.
_ISO = r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z| ?UTC|[-+]\d\d(:?\d\d)?)?$"
_ZONE = r"(Z|UTC|[-+]\d\d(:?\d\d)?)$"
_NO_TIME_OF_DAY = "Event times decide what is learned when: map a column that has the time of day."


@dataclass(frozen=True, slots=True)
class TimeRules:
    """How to read times: the unit of times that are numbers (s, ms, us, ns), and how far ahead of now a time may be, in ms."""

    unit: str
    future_ms: int


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column without a dictionary, with one type for all string types."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    if pa.types.is_decimal(column.type) and column.type.bit_width < 128:  # narrower decimals have few functions in Arrow
        column = column.cast(pa.decimal128(38, column.type.scale))
    return column


def first(mask: npt.NDArray[np.bool_]) -> int | None:
    """The first row where the mask is True."""
    rows = np.flatnonzero(mask)
    return int(rows[0]) if len(rows) else None


def _null(column: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Where the value is missing (null or NaN), (N,)."""
    return pc.is_null(column, nan_is_null=True).to_numpy(zero_copy_only=False)


def is_whole_decimal(kind: pa.DataType) -> bool:
    """Whether a type is a decimal without fractions."""
    return bool(pa.types.is_decimal(kind) and kind.scale <= 0)


def ids(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Impression ids as strings; whole numbers keep all their digits.

    Raises:
        DataSetError: an id is missing, empty, used twice, or of a type that ids can't have.
    """
    column = plain(column)
    if (row := first(_null(column))) is not None:
        do = "Fill it, map another column (--column id=NAME), or take the rows' numbers (--column id=)."
        refuse(path, "an id in every row", "null", do, column=name, row=row)
    texts = digits(path, name, column)
    if (row := first(pc.equal(pc.binary_length(texts), 0).to_numpy(zero_copy_only=False))) is not None:
        refuse(path, "an id in every row", "an empty string", "Fill it, or map another column.", column=name, row=row)
    whole = texts.combine_chunks()
    coded = whole.dictionary_encode()
    if len(coded.dictionary) < len(whole):
        codes = coded.indices.to_numpy()
        _, firsts = np.unique(codes, return_index=True)
        again = np.setdiff1d(np.arange(len(codes)), firsts, assume_unique=True)[0]
        found = f"{shown(whole[int(again)].as_py())} again, first in row {int(firsts[codes[again]]) + 1}"
        do = "An impression id is used once: map another column (--column id=NAME), or take the rows' numbers (--column id=)."
        refuse(path, "ids that are unique", found, do, column=name, row=int(again))
    return texts


def digits(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings as they are, whole numbers with all their digits; null where the value is missing.

    Raises:
        DataSetError: the column is of another type, or a float isn't whole.
    """
    column = plain(column)
    kind = column.type
    if pa.types.is_floating(kind):
        values = column.cast(pa.float64())
        numbers = pc.fill_null(values, 0).to_numpy()
        missing = _null(values)
        if (row := first(~missing & ~((np.abs(numbers) < EXACT_FLOAT) & (numbers == np.floor(numbers))))) is not None:
            expected = "whole numbers below 2^53, where the type is a float"
            refuse(path, expected, repr(float(numbers[row])), "Write ids as integers or strings.", column=name, row=row)
        column = pa.chunked_array([pa.array(np.where(missing, 0, numbers).astype(np.int64), mask=missing)])
    elif not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_null(kind) or is_whole_decimal(kind)):
        refuse(path, "ids that are strings or whole numbers", f"the type {kind}", "Convert the column.", column=name)
    return column.cast(pa.string())


def times_ms(path: Path, name: str, column: pa.ChunkedArray, rules: TimeRules, *, required: bool) -> Int64s:
    """Milliseconds since 1970-01-01 UTC, (N,), -1 where there is no time. A time without a zone is taken as UTC.

    Args:
        required: whether every row must have a time.

    Raises:
        DataSetError: a time is missing, can't be read, or is not in the last 40 years; the message guesses the right unit.
    """
    column = plain(column)
    missing = _null(column)
    if required and (row := first(missing)) is not None:
        refuse(path, "a time in every row", "null", "Fill it, or leave the row out.", column=name, row=row)
    if pa.types.is_null(column.type):
        return np.full(len(column), -1, np.int64)
    if pa.types.is_string(column.type) and _all_match(column, r"^-?\d{1,38}$"):
        column = column.cast(pa.decimal128(38, 0))
    if pa.types.is_string(column.type):
        times = _iso_ms(path, name, column)
    elif pa.types.is_timestamp(column.type):
        times = _in_ms(pc.fill_null(column.cast(pa.int64()), 0).to_numpy(), column.type.unit)
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or is_whole_decimal(column.type):
        times = _in_ms(_numbers(column), rules.unit)
    else:
        kind = column.type
        do = _NO_TIME_OF_DAY if pa.types.is_date(kind) else "Convert it, or map another column."
        refuse(path, "a timestamp, an ISO 8601 text or a number", f"the type {kind}", do, column=name)
    result: Int64s = np.where(missing, -1, times)
    _check_range(path, name, column, result, missing, rules)
    return result


def _all_match(column: pa.ChunkedArray, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(column, pattern)).as_py())


def _iso_ms(path: Path, name: str, column: pa.ChunkedArray) -> Int64s:
    good = pc.fill_null(pc.match_substring_regex(column, _ISO), True).to_numpy(zero_copy_only=False)
    zoned = pc.fill_null(pc.match_substring_regex(column, _ZONE), False)
    try:
        if (row := first(~good)) is not None:
            raise pa.ArrowInvalid(column[row].as_py())
        null = pa.scalar(None, pa.string())
        column = pc.replace_substring_regex(column, " ?UTC$", "Z")
        with_zone = pc.if_else(zoned, column, null).cast(pa.timestamp("ns", "UTC")).cast(pa.int64())
        without = pc.if_else(zoned, null, column).cast(pa.timestamp("ns")).cast(pa.int64())
    except pa.ArrowInvalid:  # not ISO 8601, or a day that the calendar lacks: find the first such row
        row = next(row for row, text in enumerate(column.to_pylist()) if text is not None and not _is_iso(text))
        text = column[row].as_py()
        do = _NO_TIME_OF_DAY if len(text) == len("2023-11-14") else "Write it so, or as a number (--unit)."
        expected = "a time as 2024-05-01T10:00:00.123Z (the zone may be an offset, or left out for UTC)"
        refuse(path, expected, shown(text), do, column=name, row=row)
    return _in_ms(pc.fill_null(pc.coalesce(with_zone, without), 0).to_numpy(), "ns")


def _numbers(column: pa.ChunkedArray) -> npt.NDArray[np.int64] | npt.NDArray[np.float64]:
    """The numbers of a column, (N,), 0 where one is missing; floats if they don't fit in 64 bits."""
    if pa.types.is_floating(column.type):
        return np.nan_to_num(pc.fill_null(column.cast(pa.float64()), 0).to_numpy(), posinf=_FAR, neginf=-_FAR)
    try:
        return pc.fill_null(column.cast(pa.int64()), 0).to_numpy()
    except pa.ArrowInvalid:
        return np.array([float(value or 0) for value in column.to_pylist()])


def _in_ms(numbers: npt.NDArray[np.int64] | npt.NDArray[np.float64], unit: str) -> Int64s:
    """The numbers in milliseconds, (N,), limited to a range far beyond all times."""
    per_second = UNITS_PER_SECOND[unit]
    if numbers.dtype == np.int64 and per_second >= 1_000:
        return np.asarray(numbers // (per_second // 1_000))
    if numbers.dtype == np.int64:
        return np.asarray(np.clip(numbers, -_FAR // 1_000, _FAR // 1_000) * (1_000 // per_second))
    return np.asarray(np.clip(np.rint(numbers * (1_000 / per_second)), -_FAR, _FAR).astype(np.int64))


def is_iso(column: pa.ChunkedArray) -> bool:
    """Whether every value of a string column is a date with a time of day, and there is at least one value."""
    return column.null_count < len(column) and _all_match(column, _ISO)


def _is_iso(text: str) -> bool:
    column = pa.array([text])
    if not pc.match_substring_regex(column, _ISO)[0].as_py():
        return False
    zone = "UTC" if pc.match_substring_regex(column, _ZONE)[0].as_py() else None
    try:
        pc.replace_substring_regex(column, " ?UTC$", "Z").cast(pa.timestamp("ns", zone))
    except pa.ArrowInvalid:
        return False
    return True


def _check_range(
    path: Path, name: str, column: pa.ChunkedArray, times: Int64s, missing: npt.NDArray[np.bool_], rules: TimeRules
) -> None:
    """Reject times that the join would turn into dead letters."""
    now_ms, unit = time.time_ns() // 1_000_000, rules.unit
    outside = ~missing & ((times < now_ms - MAX_AGE_MS) | (times > now_ms + rules.future_ms))
    row = first(outside)
    if row is None:
        return
    try:
        value = column[row].as_py()
    except (ValueError, OverflowError):  # a time that Python can't represent
        value = f"{times[row]} ms since 1970"
    expected = "times of the last 40 years"
    if isinstance(value, int | float | Decimal) and math.isfinite(value):
        guess = _SHORT.get(unit_of(int(value), now_ms) or "", unit)
        hint = "" if guess == unit else wrong_unit(int(value), now_ms) or f", which is plausible in {guess}"
        do = "Fix the row, or leave it out." if guess == unit else f"Pass --unit {guess}."
        refuse(path, f"{expected} in {unit}", f"{value}{hint}", do, column=name, row=row)
    refuse(path, expected, str(value), "Fix the row, or leave it out.", column=name, row=row)


def labels(path: Path, name: str, column: pa.ChunkedArray, *, first_row: int = 0) -> npt.NDArray[np.bool_]:
    """Whether each impression was clicked, (N,); labels are true and false, or 1 and 0.

    Args:
        first_row: how many rows of the file come before these.

    Raises:
        DataSetError: a label is missing, or is something else.
    """
    column = plain(column)
    if (row := first(_null(column))) is not None:
        found = "null" if column[row].as_py() is None else "NaN"
        do = "Without a label nobody knows whether it was clicked: fill it, or leave the row out."
        refuse(path, "0 or 1 in every row", found, do, column=name, row=first_row + row)
    if pa.types.is_boolean(column.type):
        return np.asarray(column.to_numpy(zero_copy_only=False), np.bool_)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or is_whole_decimal(column.type)):
        expected = "labels that are true and false, or 1 and 0"
        do = "Convert the column, or map another one."
        if pa.types.is_string(column.type) and len(column):
            refuse(path, expected, f"the text {shown(column[0].as_py())}", do, column=name, row=first_row)
        refuse(path, expected, f"the type {column.type}", do, column=name)
    values = column.cast(pa.float64(), safe=False).to_numpy()
    if (row := first((values != 0) & (values != 1))) is not None:
        do = "Counts and ratings are no labels: make 0 and 1 of them first."
        refuse(path, "0 or 1 in every row", str(column[row].as_py()), do, column=name, row=first_row + row)
    return np.asarray(values == 1)


def scores(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Served scores, null where nothing was served. Raises DataSetError: a score isn't a probability."""
    column = plain(column)
    if pa.types.is_null(column.type):
        return column.cast(pa.float64())
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_decimal(column.type)):
        refuse(path, "served scores that are numbers", f"the type {column.type}", _unmapped("score"), column=name)
    values = column.cast(pa.float64(), safe=False)
    numbers = pc.fill_null(values, np.nan).to_numpy()
    if (row := first(~np.isnan(numbers) & ~((numbers >= 0) & (numbers <= 1)))) is not None:
        refuse(path, "a probability", shown(float(numbers[row])), _unmapped("score"), column=name, row=row)
    return pc.if_else(pc.is_nan(values), None, values)


def model_versions(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Versions that answered, null where none did. Raises DataSetError: a value isn't a version number."""
    return _counts(path, name, column, "model_version", "whole version numbers", "a version number, 0 or more")


def delta_counts(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers of deltas since those versions, null where unknown. Raises DataSetError: a value isn't such a number."""
    return _counts(path, name, column, "delta", "whole numbers of deltas", "a number of deltas, 0 or more")


def _counts(path: Path, name: str, column: pa.ChunkedArray, role: str, types: str, values: str) -> pa.ChunkedArray:
    """Whole numbers from 0 to 2^63 - 1, or null. `types` and `values` say what the column and a value of it should be."""
    column = plain(column)
    if pa.types.is_null(column.type):
        return column.cast(pa.int64())
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        refuse(path, types, f"the type {column.type}", _unmapped(role), column=name)
    numbers = pc.fill_null(column.cast(pa.float64(), safe=False), np.nan).to_numpy()
    known = ~np.isnan(numbers)
    if (row := first(known & ((numbers < 0) | (numbers >= 2.0**63) | (numbers != np.floor(numbers))))) is not None:
        found = shown(column[row].as_py())
        refuse(path, values, found, _unmapped(role), column=name, row=row)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pa.array(known), column.cast(pa.float64()), None)
    return column.cast(pa.int64())


def _unmapped(role: str) -> str:
    return f"Fix it, or leave it out: --column {role}=."
