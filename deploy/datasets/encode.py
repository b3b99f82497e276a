"""Encoding columns as JSON, without a Python call for each row.

A column becomes an array of JSON tokens. Named columns become the *members* of an object (`"a":1,"b":"x"`, without braces), so
that an event, a request's context and a candidate can share them.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deploy.errors import DataSetError

__all__ = ["concat", "members", "objects", "strings", "tokens"]


def tokens(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """JSON tokens (a string array without nulls) of a column of integers, floats, booleans, strings or lists of strings.

    null, NaN and the infinities become `null`. Floats that are whole lose their `.0`. Booleans become 0 and 1, since features
    can't be booleans.

    Raises:
        DataSetError: the column has another type.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    kind = array.type
    if pa.types.is_boolean(kind):
        encoded = array.cast(pa.int8()).cast(pa.string())
    elif pa.types.is_integer(kind):
        encoded = array.cast(pa.string())
    elif pa.types.is_floating(kind):
        encoded = _float_tokens(array.cast(pa.float64()))
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        encoded = _distinct_tokens(array.cast(pa.string()))
    elif pa.types.is_null(kind):
        encoded = pa.nulls(len(array), pa.string())
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        encoded = pa.array([_encoded(value) for value in array.to_pylist()], pa.string())
    elif pa.types.is_decimal(kind):
        encoded = array.cast(pa.string())  # with all its digits
    else:
        raise DataSetError(
            f"column of type {kind}: expected integers, floats, strings or lists of strings. Convert it, or leave it out."
        )
    return pc.fill_null(encoded, "null")


def members(columns: Mapping[str, pa.Array | pa.ChunkedArray]) -> pa.Array:
    """The members `"name":token,…` for each row of named columns."""
    parts: list[pa.Array | pa.Scalar] = []
    for index, (name, column) in enumerate(columns.items()):
        opening = f"{',' if index else ''}{_encoded(name)}:"
        parts += [pa.scalar(opening), tokens(column)]
    return pc.binary_join_element_wise(*parts, "")


def concat(*parts: pa.Array) -> pa.Array:
    """The members of several arrays, row by row."""
    return pc.binary_join_element_wise(*parts, ",")


def objects(*parts: pa.Array) -> list[bytes]:
    """Whole JSON objects, made of arrays of members."""
    inside = concat(*parts) if len(parts) > 1 else parts[0]
    joined = pc.binary_join_element_wise(pa.scalar("{"), inside, pa.scalar("}"), "")
    return joined.cast(pa.binary()).to_pylist()


def strings(column: pa.Array | pa.ChunkedArray) -> list[str]:
    """Ids as strings; null becomes the empty string."""
    return pc.fill_null(column.cast(pa.string()), "").to_pylist()


def _encoded(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _distinct_tokens(array: pa.Array) -> pa.Array:
    coded = array.dictionary_encode()
    values = pa.array([_encoded(value) for value in coded.dictionary.to_pylist()], pa.string())
    return values.take(coded.indices)


def _float_tokens(array: pa.Array) -> pa.Array:
    values = array.to_numpy(zero_copy_only=False)
    finite = np.isfinite(values)
    whole = finite & (np.abs(values) < 2.0**53) & (values == np.floor(values))
    integers = pa.array(np.where(whole, values, 0).astype(np.int64)).cast(pa.string())
    # By msgspec, once for each distinct value: Arrow's cast writes some floats in another way than JSON does ("1e+20").
    distinct, inverse = np.unique(np.where(finite, values, 0.0), return_inverse=True)
    floats = pa.array([_encoded(float(value)) for value in distinct], pa.string()).take(pa.array(inverse))
    written = pc.if_else(pa.array(whole), integers, floats)
    return pc.if_else(pa.array(finite), written, pa.scalar(None, pa.string()))
