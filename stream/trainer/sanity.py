"""Checks of each delta alone: weights that are finite and not too large, scores that vary, scores and a stream that don't jump.

A delta that fails is a *doubt*: the gate withholds what is learned, and training goes on. The doubt ends by itself

- with the first delta that passes;
- for scores that jumped and stay there, and for a stream that has changed abruptly and stays so (`stream.trainer.drift`), once
  `anchor_age_ms` of event time have passed, and the blocks of clicks don't show the live weights to be worse than the anchor.
  Then it is the world that has changed.

An operator may end it before. The delta that leaves then has all that has changed meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec
import torch

from model.rows import ModelDelta
from state.gate_report import GateReport
from state.settings import SnapshotSettings
from stream.trainer.drift import Drift
from stream.trainer.judge import Judge
from stream.trainer.score_shift import ScoreShift

__all__ = ["LARGEST_WEIGHT", "Sanity", "delta_problems", "weight_problems"]

log = logging.getLogger(__name__)

# Weights of a healthy model lie below 10, and a logit of 30 is a certainty in float32. Products of larger weights than this
# leave float32's range within a few layers.
LARGEST_WEIGHT = 1e6

# Share of the limit to which scores must come back before deltas flow again. At the limit itself they would flow and stop in
# turns: from one delta to the next the mean of 64 differences changes by a tenth of the limit.
BACK = 0.75

# How many times the usual shift a shift may be, where that is more than `score_shift_limit`.
TIMES_USUAL = 4.0


def weight_problems(serving: Mapping[str, torch.Tensor]) -> list[str]:
    """What is wrong: tensors, by name, that aren't finite or hold a weight beyond `LARGEST_WEIGHT`. Empty when nothing is."""
    problems = []
    for name, tensor in sorted(serving.items()):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = torch.aminmax(tensor)
        largest = max(abs(float(low)), abs(float(high)))
        if not bool(torch.isfinite(low + high)):
            problems.append(f"weights not finite: {name}")
        elif largest > LARGEST_WEIGHT:
            problems.append(f"weights too large: {name} holds {largest:.3g}, expected at most {LARGEST_WEIGHT:g}")
    return problems


def delta_problems(delta: ModelDelta) -> list[str]:
    """What is wrong with the weights of a delta, as `weight_problems` says it."""
    return weight_problems({**(delta.dense or {}), "embedding": delta.rows.embedding, "first_order": delta.rows.first_order})


class Sanity:
    """Says whether a delta may leave, and tells the judge. For the training thread.

    Args:
        judge: what withholds; without one, only the weights are checked.
        shift: how far scores have shifted; None: not checked.
        drift: whether the stream has changed abruptly; None: not checked.
    """

    def __init__(
        self,
        judge: Judge | None,
        shift: ScoreShift | None = None,
        settings: SnapshotSettings | None = None,
        *,
        drift: Drift | None = None,
    ) -> None:
        self._judge, self.shift, self.drift = judge, shift, drift
        self._settings = settings or SnapshotSettings()
        self._problems: tuple[str, ...] = ()  # of the weights in the last delta that was taken

    @property
    def score_shift(self) -> float | None:
        """How far scores have shifted, as last measured."""
        return None if self.shift is None else self.shift.last

    @property
    def in_doubt(self) -> bool:
        """Whether deltas are withheld because one of them wasn't sane."""
        return self._judge is not None and self._judge.doubt is not None

    def may_leave(self, watermark_ms: int) -> bool:
        """Whether a delta may be taken now: nothing withholds it, its scores vary and haven't jumped, nor has the stream."""
        judge, shift = self._judge, self.shift
        if judge is None:
            return True
        if judge.flow == "withheld":
            if judge.doubt is None and shift is not None:
                # What is served gets old, and the clicks say when the weights are fine again.
                shift.forget()
            return False
        if wrong := judge.problems():
            judge.question("; ".join(wrong), watermark_ms)
            return False
        is_young = judge.anchor is None  # without an anchor the blocks of clicks don't judge either: it learns fast
        if self.drift is not None and self.drift.problem:
            if is_young:
                self.drift.accept()
            elif not self._has_settled(watermark_ms):
                judge.question(self.drift.problem, watermark_ms)
                return False
        low, high = (0.0, 0.0) if self.drift is None else self.drift.explained
        found = None if shift is None else shift.measure(low, high)
        limit = self._limit * (1.0 if judge.doubt is None else BACK)
        if found is not None and found > limit and not is_young and not self._has_settled(watermark_ms):
            judge.question(
                f"scores of recent requests have shifted by {found:.2f} logits on average (allowed {limit:.2g})",
                watermark_ms,
            )
            return False
        return True

    @property
    def _limit(self) -> float:
        """The largest shift that is right, in logits. A model that learns by large steps shifts more than others."""
        usual = 0.0 if self.shift is None else self.shift.usual
        return max(self._settings.score_shift_limit, TIMES_USUAL * usual)

    def _has_settled(self, watermark_ms: int) -> bool:
        """Whether what is in doubt came so long ago that the blocks of clicks would have shown that the weights are worse."""
        doubt = None if self._judge is None else self._judge.doubt
        return doubt is not None and watermark_ms - doubt.watermark_ms >= self._settings.anchor_age_ms

    def passes(self, delta: ModelDelta, watermark_ms: int) -> bool:
        """Whether the weights of a delta are sane. If they are, the live weights count as served."""
        self._problems = tuple(delta_problems(delta))
        if self._problems:
            problems = "; ".join(self._problems)
            if self._judge is None:
                log.error("a delta of %d rows is withheld: %s", len(delta.rows), problems)
            else:
                self._judge.question(problems, watermark_ms)
            return False
        if self._judge is not None and self._judge.doubt is not None:
            self._judge.trust("the weights and their scores pass the checks of a delta")
            if (self.score_shift or 0.0) > self._limit and self.shift is not None:
                self.shift.forget()
            if self.drift is not None:
                self.drift.accept()  # if it hasn't gone by itself, it has settled
        if self.shift is not None:
            self.shift.served()
        return True

    def caught_up(self) -> None:
        """The live weights are as those that scorers have: a trainer that restarted has learned again what was published.

        Between its version and there may be a hundred thousand examples. Scores shift by more over so many than over the two
        thousand between two deltas, and the trainer before this one has checked each delta on the way.
        """
        if self._judge is not None:
            self._judge.trust("the trainer before this one has published what was learned since")
        self.forget()
        if self.shift is not None:
            self.shift.served()

    def forget(self) -> None:
        """The live weights are served next, whatever has shifted or drifted."""
        if self.shift is not None:
            self.shift.forget()
        if self.drift is not None:
            self.drift.accept()

    def said(self, verdict: GateReport) -> GateReport:
        """The gate's report with what is wrong with the weights."""
        problems = (*verdict.problems, *self._problems)
        return msgspec.structs.replace(verdict, problems=problems, score_shift=self.score_shift)
