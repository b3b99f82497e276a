"""Learning: runs are cut into batches and learned, and captured for versions. No threads, no Kafka, no clock."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from model.errors import UpdateNotFinite
from model.features import FeatureBatch
from model.frozen import FrozenModel
from model.rows import ModelDelta
from state.gate_report import GateReport
from stream.records.dead_letter import DeadLetter
from stream.trainer.arrivals import ArrivalSample
from stream.trainer.batching import BatchCutter
from stream.trainer.bookkeeping import Bookkeeping, bookkeeping_state, restore_bookkeeping
from stream.trainer.captured import CapturedDelta, CapturedVersion, Position
from stream.trainer.columns import ExampleColumns
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import DecodedRun
from stream.trainer.judge import Judge
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.past import Past
from stream.trainer.sanity import Sanity
from stream.trainer.skips import Skips

__all__ = ["Learns", "Observer", "Training"]


log = logging.getLogger(__name__)


class Learns(Protocol):
    """What training needs of a `model.learner.Learner`."""

    examples_seen: int
    negative_rate: float

    def learn(
        self,
        batch: FeatureBatch,
        labels: npt.ArrayLike,
        weights: npt.ArrayLike | None = None,
        corrects: npt.ArrayLike | None = None,
        impression_ms: npt.ArrayLike | None = None,
    ) -> npt.NDArray[np.float32]: ...

    def take_delta(self, *, dense: bool = True) -> ModelDelta: ...

    def expect(self, keys: torch.Tensor) -> None: ...

    def freeze(self) -> FrozenModel: ...

    @property
    def touched(self) -> int: ...

    @property
    def digest(self) -> int: ...


class KeepsAnchors(Protocol):
    """`stream.trainer.anchors.Anchors`."""

    def captured(self, position: Position, verdict: GateReport | None) -> None: ...


class Observer(Protocol):
    """Gets every batch that was learned."""

    def observe(self, batch: ExampleColumns, scores: npt.NDArray[np.float32]) -> None:
        """Called once a batch, in the training thread, right after the update.

        Args:
            batch: its columns, which must not be changed.
            scores: float32 (B,), the click probability of each example as the model gave it before the update.
        """
        ...


class Training:
    """Learns batch after batch. For one thread; the attributes may be read in any.

        training.add(run)
        while training.step(time.monotonic()):
            ...
        captured = training.capture_version()

    A batch closes at the cutter's `rows`, or when it has waited `max_batch_age_s` for more examples. That clock runs only while
    there is nothing to learn, so under load batches are cut by count alone and don't depend on how records were fetched.

    A new model keeps the sampling rate of its first example (the first that is no correction). If the stream's rate changes,
    negatives are reweighted by negative_rate / rate.

    A batch whose update isn't finite changes nothing. Its halves are learned instead, and their halves, so that only examples
    that can't be learned alone are set aside. `take_set_aside` gives their dead letters.

    Examples in the ranges of `skips` are not learned, and nothing else sees them. The same goes for those that `past` leaves
    out, since the weights know them from history.

    `observers` and the `judge` get each batch with the scores from before its update. The state of the parts in `bookkeeping`,
    of the evaluation, of the judge and of `sanity` is saved in every version. `anchors` hears of every version.
    """

    def __init__(
        self,
        learner: Learns,
        cutter: BatchCutter,
        evaluation: Evaluation,
        metrics: TrainerMetrics,
        *,
        max_batch_age_s: float,
        watermark_ms: int = 0,
        observers: Sequence[Observer] = (),
        bookkeeping: Mapping[str, Bookkeeping] | None = None,
        judge: Judge | None = None,
        skips: Skips | None = None,
        sanity: Sanity | None = None,
        anchors: KeepsAnchors | None = None,
        past: Past | None = None,
    ) -> None:
        self._learner, self._cutter, self._evaluation, self._metrics = learner, cutter, evaluation, metrics
        self._judge, self._anchors, self._skips, self._past = judge, anchors, skips, past
        self._sanity = Sanity(judge) if sanity is None else sanity
        checks = (judge, self._sanity.shift, self._sanity.drift)
        self._observers = (*observers, *(each for each in checks if each is not None))
        parts = {"gate": judge, "shift": self._sanity.shift, "drift": self._sanity.drift}
        judged = {name: part for name, part in parts.items() if part is not None}
        self._bookkeeping: dict[str, Bookkeeping] = {"scores": evaluation, **judged, **(bookkeeping or {})}
        self._max_batch_age_s = max_batch_age_s
        self._waiting_since: float | None = None
        self._set_aside: list[DeadLetter] = []
        self._arrivals = ArrivalSample()
        self._dense_taken_at: int | None = None  # examples seen by the dense weights that scorers get; None: they get none yet
        self.batches = 0
        self.watermark_ms = watermark_ms

    @property
    def positions(self) -> dict[int, int]:
        """Next offset to train, by partition."""
        return self._cutter.positions

    @property
    def examples_seen(self) -> int:
        """Examples in the weights, those before a restart included."""
        return self._learner.examples_seen

    def restore(self, bookkeeping: Mapping[str, torch.Tensor]) -> None:
        """Restore what a version holds besides the model (`stream.trainer.bookkeeping`).

        To be called before the first batch.
        """
        restore_bookkeeping(self._bookkeeping, bookkeeping)

    def add(self, run: DecodedRun) -> None:
        """Take a run, which `step` will learn, without the examples that are left out."""
        kept = run if self._skips is None else self._skips.cut(run)
        if kept is not run:
            self._metrics.skipped_examples.inc(len(run) - len(kept))
        if self._past is not None:
            before, kept = len(kept), self._past.cut(kept)
            self._metrics.past_examples.inc(before - len(kept))
        self._cutter.add(kept)

    def step(self, now_s: float, *, more_at_hand: bool = False) -> bool:
        """Learn one batch if one is due.

        Args:
            now_s: monotonic seconds.
            more_at_hand: whether a run is waiting to be added. A batch that isn't full then stays open.
        """
        waiting = self._cutter.waiting
        if waiting < self._cutter.rows:
            if not waiting:
                self._waiting_since = None
                return False
            if more_at_hand:
                return False
            if self._waiting_since is None:
                self._waiting_since = now_s
            if now_s - self._waiting_since < self._max_batch_age_s:
                return False
        self._waiting_since = None
        self._learn(self._cutter.cut())
        return True

    def due_in_s(self, now_s: float) -> float | None:
        """Seconds until the open batch closes by its age; None when no clock runs."""
        if self._waiting_since is None:
            return None
        return max(0.0, self._waiting_since + self._max_batch_age_s - now_s)

    def take_set_aside(self) -> list[DeadLetter]:
        """Dead letters of examples set aside since the last call. To be handed over before the next capture."""
        letters, self._set_aside = self._set_aside, []
        return letters

    def _learn(self, batch: ExampleColumns) -> None:
        before = len(self._set_aside)
        if not self._learner.examples_seen:
            self._learner.negative_rate = _first_rate(batch)
        self._learn_or_halve(batch)
        self.batches += 1
        letters = self._set_aside[before:]
        if letters:
            self._metrics.not_finite_batches.inc()
            where = ", ".join(f"{letter.topic} partition {letter.partition} offset {letter.offset}" for letter in letters)
            log.error("an update of %d examples was not finite; set aside, the others are learned: %s", len(batch), where)

    def _learn_or_halve(self, batch: ExampleColumns) -> None:
        """Learn a batch. If its update isn't finite, learn its halves, and set aside examples that fail alone."""
        began = time.perf_counter()
        try:
            scores = self._learner.learn(batch.batch, batch.labels, self._weights(batch), batch.corrects, batch.impression_ms)
        except UpdateNotFinite as error:
            if len(batch) == 1:
                self._set_aside.append(DeadLetter.of(batch.records[0], "not_finite_update", "$", str(error)))
                return
            half = len(batch) // 2
            self._learn_or_halve(batch.slice(0, half))
            self._learn_or_halve(batch.slice(half, len(batch)))
            return
        self._evaluation.add(scores, batch)
        for observer in self._observers:
            observer.observe(batch, scores)
        self._arrivals.add(batch)
        self.watermark_ms = max(self.watermark_ms, int(batch.reached_ms.max()))
        self._metrics.learned(batch, time.perf_counter() - began)

    def _weights(self, batch: ExampleColumns) -> npt.NDArray[np.float32] | None:
        """The weight of each example's loss, so that negatives count at the model's own rate; None when all weights are 1.

        The label that a correction takes back is counted at the model's own rate already (`model.slopes`).
        """
        rate = self._learner.negative_rate
        if batch.rates is None and rate == 1:
            return batch.weights
        rates = np.ones(len(batch)) if batch.rates is None else batch.rates
        as_it_is = batch.labels > 0.5
        if batch.corrects is not None:
            as_it_is |= batch.corrects
        factors = np.where(as_it_is, 1.0, rate / rates).astype(np.float32)
        if (factors == 1).all():
            return batch.weights
        return factors if batch.weights is None else factors * batch.weights

    @property
    def _dense_is_old(self) -> bool:
        """Whether examples were learned since the dense weights that scorers get."""
        return self._dense_taken_at != self._learner.examples_seen

    @property
    def withheld(self) -> bool:
        """Whether the gate withholds what is learned."""
        return self._judge is not None and self._judge.report().flow == "withheld"

    def capture_delta(self, *, dense: bool = True) -> CapturedDelta | None:
        """What changed since the delta before. To be called between two batches.

        None while the gate withholds what is learned, when nothing has changed, and when the delta isn't sane
        (`stream.trainer.sanity`). What was touched is then part of a later delta.

        Args:
            dense: whether the delta carries the dense weights. The first one does in any case, and so does the next one after
                deltas were withheld.
        """
        if not self._learner.touched and not self._dense_is_old:
            return None
        began = time.perf_counter()
        may_leave = self._sanity.may_leave(self.watermark_ms)
        self._metrics.checked(self._sanity.score_shift, in_doubt=self._sanity.in_doubt)
        if self._sanity.drift is not None:
            self._metrics.drifted(self._sanity.drift)
        if not may_leave:
            self._dense_taken_at = None  # rows that were withheld for an hour must not meet dense weights of before that
            return None
        dense = dense or self._dense_taken_at is None
        if not self._learner.touched and not dense:
            return None
        delta = self._learner.take_delta(dense=dense)
        passes = self._sanity.passes(delta, self.watermark_ms)
        if dense:
            self._dense_taken_at = self._learner.examples_seen if passes else None
        if not passes:
            self._learner.expect(torch.cat((delta.rows.keys, delta.gone)))
            self._metrics.deltas.labels("withheld").inc()
            return None
        self._metrics.snapshot_seconds.labels("capture_delta").observe(time.perf_counter() - began)
        return CapturedDelta(delta, self._position(), self._arrivals.take())

    def caught_up(self) -> None:
        """What is learned is as far as what scorers have. To be called between two batches, after a restart."""
        self._sanity.caught_up()

    def release(self, operation: str, who: str, why: str) -> None:
        """An operator releases what is withheld: the next delta has all that has changed. To be called between two batches."""
        if self._judge is not None and self._judge.release(operation, who, why):
            self._sanity.forget()

    def capture_version(self) -> CapturedVersion:
        """Everything that a version holds. To be called between two batches.

        The pause doesn't grow with the table: its rows are copied while training goes on (`model.frozen`).
        """
        withheld = self.withheld
        delta = self.capture_delta()
        began = time.perf_counter()
        bookkeeping = bookkeeping_state(self._bookkeeping)
        verdict = (
            None if self._judge is None else self._judge.report()
        )  # after its state was taken: then it knows every example
        if verdict is not None:
            verdict = self._sanity.said(verdict)
        position = self._position()
        captured = CapturedVersion(
            frozen=self._learner.freeze(),
            bookkeeping=bookkeeping,
            evaluation=self._evaluation.freeze(),
            verdict=verdict,
            position=position,
            delta=delta,
            on_chain=not withheld and not self._learner.touched and not self._dense_is_old,
            digest=self._learner.digest,
        )
        if self._anchors is not None:
            self._anchors.captured(position, verdict)
        self._metrics.snapshot_seconds.labels("capture").observe(time.perf_counter() - began)
        return captured

    def _position(self) -> Position:
        return Position(
            offsets=dict(self._cutter.positions),
            watermark_ms=self.watermark_ms,
            examples_seen=self._learner.examples_seen,
            negative_rate=self._learner.negative_rate,
            letters=self._cutter.letters,
            at_ms=time.time_ns() // 1_000_000,
        )


def _first_rate(batch: ExampleColumns) -> float:
    """The sampling rate in the first example that is no correction, else in the first correction."""
    if batch.rates is None:
        return 1.0
    first = 0 if batch.corrects is None else int(np.argmin(batch.corrects))
    return float(batch.rates[first])
