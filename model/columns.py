"""Turns columns of values into columns of keys: hashing, bucketing and the key of a missing value.

encode_columns: values of events ─▶ [fall_back: a context's values ─▶] [model.derived: the other fields ─▶] build_batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from model.batch import FeatureBatch, Float32Array, Int64Array, gather_ranges
from model.hashing import hash_integers, hash_strings, missing_key, number_key, space_seed
from model.schema import FeatureSchema, FieldSpec

__all__ = [
    "KeyColumn",
    "absent_column",
    "build_batch",
    "encode_columns",
    "fall_back",
    "number_column",
    "numeric_buckets",
    "numeric_scales",
]

_LARGEST_BUCKET = 1 << 62
"""Linear buckets are clipped here, far beyond any real value, so that they fit in 64 bits."""

_SCALED = 0  # the only bucket of a scaled field

_MOST_DEVIATIONS = 10.0
"""A `standard` number counts as this many deviations from the mean at most: a wrong unit must not blow up an update."""


@dataclass(frozen=True, slots=True)
class KeyColumn:
    """One field of N rows. `present` (N,) is False where the value is null; keys of such rows are arbitrary.

    Single-valued field: `keys` int64 (N,), `scales` float32 (N,) or None.
    List field: the elements of row i are `keys[starts[i] : starts[i] + lengths[i]]`.
    """

    present: npt.NDArray[np.bool_]
    keys: Int64Array
    scales: Float32Array | None = None
    starts: Int64Array | None = None
    lengths: Int64Array | None = None


@lru_cache
def _octave_edges(steps: int) -> npt.NDArray[np.float64]:
    """The edges that divide [0.5, 1) into `steps` buckets of equal width in the logarithm."""
    return np.array([2.0 ** (step / steps - 1) for step in range(1, steps)])


def numeric_buckets(values: npt.NDArray[np.float64], field: FieldSpec) -> Int64Array:
    """Bucket of each finite value (N,), for fields with `buckets` log or linear.

    linear: floor(x / width).
    log: floor(log2(1 + |x|) * per_octave); for x < 0 the buckets count down from -1. The mantissa of 1 + |x| is compared with
    powers of two instead of taking a logarithm, since the last bit of a logarithm differs between machines.
    """
    if field.buckets == "linear":
        with np.errstate(over="ignore"):  # an infinite quotient is clipped too
            quotient = np.floor(values / field.width)
        return np.clip(quotient, -_LARGEST_BUCKET, _LARGEST_BUCKET).astype(np.int64)
    mantissa, exponent = np.frexp(1.0 + np.abs(values))  # a = mantissa * 2**exponent, 0.5 <= mantissa < 1
    edges = _octave_edges(field.per_octave)
    buckets = (exponent.astype(np.int64) - 1) * field.per_octave + np.searchsorted(edges, mantissa, side="right")
    return np.where(values < 0, ~buckets, buckets)


def numeric_scales(values: npt.NDArray[np.float64], field: FieldSpec) -> Float32Array:
    """Factor of each finite value (N,), for fields with `buckets` scaled or standard.

    scaled: sign(x) * log(1 + |x|).
    standard: (x - mean) / deviation, within -10 and 10.
    """
    if field.buckets == "standard":
        with np.errstate(over="ignore"):  # an infinite quotient is clipped too
            quotient = (values - field.mean) / field.deviation
        return np.clip(quotient, -_MOST_DEVIATIONS, _MOST_DEVIATIONS).astype(np.float32)
    return np.copysign(np.log1p(np.abs(values)), values).astype(np.float32)


def _hash_columns(columns: Sequence[pa.Array], spaces: Sequence[str]) -> list[Int64Array]:
    """Keys of columns of strings or integers, each in its hash space; keys of nulls are arbitrary.

    Each distinct value of a column is hashed once, and the distinct values of all columns in one call: with thirty fields and
    few rows most of the time would go into calls.
    """
    encoded = [column.dictionary_encode() for column in columns]
    distinct = [each.dictionary for each in encoded]
    whole = [index for index, values in enumerate(distinct) if pa.types.is_integer(values.type)]
    texts = [index for index, values in enumerate(distinct) if pa.types.is_string(values.type)]
    values = [distinct[index] for index in texts]
    if whole:  # an integer has the key of its decimal string
        values.insert(0, pa.concat_arrays([distinct[index] for index in whole]).cast(pa.string()))
    order = whole + texts
    lengths = [len(distinct[index]) for index in order]
    seeds = np.repeat(np.array([space_seed(spaces[index]) for index in order], np.uint64), lengths)
    keys = np.append(hash_strings(pa.concat_arrays(values), seeds), 0)  # the last: nulls of a column without values read it
    starts = dict(zip(order, np.cumsum([0, *lengths]).tolist(), strict=False))
    return [keys[_without_nulls(each.indices, 0) + starts[index]] for index, each in enumerate(encoded)]


def encode_columns(columns: Sequence[pa.Array], fields: Sequence[FieldSpec]) -> list[KeyColumn]:
    """Keys of each field, from Arrow arrays (N,); a null is a missing value.

    columns  strings or int64 (categorical), float64 (numeric), lists of strings without nulls (list)
    """
    # Fields that no row has are skipped: candidates have few of the context's fields, and the other way round.
    filled = [(c, f) for c, f in zip(columns, fields, strict=True) if c.null_count < len(c)]
    words = [(c.flatten() if f.kind == "list" else c, f.hash_space) for c, f in filled if f.kind != "numeric"]  # to be hashed
    hashed = iter(_hash_columns([c for c, _ in words], [space for _, space in words]) if words else [])
    out = []
    for column, field in zip(columns, fields, strict=True):
        if column.null_count == len(column):
            out.append(absent_column(len(column), field))
        elif field.kind == "numeric":
            out.append(number_column(_presence(column), _without_nulls(column, 0.0), field))
        else:
            out.append(_encode_words(column, field, next(hashed)))
    return out


def absent_column(rows: int, field: FieldSpec) -> KeyColumn:
    """The column of a field that none of `rows` rows has."""
    zeros = np.zeros(rows, np.int64)
    if field.kind == "list":
        return KeyColumn(zeros.astype(bool), zeros[:0], starts=zeros, lengths=zeros)
    return KeyColumn(zeros.astype(bool), zeros, scales=zeros.astype(np.float32) if field.is_scaled else None)


def _presence(column: pa.Array) -> npt.NDArray[np.bool_]:
    return column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else np.ones(len(column), bool)


def _without_nulls(column: pa.Array, instead: float) -> npt.NDArray[Any]:
    return (pc.fill_null(column, instead) if column.null_count else column).to_numpy()


def _encode_words(column: pa.Array, field: FieldSpec, keys: Int64Array) -> KeyColumn:
    if field.kind == "categorical":
        return KeyColumn(_presence(column), keys)
    lengths = _without_nulls(pc.list_value_length(column), 0).astype(np.int64)
    return KeyColumn(_presence(column), keys, starts=np.cumsum(lengths) - lengths, lengths=lengths)


def number_column(present: npt.NDArray[np.bool_], values: npt.NDArray[np.float64], field: FieldSpec) -> KeyColumn:
    """Keys of a numeric field from finite `values` (N,); values that are not `present` (N,) get arbitrary keys."""
    if field.is_scaled:
        keys = np.full(len(values), number_key(_SCALED, field.hash_space), np.int64)
        return KeyColumn(present, keys, scales=numeric_scales(values, field))
    return KeyColumn(present, hash_integers(numeric_buckets(values, field), field.hash_space))


def fall_back(column: KeyColumn, other: KeyColumn, rows: Int64Array) -> KeyColumn:
    """`column` (N,); a row i without a value gets the value of row `rows[i]` of `other`."""
    if not other.present.any():
        return column
    present = column.present | other.present[rows]
    if column.starts is None or column.lengths is None:
        keys = np.where(column.present, column.keys, other.keys[rows])
        if column.scales is None or other.scales is None:
            return KeyColumn(present, keys)
        return KeyColumn(present, keys, scales=np.where(column.present, column.scales, other.scales[rows]))
    assert other.starts is not None and other.lengths is not None
    return KeyColumn(
        present,
        np.concatenate((column.keys, other.keys)),
        starts=np.where(column.present, column.starts, len(column.keys) + other.starts[rows]),
        lengths=np.where(column.present, column.lengths, other.lengths[rows]),
    )


def build_batch(columns: Sequence[KeyColumn], schema: FeatureSchema, rows: int) -> FeatureBatch:
    """A batch of `rows` rows, from one column for each field of the schema. A missing value gets its field's "missing" key."""
    single = [(c, f) for c, f in zip(columns, schema.fields, strict=True) if not schema.is_list(f)]
    lists = [(c, f) for c, f in zip(columns, schema.fields, strict=True) if schema.is_list(f)]
    keys = np.empty((rows, len(single)), np.int64)
    scaled = any(field.is_scaled for field in schema.fields)
    scales = np.ones((rows, len(single)), np.float32) if scaled else None
    for index, (column, field) in enumerate(single):
        keys[:, index] = np.where(column.present, column.keys, missing_key(field.hash_space))
        if scales is not None and column.scales is not None:
            scales[:, index] = np.where(column.present, column.scales, 1.0)
    pool: list[Int64Array] = []
    starts = np.empty((rows, len(lists)), np.int64)
    lengths = np.empty((rows, len(lists)), np.int64)
    pooled = 0  # keys in the pool so far
    for index, (column, field) in enumerate(lists):
        assert column.starts is not None and column.lengths is not None
        empty = ~column.present | (column.lengths == 0)
        pool += [column.keys, np.array([missing_key(field.hash_space)], np.int64)]
        starts[:, index] = np.where(empty, pooled + len(column.keys), pooled + column.starts)
        lengths[:, index] = np.where(empty, 1, column.lengths)
        pooled += len(column.keys) + 1
    return FeatureBatch(
        keys=keys,
        list_keys=gather_ranges(np.concatenate(pool), starts.ravel(), lengths.ravel()) if pool else np.empty(0, np.int64),
        list_offsets=np.concatenate(([0], np.cumsum(lengths.ravel()))),
        lists=len(lists),
        scales=scales,
    )
