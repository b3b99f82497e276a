"""Columns → batches, and the offsets up to which the log is trained."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from model.features import FeatureBatch
from state.held_click import NOT_KNOWN_MS
from stream.records.record import Record
from stream.trainer.examples import BoolArray, DecodedRun, Float32Array, Float64Array, Int64Array

__all__ = ["BatchCutter", "TrainingBatch"]

_Column = TypeVar("_Column", Float64Array, Float32Array, BoolArray, Int64Array)


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Examples of one update. Columns as in `DecodedRun`; `weights` is None when all are 1."""

    batch: FeatureBatch
    labels: Float32Array
    weights: Float32Array | None
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

    def slice(self, start: int, stop: int) -> TrainingBatch:
        """Examples `start` to `stop`. Shares memory with this batch."""
        part = slice(start, stop)
        return TrainingBatch(
            batch=self.batch.slice(start, stop),
            labels=self.labels[part],
            weights=None if self.weights is None else self.weights[part],
            impression_ms=self.impression_ms[part],
            reached_ms=self.reached_ms[part],
            served=self.served[part],
            versions=self.versions[part],
            deltas=self.deltas[part],
            id_hashes=self.id_hashes[part],
            records=self.records[part],
            rates=None if self.rates is None else self.rates[part],
            corrects=None if self.corrects is None else self.corrects[part],
            arrived_ms=None if self.arrived_ms is None else self.arrived_ms[part],
            shadow_scores=None if self.shadow_scores is None else self.shadow_scores[part],
            shadow_versions=None if self.shadow_versions is None else self.shadow_versions[part],
        )


class _Piece(NamedTuple):
    """Examples `start` to `stop` of a run."""

    run: DecodedRun
    start: int
    stop: int


@dataclass(slots=True)
class _Waiting:
    """A run whose first `start` examples are cut already."""

    run: DecodedRun
    start: int = 0

    def __len__(self) -> int:
        return len(self.run) - self.start


class BatchCutter:
    """Cuts batches of `rows` examples across runs and partitions, in the order in which they came.

        cutter = BatchCutter(256, {0: 0})
        cutter.add(run)
        while cutter.waiting >= 256:
            learn(cutter.cut())
        cutter.positions     # {0: next offset to train}

    `positions` are exactly what has been cut: a version captured between two batches holds them. Examples that wait for their
    batch to fill aren't counted, and are read again after a restart, so a batch begins at the same example either way.
    Offsets without an example (bad records, transaction markers) count as trained together with the example before them, or by
    themselves if no older example waits.
    """

    def __init__(self, rows: int, positions: Mapping[int, int]) -> None:
        self.rows = rows
        self._runs: deque[_Waiting] = deque()
        self.positions = dict(positions)
        self.waiting = 0
        self.letters = 0
        """Number of dead letters in all runs that `positions` has reached."""

    def add(self, run: DecodedRun) -> None:
        """Take the next run of a partition."""
        self._runs.append(_Waiting(run))
        self.waiting += len(run)
        self._skip_empty()

    def cut(self) -> TrainingBatch:
        """The next `rows` examples, or all that wait when there are fewer. At least one example must wait."""
        wanted = min(self.rows, self.waiting)
        pieces: list[_Piece] = []
        taken = 0
        while taken < wanted:
            head = self._runs[0]
            if not head.start:
                self.letters += len(head.run.letters)
            stop = head.start + min(len(head), wanted - taken)
            taken += stop - head.start
            if stop > head.start:
                pieces.append(_Piece(head.run, head.start, stop))
                self.positions[head.run.partition] = int(head.run.offsets[stop - 1]) + 1
            head.start = stop
            if not len(head):
                self.positions[head.run.partition] = head.run.after
                self._runs.popleft()
        self.waiting -= taken
        self._skip_empty()
        weights = np.concatenate([run.weights[start:stop] for run, start, stop in pieces])
        return TrainingBatch(
            batch=FeatureBatch.concat([run.batch.slice(start, stop) for run, start, stop in pieces]),
            labels=np.concatenate([run.labels[start:stop] for run, start, stop in pieces]),
            weights=None if (weights == 1).all() else weights,
            impression_ms=np.concatenate([run.impression_ms[start:stop] for run, start, stop in pieces]),
            reached_ms=np.concatenate([run.reached_ms[start:stop] for run, start, stop in pieces]),
            served=np.concatenate([run.served[start:stop] for run, start, stop in pieces]),
            versions=np.concatenate([run.versions[start:stop] for run, start, stop in pieces]),
            deltas=np.concatenate([run.deltas[start:stop] for run, start, stop in pieces]),
            id_hashes=np.concatenate([run.id_hashes[start:stop] for run, start, stop in pieces]),
            records=[record for run, start, stop in pieces for record in run.records[start:stop]],
            rates=_joined([(run.rates, start, stop) for run, start, stop in pieces], 1.0),
            corrects=_joined([(run.corrects, start, stop) for run, start, stop in pieces], False),
            arrived_ms=_joined([(run.arrived_ms, start, stop) for run, start, stop in pieces], NOT_KNOWN_MS),
            shadow_scores=_joined([(run.shadow_scores, start, stop) for run, start, stop in pieces], np.nan),
            shadow_versions=_joined([(run.shadow_versions, start, stop) for run, start, stop in pieces], -1),
        )

    def _skip_empty(self) -> None:
        """Count runs without an example as trained when everything older is."""
        while self._runs and not len(self._runs[0].run):
            run = self._runs.popleft().run
            self.letters += len(run.letters)
            self.positions[run.partition] = run.after


def _joined(pieces: list[tuple[_Column | None, int, int]], absent: float | bool) -> _Column | None:
    """The rows `start` to `stop` of each column, one after another; None when all columns are None.

    Args:
        absent: the value in all rows of a column that is None.
    """
    kind = next((column.dtype for column, _, _ in pieces if column is not None), None)
    if kind is None:
        return None
    return np.concatenate(
        [np.full(stop - start, absent, kind) if column is None else column[start:stop] for column, start, stop in pieces]
    )
