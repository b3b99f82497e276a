"""Which impressions are judged together: the top values of a field, rare values, deciles of the score, pieces of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deploy.errors import EvaluationError
from deploy.evaluate.stream import Int64s, Stream

__all__ = ["DECILES", "PIECES", "RARE", "Group", "by_value", "column_of", "deciles", "pieces_of_time", "rare"]

DECILES = 10
PIECES = 20
"""Pieces of event time with as many impressions each: enough to see a trend, and few enough that each is measured well."""

RARE = 100
"""Impressions that have shown a value before, below which the value counts as rare."""

LEAST_SHARE = 0.01
"""Share of impressions below which a group of rare values isn't shown: it is mostly the noise of its few clicks."""


class Group(NamedTuple):
    """Impressions that are judged together.

    name  what they have in common
    rows  (M,): ascending numbers in the stream
    """

    name: str
    rows: Int64s


def by_value(stream: Stream, field: str, measured: Int64s, top: int) -> list[Group]:
    """The impressions of each of the `top` most frequent values of a field, and all others.

    Raises:
        EvaluationError: the stream has no such single-valued field.
    """
    keys = _keys(stream, field)[measured]
    distinct, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    chosen = np.argsort(-counts, kind="stable")[:top]
    names = stream.values.get(field, {})
    groups = [Group(names.get(int(distinct[each]), "?"), measured[inverse == each]) for each in chosen.tolist()]
    others = ~np.isin(inverse, chosen)
    if others.any():
        groups.append(Group("others", measured[others]))
    return groups


def rare(stream: Stream, measured: Int64s) -> Iterator[Group]:
    """For each field, the impressions whose value had been shown fewer than `RARE` times before them."""
    for field in _singles(stream):
        rows = measured[_shown_before(_keys(stream, field))[measured] < RARE]
        if len(rows) >= LEAST_SHARE * len(measured):
            yield Group(field, rows)


def deciles(scores: npt.NDArray[np.float32], measured: Int64s) -> list[Group]:
    """Ten groups of equal size by rising score."""
    order = measured[np.argsort(scores[measured], kind="stable")]
    return [Group(str(number), np.sort(part)) for number, part in enumerate(np.array_split(order, DECILES), 1)]


def pieces_of_time(measured: Int64s) -> list[Group]:
    """`PIECES` stretches with as many impressions each."""
    return [Group(str(number), part) for number, part in enumerate(np.array_split(measured, PIECES), 1) if len(part)]


def _singles(stream: Stream) -> Sequence[str]:
    return [spec.name for spec in stream.schema.singles]


def column_of(stream: Stream, field: str) -> int:
    """The column of a field's keys in the stream's batch.

    Raises:
        EvaluationError: the stream has no such field with a single value.
    """
    names = _singles(stream)
    if field not in names:
        raise EvaluationError(
            f"field {field!r}: expected one of the fields with a single value ({', '.join(names)}), found another name. "
            "Correct the option."
        )
    return names.index(field)


def _keys(stream: Stream, field: str) -> Int64s:
    return stream.batch.keys[:, column_of(stream, field)]


def _shown_before(keys: Int64s) -> Int64s:
    """How often the key of each row stands in the rows before it, (N,)."""
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    starts = np.flatnonzero(np.concatenate(([True], sorted_keys[1:] != sorted_keys[:-1])))
    before = np.empty(len(keys), np.int64)
    before[order] = np.arange(len(keys)) - np.repeat(starts, np.diff(np.append(starts, len(keys))))
    return before
