"""Runs of requests as Kafka hands them over, put together and cut into batches of a size that one forward pass can take."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stream.kafka.transport import Run

__all__ = ["MAX_REQUESTS", "Batch", "Intake"]

# At 50 candidates each some 13,000 rows: a third of a second on two cores, and no more is gained with more rows.
MAX_REQUESTS = 256
MAX_BYTES = 1 << 20
# Requests that may wait, beyond which Faust's queue and then the fetcher are held back: some batches' work.
MAX_WAITING = 2_000


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests to be answered together, in the order of their partitions.

    positions   by partition, where it stands once they are answered
    generation  of the assignment they were taken under; of an older one, positions mean nothing any more
    """

    records: list[Any]
    positions: dict[int, int]
    generation: int


class Intake:
    """What was taken from Kafka and waits. Gathers what is there, and never waits for more."""

    def __init__(self) -> None:
        self.generation = 0
        self.expected: dict[int, int] = {}
        """Next offset to take, by partition; those that are not ours aren't in it."""
        self._runs: deque[tuple[Run, int]] = deque()  # a run, and which of its records comes next
        self._waiting = 0

    @property
    def full(self) -> bool:
        return self._waiting >= MAX_WAITING

    @property
    def empty(self) -> bool:
        return not self._runs

    def assign(self, positions: Mapping[int, int]) -> None:
        """Go on with these partitions; what waits of former ones is dropped, and is read again by whoever owns it now."""
        self.drop()
        self.generation += 1
        self.expected = dict(positions)

    def drop(self) -> None:
        """Take nothing more and let go of what waits, until the next `assign`."""
        self.expected = {}
        self._runs.clear()
        self._waiting = 0

    def put(self, run: Run) -> int | None:
        """Take a run.

        Returns:
            None; or, when records are missing before it, the offset to read from. It is then not taken.
        """
        expected = self.expected.get(run.partition)
        if expected is None or run.after <= expected:
            return None  # fetched before a rebalance; what is still to do of it is read again
        if run.before > expected:
            return expected
        first = next((index for index, record in enumerate(run.records) if record.offset >= expected), len(run.records))
        self._runs.append((run, first))
        self._waiting += len(run.records) - first
        self.expected[run.partition] = run.after
        return None

    def take(self) -> Batch | None:
        """The next batch; None when nothing waits. It may be of positions alone."""
        if not self._runs:
            return None
        records: list[Any] = []
        positions: dict[int, int] = {}
        size = 0
        while self._runs and len(records) < MAX_REQUESTS:
            run, first = self._runs.popleft()
            index, end = first, len(run.records)
            while index < end and len(records) < MAX_REQUESTS:
                size += len(run.records[index].value or b"")
                if records and size > MAX_BYTES:
                    break
                records.append(run.records[index])
                index += 1
            if index == end:
                positions[run.partition] = run.after
                continue
            if index > first:
                positions[run.partition] = run.records[index].offset
            self._runs.appendleft((run, index))
            break
        self._waiting -= len(records)
        return Batch(records, positions, self.generation)
