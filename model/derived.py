"""Fields whose values events don't carry: times, crosses, and what a field is served as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from model.batch import FeatureBatch, Int64Array, gather_ranges
from model.clock import hours, weekdays
from model.columns import KeyColumn, build_batch, number_column
from model.errors import ModelError
from model.hashing import hash_bytes, hash_crosses, missing_key
from model.schema import FeatureSchema, FieldSpec

__all__ = ["as_served", "complete", "shown_value"]


def complete(
    sent: Mapping[str, KeyColumn], schema: FeatureSchema, rows: int, times_ms: Int64Array | None, *, served: bool
) -> list[KeyColumn]:
    """A column for each field of the schema, from those whose values events carry, by name.

    Args:
        times_ms: (N,), event times, ms since 1970-01-01 UTC. Only needed when the schema has hours or weekdays.
        served: for scoring: fields with a value to serve as have it, and needn't be in `sent`.

    Raises:
        ModelError: the schema has hours or weekdays, and no times are given.
    """
    found = dict(sent)
    for field in schema.fields:
        if served and field.serve_as is not None:
            found[field.name] = _constant_column(rows, field)
        elif field.kind in ("hour", "weekday"):
            if times_ms is None:
                raise ModelError(f"field {field.name}: expected the times of the events, found none")
            read, values = (hours, 24) if field.kind == "hour" else (weekdays, 7)
            # An hour has the key that the same number has in a categorical field: producers may have sent it until now.
            keys = np.array([hash_bytes(str(each).encode(), field.hash_space) for each in range(values)], np.int64)
            found[field.name] = KeyColumn(np.ones(rows, bool), keys[read(times_ms, schema.timezone)])
    for field in schema.fields:
        if field.kind == "cross":
            found[field.name] = _cross_column([(found[part.name], part) for part in schema.parts(field)], field)
    return [found[field.name] for field in schema.fields]


def _constant_column(rows: int, field: FieldSpec) -> KeyColumn:
    """The value that a field is served as, in each of `rows` rows."""
    present, value = np.ones(rows, bool), field.serve_as
    if isinstance(value, tuple):
        keys = np.array([hash_bytes(each.encode(), field.hash_space) for each in value], np.int64)
        return KeyColumn(present, keys, starts=np.zeros(rows, np.int64), lengths=np.full(rows, len(value), np.int64))
    if field.kind == "numeric":
        assert isinstance(value, int | float)
        return number_column(present, np.full(rows, float(value)), field)
    return KeyColumn(present, np.full(rows, hash_bytes(str(value).encode(), field.hash_space), np.int64))


def _cross_column(parts: Sequence[tuple[KeyColumn, FieldSpec]], field: FieldSpec) -> KeyColumn:
    """A key for each combination of the parts' values. A missing value is a value like any other here: its part's "missing".

    With a list among the parts, there is a combination for each of its elements; an empty list has its "missing" alone.
    """
    singles = {
        part.name: np.where(column.present, column.keys, missing_key(part.hash_space))
        for column, part in parts
        if part.kind != "list"
    }
    present = np.ones(len(parts[0][0].present), bool)
    ragged = next(((column, part) for column, part in parts if part.kind == "list"), None)
    if ragged is None:
        return KeyColumn(present, hash_crosses([singles[part.name] for _, part in parts], field.hash_space))
    column, part = ragged
    assert column.starts is not None and column.lengths is not None
    empty = ~column.present | (column.lengths == 0)
    pool = np.append(column.keys, missing_key(part.hash_space))
    lengths = np.where(empty, 1, column.lengths)
    elements = gather_ranges(pool, np.where(empty, len(column.keys), column.starts), lengths)
    of_elements = {name: np.repeat(keys, lengths) for name, keys in singles.items()} | {part.name: elements}
    keys = hash_crosses([of_elements[each.name] for _, each in parts], field.hash_space)
    return KeyColumn(present, keys, starts=np.cumsum(lengths) - lengths, lengths=lengths)


def as_served(batch: FeatureBatch, schema: FeatureSchema) -> FeatureBatch:
    """The same examples as a scorer would read them: fields with a value to serve as have it, and so have their crosses."""
    if not schema.constant:
        return batch
    constant = {field.name for field in schema.constant}
    present = np.ones(len(batch), bool)
    found: dict[str, KeyColumn] = {}
    for index, field in enumerate(schema.singles):
        scales = None if batch.scales is None or not field.is_scaled else batch.scales[:, index]
        found[field.name] = KeyColumn(present, batch.keys[:, index], scales=scales)
    bounds = batch.list_offsets[:-1].reshape(len(batch), batch.lists)
    lengths = np.diff(batch.list_offsets).reshape(len(batch), batch.lists)
    for index, field in enumerate(schema.lists):
        found[field.name] = KeyColumn(present, batch.list_keys, starts=bounds[:, index], lengths=lengths[:, index])
    for field in schema.constant:
        found[field.name] = _constant_column(len(batch), field)
    for field in schema.fields:
        if constant & set(field.of):
            found[field.name] = _cross_column([(found[part.name], part) for part in schema.parts(field)], field)
    return build_batch([found[field.name] for field in schema.fields], schema, len(batch))


def shown_value(field: FieldSpec, schema: FeatureSchema, features: Mapping[str, Any], time_ms: int) -> str:
    """The value of a field in an event, for people: `7`, `missing`, or `7 × missing` for a cross.

    Args:
        features: the values that the event carries, by name.
        time_ms: the event's time, from 0 to `model.clock.LATEST_MS`.
    """
    if field.kind == "cross":
        return " × ".join(shown_value(part, schema, features, time_ms) for part in schema.parts(field))
    if field.kind in ("hour", "weekday"):
        read = hours if field.kind == "hour" else weekdays
        return str(int(read(np.array([time_ms], np.int64), schema.timezone)[0]))
    value = features.get(field.name)
    return "missing" if value is None else str(value)
