"""Delay-exact learning and scoring without Kafka: shared by `bench/hold.py` and `bench/real_time.py`.

Each impression is scored at its event time, by a model that has learned the labels that were sent before that time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deploy.datasets import DataSet
from deploy.feeding.simulation import Simulation, generate, simulation_schema
from model.batch import FeatureBatch
from model.features import FeatureDecoder
from model.learner import Learner
from model.schema import FeatureSchema
from model.settings import ModelSettings

__all__ = ["Labels", "Stream", "at_once", "from_data_set", "held", "play", "simulated"]

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Stream:
    """N impressions in event-time order.

    shown_ms       (N,): event times
    clicked_ms     (N,): times of the clicks; -1 without a click
    probabilities  (N,): true probability of a click at any time; NaN if unknown
    ages_ms        (N,): time since the item first appeared; -1 for items that exist from the start
    """

    name: str
    schema: FeatureSchema
    batch: FeatureBatch
    shown_ms: Int64s
    clicked_ms: Int64s
    probabilities: Floats
    ages_ms: Int64s

    def __len__(self) -> int:
        return len(self.shown_ms)

    def labels(self, window_ms: int) -> Bools:
        """Whether each impression was clicked within the attribution window, (N,)."""
        return (self.clicked_ms >= 0) & (self.clicked_ms - self.shown_ms <= window_ms)


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


def held(stream: Stream, window_ms: int, hold_ms: int, *, lateness_ms: int = 0, commit_ms: int = 0) -> Labels:
    """Labels as the join sends them: in the order of impressions, `hold_ms` after each, with corrections for later clicks.

    Args:
        lateness_ms: how far the watermark is behind. First labels wait for it; a correction only waits for its first label.
        commit_ms: time from a label until the trainer has read it.
    """
    clicked = stream.labels(window_ms)
    early = clicked & (stream.clicked_ms - stream.shown_ms <= hold_ms)
    late = np.flatnonzero(clicked & ~early)
    first_ms = stream.shown_ms + min(hold_ms, window_ms) + lateness_ms
    return _ordered(
        np.concatenate([np.arange(len(stream)), late]),
        np.concatenate([early, np.ones(len(late), np.bool_)]),
        np.concatenate([np.zeros(len(stream), np.bool_), np.ones(len(late), np.bool_)]),
        np.concatenate([first_ms, np.maximum(stream.clicked_ms, first_ms)[late]]) + commit_ms,
    )


def at_once(stream: Stream, window_ms: int) -> Labels:
    """The ideal, which no system can have: each label is known at the time of its impression."""
    rows = np.arange(len(stream))
    return Labels(rows, stream.labels(window_ms).astype(np.float32), np.zeros(len(rows), np.bool_), stream.shown_ms)


def _ordered(rows: Int64s, labels: Bools, corrects: Bools, known_ms: Int64s) -> Labels:
    order = np.argsort(known_ms, kind="stable")  # a correction of the same time comes after the first labels
    return Labels(rows[order], labels[order].astype(np.float32), corrects[order], known_ms[order])


def cut(labels: Labels, rows: int, age_ms: int) -> Iterator[tuple[slice, int]]:
    """Batches as the trainer cuts them, with the event times at which they are learned: when full, or `age_ms` old."""
    start, known = 0, labels.known_ms
    while start < len(known):
        stop = min(start + rows, len(known))
        ends_ms = int(known[start]) + age_ms
        if known[stop - 1] > ends_ms:
            stop = max(start + 1, int(np.searchsorted(known, ends_ms, side="right")))
            yield slice(start, stop), ends_ms
        else:
            yield slice(start, stop), int(known[stop - 1])
        start = stop


def play(
    stream: Stream,
    labels: Labels,
    settings: ModelSettings,
    *,
    batch_age_ms: int = 500,
    serve_every_ms: int = 0,
    serve_late_ms: int = 0,
    saturate: bool = False,
) -> tuple[npt.NDArray[np.float32], Int64s]:
    """Learn all labels, and score all impressions as a scorer would.

    Args:
        serve_every_ms: time between versions; 0: the learner itself answers.
        serve_late_ms: time from the capture of a version until scorers use it.
        saturate: begin with a bias that adds 6 to all logits.

    Returns:
        The scores (N,), NaN before the first version, and the times (N,) at which their versions were captured, or -1.
    """
    learner = Learner(stream.schema, settings, device="cpu")
    if saturate:
        serving = learner.serving_state()
        serving["bias"] += 6.0
        learner.restore(serving, learner.trainer_state())
    captured_ms = np.full(len(stream), -1, np.int64)
    scores = np.full(len(stream), np.nan, np.float32)
    done = 0
    version_ms = int(labels.known_ms[0]) + serve_every_ms
    for rows, now_ms in cut(labels, settings.batch_rows, batch_age_ms):
        if not serve_every_ms:
            before, done = done, score_until(stream, learner, scores, done, now_ms)
            captured_ms[before:done] = stream.shown_ms[before:done]
        while serve_every_ms and version_ms <= now_ms:
            if learner.examples_seen:
                done = max(done, int(np.searchsorted(stream.shown_ms, version_ms + serve_late_ms)))
                before, done = done, score_until(stream, learner, scores, done, version_ms + serve_late_ms + serve_every_ms)
                captured_ms[before:done] = version_ms
            version_ms += serve_every_ms
        shown = labels.rows[rows]
        learner.learn(stream.batch.take(shown), labels.labels[rows], None, labels.corrects[rows], stream.shown_ms[shown])
    score_until(stream, learner, scores, done, int(stream.shown_ms[-1]) + 1)
    return scores, captured_ms


def score_until(stream: Stream, learner: Learner, scores: npt.NDArray[np.float32], done: int, until_ms: int) -> int:
    """Score the impressions from row `done` on that are shown before `until_ms`; returns the row after them."""
    until = int(np.searchsorted(stream.shown_ms, until_ms))
    if until > done:
        scores[done:until] = learner.predict(stream.batch.slice(done, until))
    return max(done, until)


def simulated(simulation: Simulation, name: str = "simulation") -> Stream:
    """The stream of a simulation."""
    batches = list(generate(simulation))
    decoder = FeatureDecoder(simulation_schema())
    return Stream(
        name=name,
        schema=simulation_schema(),
        batch=FeatureBatch.concat([_decoded(decoder, batch.features, batch.times_ms) for batch in batches]),
        shown_ms=np.concatenate([batch.times_ms for batch in batches]),
        clicked_ms=np.concatenate([batch.click_times_ms for batch in batches]),
        probabilities=np.concatenate([batch.probabilities for batch in batches]),
        ages_ms=np.concatenate([batch.item_ages_ms for batch in batches]),
    )


def from_data_set(data_set: DataSet, rows: int | None = None) -> Stream:
    """The impressions of a data set, or the first of them, with its own click delays."""
    chunks = list(data_set.chunks())
    if rows is not None:
        starts = np.cumsum([0, *map(len, chunks)])
        chunks = [chunk.head(rows - start) for chunk, start in zip(chunks, starts.tolist(), strict=False) if start < rows]
    decoder = FeatureDecoder(data_set.schema())
    shown_ms = np.concatenate([chunk.timestamps_ms for chunk in chunks])
    return Stream(
        name=data_set.name,
        schema=data_set.schema(),
        batch=FeatureBatch.concat([_decoded(decoder, chunk.features, chunk.timestamps_ms) for chunk in chunks]),
        shown_ms=shown_ms,
        clicked_ms=np.concatenate([np.where(chunk.clicked, chunk.click_timestamps_ms, -1) for chunk in chunks]),
        probabilities=np.full(len(shown_ms), np.nan),
        ages_ms=np.full(len(shown_ms), -1, np.int64),
    )


def _decoded(decoder: FeatureDecoder, features: Iterable[bytes], times_ms: Int64s) -> FeatureBatch:
    values = [b'{"impression_id":"-","timestamp":1700000000000,"features":%b}' % each for each in features]
    decoded = decoder.impressions(values, times_ms)
    assert not decoded.bad, decoded.bad[0]
    return decoded.batch
