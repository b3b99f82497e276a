"""Labelled examples in columns, as the trainer hands them from part to part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, compress
from typing import Any

import numpy as np
import numpy.typing as npt

from model.features import FeatureBatch
from state.held_click import NOT_KNOWN_MS
from stream.records.record import Record

__all__ = ["BoolArray", "ExampleColumns", "Float32Array", "Float64Array", "Int64Array"]

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_Rows = slice | BoolArray

_ARRAYS: dict[str, float] = {
    "labels": np.nan,
    "weights": 1.0,
    "impression_ms": np.nan,
    "reached_ms": np.nan,
    "served": np.nan,
    "versions": -1,
    "deltas": -1,
    "id_hashes": np.nan,
    "rates": 1.0,
    "corrects": False,
    "arrived_ms": NOT_KNOWN_MS,
    "shadow_scores": np.nan,
    "shadow_versions": -1,
}
"""The arrays of `ExampleColumns`, each with what a column that is None says of its examples. Required ones are never None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleColumns:
    """N labelled examples.

    batch          their features
    labels         float32 (N,)  1 clicked, 0 not
    weights        float32 (N,)  importance; None when all are 1
    impression_ms  int64 (N,)    event time
    reached_ms     int64 (N,)    the earlier of event time and the example's arrival in Kafka; the watermark is the largest of
                                 these, so an event time in the future doesn't move it into the future
    served         float32 (N,)  the score that the impression was shown with, NaN where absent
    versions       int64 (N,)    the version of the model that gave that score, -1 where absent
    deltas         int64 (N,)    number of deltas since that version that the weights contained, -1 where absent
    id_hashes      int64 (N,)    hash of the impression id (`hash_ids`)
    records        the examples as they were read, N of them
    rates          float64 (N,)  share of negatives that the join sent at the time of this example; None when it sent all
    corrects       bool (N,)     whether the example is a correction, which takes back the opposite label sent before; None when
                                 none is
    arrived_ms     int64 (N,)    when the click arrived in Kafka, -1 where there is none or that isn't known; None when it is
                                 known of none
    shadow_scores    float32 (N,)  the score that a version on trial gave beside, NaN where absent; None when all are
    shadow_versions  int64 (N,)    that version, -1 where absent; None when all are
    """

    batch: FeatureBatch
    labels: Float32Array
    weights: Float32Array | None = None
    impression_ms: Int64Array
    reached_ms: Int64Array
    served: Float32Array
    versions: Int64Array
    deltas: Int64Array
    id_hashes: Int64Array
    records: Sequence[Record]
    rates: Float64Array | None = None
    corrects: BoolArray | None = None
    arrived_ms: Int64Array | None = None
    shadow_scores: Float32Array | None = None
    shadow_versions: Int64Array | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def slice(self, start: int, stop: int) -> ExampleColumns:
        """Examples `start` to `stop`. They share memory with these."""
        rows = slice(start, stop)
        return ExampleColumns(batch=self.batch.slice(start, stop), records=self.records[rows], **self._arrays(rows))

    def _kept(self, kept: BoolArray) -> dict[str, Any]:
        """Each column with those examples only that `kept` (N,) says, by its name."""
        return {
            "batch": self.batch.take(np.flatnonzero(kept)),
            "records": list(compress(self.records, kept)),
            **self._arrays(kept),
        }

    def _arrays(self, rows: _Rows) -> dict[str, Any]:
        every = ((name, getattr(self, name)) for name in _ARRAYS)
        return {name: column if column is None else column[rows] for name, column in every}

    @classmethod
    def concat(cls, parts: Sequence[ExampleColumns]) -> ExampleColumns:
        """The examples of all parts, one after another; at least one part."""
        return ExampleColumns(
            batch=FeatureBatch.concat([part.batch for part in parts]),
            records=list(chain.from_iterable(part.records for part in parts)),
            **{name: _joined(parts, name, absent) for name, absent in _ARRAYS.items()},
        )


def _joined(parts: Sequence[ExampleColumns], name: str, absent: float) -> Any:
    """One column of all parts; None when no part has it. A part without it has `absent` in each row."""
    columns = [getattr(part, name) for part in parts]
    kind = next((column.dtype for column in columns if column is not None), None)
    if kind is None:
        return None
    return np.concatenate(
        [np.full(len(part), absent, kind) if column is None else column for part, column in zip(parts, columns, strict=True)]
    )
