"""JSON lines as a table, with each value exactly as written.

Arrow's own reader turns whole numbers beyond 64 bits into floats, and text that looks like a time into a time. So msgspec
decodes the lines, twice: first to find the type that holds every value of a column, then to fill the columns.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
import pyarrow as pa

from deploy.datasets.refusal import refuse, shown
from deploy.datasets.text_files import blocks, one_line

__all__ = ["read_json_lines"]

_ONE_EACH = "Write one object a line: jq -c . does it, and jq -c '.[]' for an array."
_EXACT_FLOAT = 1 << 53  # from here on not every whole number is a double
_LONGEST_WHOLE = 10**38  # what Arrow's decimal128 holds
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list", dict: "an object"}

_Row = dict[str, Any]
_decoder = msgspec.json.Decoder(_Row)


def read_json_lines(path: Path, drop: Collection[str] = ()) -> tuple[pa.Table, list[str]]:
    """The whole file without the columns of `drop`, and the names of all columns; `features` becomes a struct column.

    If an object has a key twice, the last value counts.

    Raises:
        DataSetError: a line isn't a JSON object, or no column type holds every value of a column exactly.
        OSError: the file can't be read.
    """
    flat, features = _Columns(path, drop), _Columns(path, drop)
    nested, rows = False, 0
    for objects, before in _objects(path):
        nested = nested or any(isinstance(each.get("features"), dict) for each in objects)
        if nested and "features" not in drop:
            features.look([_features(path, each, before + row) for row, each in enumerate(objects)], before)
        flat.look(objects, before)
        rows = before + len(objects)
    flat.decide()
    features.decide()
    for objects, before in _objects(path):
        known = objects[: rows - before]  # the file may have more rows by now, if somebody writes to it
        if features.types:
            features.fill([_features(path, each, before + row) for row, each in enumerate(known)])
        flat.fill(known)
        if before + len(objects) >= rows:
            break
    columns = flat.columns()
    if features.types:
        inner = features.columns()
        struct = pa.StructArray.from_arrays([column.combine_chunks() for column in inner.values()], list(inner))
        columns["features"] = pa.chunked_array([struct])
    return pa.table(columns), [*flat.names, *features.names]


def _features(path: Path, row: _Row, number: int) -> _Row:
    """The row's features, removed from the row."""
    features = row.pop("features", None)
    if not isinstance(features, dict):
        refuse(path, "an object of features", shown(features), "Fix the line.", column="features", row=number)
    return features


def _objects(path: Path) -> Iterator[tuple[list[_Row], int]]:
    """The objects of the file, block by block, each with the number of objects before the block."""
    before = 0
    for block in blocks(path):
        objects = _decode(path, block, before)
        yield objects, before
        before += len(objects)


def _decode(path: Path, block: bytes, before: int) -> list[_Row]:
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    try:
        objects = _decoder.decode_lines(block)
        if len(objects) == lines:
            return objects
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    filled = [line for line in block.split(b"\n") if line.strip()]
    return [_decode_line(path, line, before + row) for row, line in enumerate(filled)]


def _decode_line(path: Path, line: bytes, row: int) -> _Row:
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = one_line(error)
    # Python's json module writes NaN, often for a missing number. It is read as NaN, as in Parquet.
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        _not_an_object(path, line, reason, row)
    return value


def _not_an_object(path: Path, line: bytes, reason: str, row: int) -> NoReturn:
    found = f"{shown(line.decode('utf-8', 'replace'))} ({reason})"
    refuse(path, "one JSON object a line, in UTF-8", found, _ONE_EACH, row=row)


class _Columns:
    """The columns of a file by name, in the order in which the names appear. Call `look`, then `decide`, then `fill`."""

    def __init__(self, path: Path, drop: Collection[str]) -> None:
        self._path = path
        self._drop = drop
        self._shapes: dict[str, _Shape] = {}
        self._chunks: dict[str, list[pa.Array]] = {}
        self.types: dict[str, pa.DataType] = {}
        self.names: set[str] = set()  # of all columns, including those of `drop`

    def look(self, rows: Sequence[_Row], before: int) -> None:
        """Note the types of the values of these rows; `before` rows came before them."""
        for name in dict.fromkeys(chain.from_iterable(rows)):
            if name not in self.names:
                self._check_name(name)
                self.names.add(name)
            if name not in self._drop:
                shape = self._shapes.setdefault(name, _Shape())
                shape.look([row.get(name) for row in rows], range(before, before + len(rows)))

    def _check_name(self, name: str) -> None:
        try:
            name.encode()
        except UnicodeEncodeError:
            refuse(self._path, "names that UTF-8 can hold", f"half of a surrogate pair in {name!a}", "Fix its source.")

    def decide(self) -> None:
        """Choose the columns' types. Raises DataSetError: no type holds every value of a column exactly."""
        self.types = {name: shape.arrow_type(self._path, name) for name, shape in self._shapes.items()}

    def fill(self, rows: Sequence[_Row]) -> None:
        """Add the values of these rows."""
        for name, kind in self.types.items():
            values = [row.get(name) for row in rows]
            try:
                chunk = pa.array(values, kind)
            except UnicodeEncodeError:
                refuse(self._path, "text that UTF-8 can hold", "half of a surrogate pair", "Fix its source.", column=name)
            except pa.ArrowInvalid:  # in a column of floats, Arrow rejects whole numbers beyond 2^53 even if they are doubles
                chunk = pa.array([_with_floats(value) for value in values], kind)
            self._chunks.setdefault(name, []).append(chunk)

    def columns(self) -> dict[str, pa.ChunkedArray]:
        """The columns with all values added."""
        return {name: pa.chunked_array(self._chunks[name], kind) for name, kind in self.types.items()}


