"""The figures of `bench/freshness.py`, from what the topics hold after a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Answers", "Clicks", "Deltas", "figures"]

Int64s = npt.NDArray[np.int64]
# Percentiles that are reported, by the names of their keys.
_PERCENTILES = {"p50_ms": 50, "p99_ms": 99}


@dataclass(frozen=True, slots=True)
class Clicks:
    """Examples with a click, N of them: first labels and corrections.

    partition, offset  int64 (N,)  where the example is in `examples`
    due_ms             int64 (N,)  when the label was due
    arrived_ms         int64 (N,)  when the click arrived in Kafka
    written_ms         int64 (N,)  when the example arrived in Kafka
    """

    partition: Int64s
    offset: Int64s
    due_ms: Int64s
    arrived_ms: Int64s
    written_ms: Int64s

    def __len__(self) -> int:
        return len(self.offset)


@dataclass(frozen=True, slots=True)
class Deltas:
    """Deltas of one chain, D of them, in the order of the log.

    sequence    int64 (D,)  the number in the chain
    taken_ms    int64 (D,)  when the trainer took the delta, by its own clock
    written_ms  int64 (D,)  when the delta's last record arrived in Kafka
    offsets     partition → int64 (D,): the next offset of `examples` to train
    """

    sequence: Int64s
    taken_ms: Int64s
    written_ms: Int64s
    offsets: Mapping[int, Int64s]


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers with scores, A of them, in the order in which they arrived in Kafka.

    sequence    int64 (A,)  the newest delta in the weights that scored
    written_ms  int64 (A,)
    """

    sequence: Int64s
    written_ms: Int64s


def figures(clicks: Clicks, deltas: Deltas, answers: Answers, from_ms: int) -> dict[str, float]:
    """Freshness, and where its time goes, in ms.

    The clicks whose labels were due from `from_ms` on are measured, without those that no delta or no answer has reached at the
    end of the run. `unanswered_share` is the share of these.

    Returns:
        p50_ms, p99_ms: from the time at which a label was due to the first answer that knows it.
        click_p50_ms, click_p99_ms: from the click's arrival in Kafka to that answer.
        join_…, train_…, delta_…, apply_…: the parts of the first. They go from due to the example in the log, from there to the
        delta that is taken, from there to the delta in the log, and from there to the answer.
    """
    measured = np.flatnonzero(clicks.due_ms >= from_ms)
    index = _first_delta(clicks, deltas, measured)
    learned = index < len(deltas.sequence)
    measured, index = measured[learned], index[learned]
    reached = np.maximum.accumulate(answers.sequence)  # answers of two partitions may overtake each other in the log
    answer = np.searchsorted(reached, deltas.sequence[index], side="left")
    answered = answer < len(reached)
    measured, index, answer = measured[answered], index[answered], answer[answered]
    due_ms, written_ms = clicks.due_ms[measured], clicks.written_ms[measured]
    taken_ms, logged_ms, answered_ms = deltas.taken_ms[index], deltas.written_ms[index], answers.written_ms[answer]
    parts = {
        "": answered_ms - due_ms,
        "click_": answered_ms - clicks.arrived_ms[measured],
        "join_": written_ms - due_ms,
        "train_": taken_ms - written_ms,
        "delta_": logged_ms - taken_ms,
        "apply_": answered_ms - logged_ms,
    }
    found: dict[str, float] = {
        f"{part}{name}": round(float(np.percentile(times, percent)), 1) if len(times) else float("nan")
        for part, times in parts.items()
        for name, percent in _PERCENTILES.items()
    }
    due = int((clicks.due_ms >= from_ms).sum())
    return {**found, "clicks": len(measured), "unanswered_share": round(1 - len(measured) / max(1, due), 4)}


def _first_delta(clicks: Clicks, deltas: Deltas, rows: Int64s) -> Int64s:
    """The index of the first delta that has learned each of these clicks; the number of deltas where none has."""
    index = np.full(len(rows), len(deltas.sequence))
    for partition, ends in deltas.offsets.items():
        mine = np.flatnonzero(clicks.partition[rows] == partition)
        index[mine] = np.searchsorted(ends, clicks.offset[rows[mine]], side="right")
    return index
