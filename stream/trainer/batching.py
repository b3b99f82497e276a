"""Columns → batches, and the offsets up to which the log is trained."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from stream.trainer.columns import ExampleColumns
from stream.trainer.examples import DecodedRun

__all__ = ["BatchCutter"]


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

    def cut(self) -> ExampleColumns:
        """The next `rows` examples, or all that wait when there are fewer. At least one example must wait."""
        wanted = min(self.rows, self.waiting)
        pieces: list[ExampleColumns] = []
        taken = 0
        while taken < wanted:
            head = self._runs[0]
            if not head.start:
                self.letters += len(head.run.letters)
            stop = head.start + min(len(head), wanted - taken)
            taken += stop - head.start
            if stop > head.start:
                pieces.append(head.run.slice(head.start, stop))
                self.positions[head.run.partition] = int(head.run.offsets[stop - 1]) + 1
            head.start = stop
            if not len(head):
                self.positions[head.run.partition] = head.run.after
                self._runs.popleft()
        self.waiting -= taken
        self._skip_empty()
        batch = ExampleColumns.concat(pieces)
        if batch.weights is not None and (batch.weights == 1).all():
            return replace(batch, weights=None)
        return batch

    def _skip_empty(self) -> None:
        """Count runs without an example as trained when everything older is."""
        while self._runs and not len(self._runs[0].run):
            run = self._runs.popleft().run
            self.letters += len(run.letters)
            self.positions[run.partition] = run.after