class _Seen(NamedTuple):
    """A value, and the row in which it was seen."""

    row: int
    value: Any


class _Shape:
    """The types that the values of a column have, and the first value of each type."""

    def __init__(self) -> None:
        self._first: dict[type, _Seen] = {}
        self._low = self._high = 0
        self._too_long: _Seen | None = None  # the first whole number of 39 digits or more
        self._inexact: _Seen | None = None  # the first whole number that isn't a double
        self._items: _Shape | None = None  # of the values in lists

    def look(self, values: Sequence[Any], rows: Sequence[int]) -> None:
        """Note the types of values; `rows` has the row of each."""
        types = set(map(type, values))
        for new in types - {type(None)} - self._first.keys():
            index = next(index for index, value in enumerate(values) if type(value) is new)
            self._first[new] = _Seen(rows[index], values[index])
        if int in types:
            self._look_at_whole_numbers(values, rows)
        if list in types:
            self._items = self._items or _Shape()
            lists = [(value, row) for value, row in zip(values, rows, strict=True) if type(value) is list]
            items = list(chain.from_iterable(value for value, _ in lists))
            self._items.look(items, [row for value, row in lists for _ in value])

    def _look_at_whole_numbers(self, values: Sequence[Any], rows: Sequence[int]) -> None:
        numbers = [value for value in values if type(value) is int]
        low, high = min(numbers), max(numbers)
        self._low, self._high = min(self._low, low), max(self._high, high)
        if max(-low, high) <= _EXACT_FLOAT:
            return
        for value, row in zip(values, rows, strict=True):
            if type(value) is int and abs(value) > _EXACT_FLOAT:
                if abs(value) >= _LONGEST_WHOLE:
                    self._too_long = self._too_long or _Seen(row, value)
                elif int(float(value)) != value:
                    self._inexact = self._inexact or _Seen(row, value)

    def arrow_type(self, path: Path, name: str) -> pa.DataType:
        """The narrowest type that holds every value exactly. Raises DataSetError: no type does."""
        types = set(self._first)
        if self._too_long is not None:
            row, value = self._too_long
            found = f"one of {len(str(abs(value)))} digits"
            refuse(path, "whole numbers of at most 38 digits", found, "Write it as a string.", column=name, row=row)
        if types == {int}:
            return self._whole_type()
        if types in ({int, float}, {float}):
            if self._inexact is not None:
                row, value = self._inexact
                expected = "numbers that a float holds, since the column has fractions"
                refuse(path, expected, str(value), "Write the column as strings.", column=name, row=row)
            return pa.float64()
        if dict in types:
            self._nested(path, name, "an object")
        if len(types) > 1:
            self._mixed(path, name)
        if types == {list}:
            assert self._items is not None
            if list in self._items._first or dict in self._items._first:
                self._nested(path, name, "a list of lists or objects")
            return pa.list_(self._items.arrow_type(path, name))
        if not types:
            return pa.null()
        return {bool: pa.bool_(), str: pa.string()}[types.pop()]

    def _whole_type(self) -> pa.DataType:
        if self._low >= -(1 << 63) and self._high < 1 << 63:
            return pa.int64()
        return pa.uint64() if self._low >= 0 and self._high < 1 << 64 else pa.decimal128(38, 0)

    def _nested(self, path: Path, name: str, found: str) -> NoReturn:
        seen = self._first.get(dict) or self._first.get(list)
        do = f"Make columns of its parts, or leave it out: --drop {name}."
        refuse(path, "a string, a number or a list of strings", found, do, column=name, row=seen.row if seen else 0)

    def _mixed(self, path: Path, name: str) -> NoReturn:
        first, *others = sorted(self._first.values(), key=lambda seen: seen.row)
        second = next(each for each in others if {type(first.value), type(each.value)} != {int, float})
        found = f"{_described(second.value)} after {_described(first.value)}"
        do = f"Write them all as strings, say, or leave the column out: --drop {name}."
        refuse(path, "values of one type", found, do, column=name, row=second.row)


def _with_floats(value: Any) -> Any:
    """The value, or the list, with floats instead of whole numbers."""
    if type(value) is list:
        return [_with_floats(item) for item in value]
    return float(value) if type(value) is int else value


def _described(value: Any) -> str:
    return f"{_NAMES[type(value)]} ({shown(value)})"
