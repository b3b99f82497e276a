"""Features in a user's file: which columns can be features, and the values that are sent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deploy.datasets.columns import EXACT_FLOAT, first, is_iso, is_whole_decimal, plain
from deploy.datasets.refusal import refuse, shown
from model.schema import FieldSpec

__all__ = ["check_kind", "feature", "field_kind"]

_ACCEPTED = (pa.types.is_integer, pa.types.is_string, pa.types.is_boolean, pa.types.is_null, pa.types.is_decimal)


def feature(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values of a feature as they will be sent: text, numbers, true and false, or lists of text.

    Whole numbers in lists become text. NaN becomes null: pandas writes a missing number as NaN.

    Raises:
        DataSetError: the contract has no features of this type, or the pipeline would reject a value.
    """
    if not name:
        refuse(path, "features with names", "an empty name", "Rename the column.")
    column = plain(column)
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _list_feature(path, name, column)
    if pa.types.is_floating(kind):
        values = column.cast(pa.float64())
        if (row := first(pc.fill_null(pc.is_inf(values), False).to_numpy(zero_copy_only=False))) is not None:
            do = f"Use null for a missing value, or leave the column out: --drop {name}."
            refuse(path, "finite numbers", shown(values[row].as_py()), do, column=name, row=row)
        return values
    if is_whole_decimal(kind):
        return _whole_numbers(path, name, column)
    # A text column is one of times if every value is a time: JSON lines and CSV have no type for times.
    if pa.types.is_temporal(kind) or (pa.types.is_string(kind) and is_iso(column)):
        kind = "a time" if pa.types.is_string(kind) else f"the type {kind}"
        do = f"A time is no feature: map it (--column click_timestamp={name}), leave it out (--drop {name}), or convert it."
        refuse(path, "strings, numbers or lists of strings", kind, do, column=name)
    if not any(fits(kind) for fits in _ACCEPTED):
        do = f"Convert it, make columns of its parts, or leave it out: --drop {name}."
        refuse(path, "strings, numbers or lists of strings", f"the type {kind}", do, column=name)
    return column


def _whole_numbers(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A decimal column without fractions, as integers if one integer type holds all values."""
    for row, value in enumerate(column.to_pylist()):
        if value is not None and not -(1 << 63) <= value < 1 << 64:
            do = f"Write longer ones as strings, or leave the column out: --drop {name}."
            refuse(path, "whole numbers of at most 64 bits", f"{value:f}", do, column=name, row=row)
    column = column.cast(pa.decimal128(38, 0))
    for kind in (pa.int64(), pa.uint64()):
        try:
            return column.cast(kind)
        except pa.ArrowInvalid:
            continue
    return column


def _list_feature(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    inner = kind.value_type
    whole = pa.types.is_integer(inner)
    text = pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner)
    text = text or pa.types.is_null(inner)
    if not (whole or text or pa.types.is_dictionary(inner)):
        do = f"Lists hold strings: make columns of its parts, or leave it out: --drop {name}."
        refuse(path, "lists of strings or whole numbers", f"the type {kind}", do, column=name)
    lists = column.cast(pa.list_(inner)) if pa.types.is_fixed_size_list(kind) else column
    if pa.types.is_dictionary(inner):
        lists = lists.cast(pa.list_(inner.value_type))
    lists = lists.cast(pa.list_(pa.string())).combine_chunks()
    parents, items = pc.list_parent_indices(lists), pc.list_flatten(lists)
    if items.null_count:
        row = parents[pc.index(pc.is_null(items), True).as_py()].as_py()
        refuse(path, "lists without null", "null", "Leave it out of the list.", column=name, row=row)
    return pa.chunked_array([lists])


def field_kind(column: pa.ChunkedArray) -> str:
    """The kind of feature for a column's type: categorical, numeric or list."""
    kind = column.type
    if pa.types.is_floating(kind) or (pa.types.is_decimal(kind) and not is_whole_decimal(kind)):
        return "numeric"
    return "list" if pa.types.is_list(kind) else "categorical"


def check_kind(path: Path, column: pa.ChunkedArray, field: FieldSpec) -> None:
    """Check that the model can read a feature (as `feature` returned it) as the kind of field that the settings say.

    Raises:
        DataSetError: the model would reject a value.
    """
    kind, row = column.type, None
    if pa.types.is_null(kind):
        return
    if field.kind == "list":
        fits = pa.types.is_list(kind)
    elif field.kind == "numeric":
        fits = not (pa.types.is_string(kind) or pa.types.is_list(kind))
    elif pa.types.is_floating(kind) or (pa.types.is_decimal(kind) and not is_whole_decimal(kind)):
        numbers = pc.fill_null(column.cast(pa.float64()), 0).to_numpy()
        numbers = np.where(np.isnan(numbers), 0, numbers)
        row = first((numbers != np.floor(numbers)) | (np.abs(numbers) >= EXACT_FLOAT))
        fits = row is None
    else:
        fits = not pa.types.is_list(kind)
    if not fits:
        found = f"the type {kind}" if row is None else f"{shown(column[row].as_py())}, which is no category"
        expected = f"a {field.kind} field, as the settings' features say"
        do = "Change [features] in the settings (`headrace data schema` prints what fits), or the file."
        refuse(path, expected, found, do, column=field.name, row=row)
