"""One pass over a stream: the trainer's own code learns each label when it has it, and each impression is scored in its time.

The pass is delay-exact: a score knows the labels that the trainer had at the time of the impression (less what serving is
late), and no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry

from deploy.evaluate.labels import Labels, cut
from deploy.evaluate.stream import Int64s, Stream
from model.batch import FeatureBatch
from model.derived import as_served
from model.learner import Learner
from stream.trainer.batching import BatchCutter
from stream.trainer.columns import ExampleColumns
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import DecodedRun
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.training import Training

__all__ = ["Lifts", "Played", "Serving", "play"]

Scores = npt.NDArray[np.float32]

# What a dead letter of an example that can't be learned would name. They are only counted here.
_RECORD: Any = SimpleNamespace(topic="examples", partition=0, offset=0, timestamp=0, key=b"-", value=b"{}", headers=())


@dataclass(frozen=True, slots=True)
class Serving:
    """How impressions are scored.

    every_ms  time between versions, each of which answers until the next one; 0: the learner itself answers
    late_ms   time from learning, or from the capture of a version, until scores know of it
    batch     features to score instead of the stream's own
    """

    name: str = "served"
    every_ms: int = 0
    late_ms: int = 0
    batch: FeatureBatch | None = None


class Lifts(NamedTuple):
    """What row history says of each of F fields (`Learner.lifts`), (N, F).

    served   when the impression was scored; NaN if it was not
    learned  when its first label was learned; NaN if it had none
    """

    served: Scores
    learned: Scores


@dataclass(frozen=True, slots=True)
class Played:
    """What one pass over N impressions and M labels gives.

    scores       (S, N): of each way to serve; NaN before the first version
    captured_ms  (S, N): event time of the weights that gave the score; -1 without a score
    progressive  (M,): the model's score of each label's example just before it learned the label; NaN when it was set aside
    learned      labels learned
    learn_s      seconds of learning, without scoring
    set_aside    examples that could not be learned, because their update was not finite
    table_rows   embedding rows at the end
    lifts        what row history said, if it was asked for
    """

    scores: Scores
    captured_ms: Int64s
    progressive: Scores
    learned: int
    learn_s: float
    set_aside: int
    table_rows: int
    lifts: Lifts | None = None


class _Progressive:
    """Keeps the progressive score of each label (`stream.trainer.training.Observer`)."""

    def __init__(self, count: int) -> None:
        self.scores = np.full(count, np.nan, np.float32)

    def observe(self, batch: ExampleColumns, scores: Scores) -> None:
        self.scores[batch.id_hashes] = scores  # which hold the labels' numbers here


class _Served:
    """The scores of one way to serve, as far as event time has come."""

    def __init__(self, serving: Serving, stream: Stream, start_ms: int, lifts: Scores | None = None) -> None:
        self._serving, self._stream, self._start_ms, self._lifts = serving, stream, start_ms, lifts
        self._batch = as_served(stream.batch if serving.batch is None else serving.batch, stream.schema)
        self.scores = np.full(len(stream), np.nan, np.float32)
        self.captured_ms = np.full(len(stream), -1, np.int64)
        self._done = 0
        self._versions = 0

    def until(self, now_ms: int, learner: Learner) -> None:
        """Score the impressions that are answered by the weights that the learner has had until `now_ms`."""
        every_ms, late_ms = self._serving.every_ms, self._serving.late_ms
        if not every_ms:
            self._score(learner, now_ms + late_ms)
            return
        versions = (now_ms - self._start_ms) // every_ms  # the first is captured one interval after the first label
        if versions <= self._versions:
            return
        newest_ms = self._start_ms + versions * every_ms
        if learner.examples_seen:
            first_ms = self._start_ms + (self._versions + 1) * every_ms
            self._done = max(self._done, int(np.searchsorted(self._stream.shown_ms, first_ms + late_ms)))
            self._score(learner, newest_ms + late_ms + every_ms)
        self._versions = versions

    def finish(self, learner: Learner) -> None:
        """Score what is left and comes after the next version, by the weights that know all labels."""
        every_ms, late_ms = self._serving.every_ms, self._serving.late_ms
        if every_ms:  # what no version was there to answer has no score
            next_ms = self._start_ms + (self._versions + 1) * every_ms
            self._done = max(self._done, int(np.searchsorted(self._stream.shown_ms, next_ms + late_ms)))
        self._score(learner, int(self._stream.shown_ms[-1]) + 1)

    def _score(self, learner: Learner, until_ms: int) -> None:
        shown_ms = self._stream.shown_ms
        start, stop = self._done, int(np.searchsorted(shown_ms, until_ms))
        if stop <= start:
            return
        self.scores[start:stop] = learner.predict(self._batch.slice(start, stop))
        if self._lifts is not None:
            self._lifts[start:stop] = learner.lifts(self._batch.slice(start, stop))
        known_ms = shown_ms[start:stop] - self._serving.late_ms
        every_ms = self._serving.every_ms
        if every_ms:
            known_ms = self._start_ms + (known_ms - self._start_ms) // every_ms * every_ms
        self.captured_ms[start:stop] = known_ms
        self._done = stop


def play(
    stream: Stream,
    labels: Labels,
    learner: Learner,
    *,
    serving: Sequence[Serving] = (Serving(),),
    batch_age_ms: int | None = 500,
    negative_rate: float = 1.0,
    history: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Played:
    """Learn all labels in their order, and score all impressions as scorers would.

    Args:
        learner: nobody else uses it.
        serving: one or more ways to serve, which share the learning.
        batch_age_ms: how long a batch waits for more labels, event time; None: until it is full.
        negative_rate: share of the negatives that `labels` have.
        history: whether to keep what row history says, which needs a learner that has it.
        on_progress: called now and then with the number of labels learned.
    """
    progressive = _Progressive(len(labels))
    training = Training(
        learner,
        BatchCutter(learner.settings.batch_rows, {0: 0}),
        Evaluation(100),
        TrainerMetrics(CollectorRegistry()),
        max_batch_age_s=0.0,
        observers=[progressive],
    )
    lifts = None
    if history:
        lifts = Lifts(*(np.full((len(stream), len(stream.schema.fields)), np.nan, np.float32) for _ in range(2)))
    start_ms = int(labels.known_ms[0])
    served = [
        _Served(each, stream, start_ms, lifts.served if lifts is not None and number == 0 else None)
        for number, each in enumerate(serving)
    ]
    learn_s, set_aside = 0.0, 0
    for rows, now_ms in cut(labels, learner.settings.batch_rows, batch_age_ms):
        for each in served:
            each.until(now_ms, learner)
        if lifts is not None:
            first = labels.rows[rows][~labels.corrects[rows]]
            lifts.learned[first] = learner.lifts(stream.batch.take(first))
        began = time.perf_counter()
        training.add(_run(stream, labels, rows, negative_rate))
        training.step(0.0)  # a batch of any size, since none has to wait for more
        learn_s += time.perf_counter() - began
        set_aside += len(training.take_set_aside())
        if on_progress is not None:
            on_progress(rows.stop)
    for each in served:
        each.finish(learner)
    return Played(
        scores=np.stack([each.scores for each in served]),
        captured_ms=np.stack([each.captured_ms for each in served]),
        progressive=progressive.scores,
        learned=len(labels) - set_aside,
        learn_s=learn_s,
        set_aside=set_aside,
        table_rows=learner.rows,
        lifts=lifts,
    )


def _run(stream: Stream, labels: Labels, rows: slice, negative_rate: float) -> DecodedRun:
    """These labels as the trainer decodes them. The hashes of ids are the labels' numbers: nothing here is drawn by them."""
    shown = labels.rows[rows]
    count = len(shown)
    corrects = labels.corrects[rows]
    numbers = np.arange(rows.start, rows.stop)
    return DecodedRun(
        partition=0,
        after=rows.stop,
        batch=stream.batch.take(shown),
        offsets=numbers,
        labels=labels.labels[rows],
        weights=np.ones(count, np.float32),
        impression_ms=stream.shown_ms[shown],
        reached_ms=stream.shown_ms[shown],
        served=np.full(count, np.nan, np.float32),
        versions=np.full(count, -1, np.int64),
        deltas=np.full(count, -1, np.int64),
        id_hashes=numbers,
        letters=[],
        records=[_RECORD] * count,
        rates=None if negative_rate >= 1 else np.full(count, negative_rate),
        corrects=corrects if corrects.any() else None,
    )
