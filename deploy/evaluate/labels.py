"""The labels of a stream as the join sends them, and batches as the trainer cuts them, by event time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deploy.evaluate.stream import Bools, Int64s, Stream
from stream.settings import JoinSettings

__all__ = ["Labels", "at_once", "cut", "held", "joined"]


@dataclass(frozen=True, slots=True)
class Labels:
    """M labels in the order in which they are learned.

    rows      (M,): rows of the stream
    labels    (M,): 0 or 1
    corrects  (M,): whether the label is a correction, which takes back the negative that was sent before
    known_ms  (M,): event time at which the trainer has the label, ascending
    """

    rows: Int64s
    labels: npt.NDArray[np.float32]
    corrects: Bools
    known_ms: Int64s

    def __len__(self) -> int:
        return len(self.rows)


def joined(stream: Stream, join: JoinSettings) -> Labels:
    """Labels as a join of these settings sends them."""
    return held(stream, join.window_ms, join.held_ms, lateness_ms=join.lateness_ms)


def held(stream: Stream, window_ms: int, hold_ms: int, *, lateness_ms: int = 0, commit_ms: int = 0) -> Labels:
    """Labels as the join sends them: in the order of impressions, `hold_ms` after each, with corrections for later clicks.

    Args:
        lateness_ms: how far the watermark is behind. First labels wait for it; a correction only waits for its first label.
        commit_ms: time from a label until the trainer has read it.
    """
    clicked = stream.labels(window_ms)
    early = clicked & (stream.clicked_ms - stream.shown_ms <= hold_ms)
    first = np.arange(len(stream))
    if stream.kept is not None:
        first = np.flatnonzero(early | stream.kept)
    late = np.flatnonzero(clicked & ~early)
    first_ms = stream.shown_ms + min(hold_ms, window_ms) + lateness_ms
    return _ordered(
        np.concatenate([first, late]),
        np.concatenate([early[first], np.ones(len(late), np.bool_)]),
        np.concatenate([np.zeros(len(first), np.bool_), np.ones(len(late), np.bool_)]),
        np.concatenate([first_ms[first], np.maximum(stream.clicked_ms, first_ms)[late]]) + commit_ms,
    )


def at_once(stream: Stream, window_ms: int) -> Labels:
    """The ideal, which no system can have: each label is known at the time of its impression."""
    rows = np.arange(len(stream))
    return Labels(rows, stream.labels(window_ms).astype(np.float32), np.zeros(len(rows), np.bool_), stream.shown_ms)


def _ordered(rows: Int64s, labels: Bools, corrects: Bools, known_ms: Int64s) -> Labels:
    order = np.argsort(known_ms, kind="stable")  # a correction of the same time comes after the first labels
    return Labels(rows[order], labels[order].astype(np.float32), corrects[order], known_ms[order])


def cut(labels: Labels, rows: int, age_ms: int | None) -> Iterator[tuple[slice, int]]:
    """Batches as the trainer cuts them, with the event times at which they are learned: when full, or `age_ms` old.

    Without an age a batch waits until it is full, whatever event time passes.
    """
    start, known = 0, labels.known_ms
    while start < len(known):
        stop = min(start + rows, len(known))
        ends_ms = None if age_ms is None else int(known[start]) + age_ms
        if ends_ms is not None and known[stop - 1] > ends_ms:
            stop = max(start + 1, int(np.searchsorted(known, ends_ms, side="right")))
            yield slice(start, stop), ends_ms
        else:
            yield slice(start, stop), int(known[stop - 1])
        start = stop
