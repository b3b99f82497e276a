"""How good the scores are, as the labels come in.

There are two kinds of scores:

- progressive: the model's own score of each example, taken just before the model learns it. So it is taken when the label
  arrives, after the model has learned the examples between impression and label. It reads all features as they were sent;
- served: the score that the impression carries from the moment it was shown. It knows nothing of those examples, and fields
  with `serve_as` had that value.

Metrics of both kinds describe the stream before negatives were left out: a negative that was sent at rate r counts 1 / r times.

- A correction to 1 adds its click and takes back one negative, whether or not the negative of its impression was sent. That is
  right on average: the negative was sent with probability r, and then counted 1 / r times. At rate 1 it is exact for the served
  score, which is the same in the first label and in the correction.
- A correction to 0 adds a negative and takes back one click. Clicks are sent at any rate.
- The progressive score taken back is that of the correction, since the first label's isn't kept.

There are three scopes: `window` (the last examples), `total` (since the model began) and, if it is configured, `evaluation`
(since an event time: "the last 80 % of the stream"). All are saved in the versions, so a restart goes on with them.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from model.metrics import Metrics, ProgressiveMetrics, auc
from stream.trainer.bookkeeping import from_json, to_json
from stream.trainer.columns import ExampleColumns

__all__ = ["Evaluation", "FrozenEvaluation", "Kind", "Report", "Scope", "counts", "manifest_metrics"]

Kind = Literal["progressive", "served"]
Scope = Literal["window", "total", "evaluation"]
Report = Mapping[tuple[Kind, Scope], Metrics]

# Examples gathered before the sums are updated, since counting a small batch costs more than gathering it.
GATHERED = 4_096
# Scores kept for an exact AUC in the scope `evaluation`: 20 MB. Beyond, and after a restart, the AUC comes from bins (within
# 1e-4).
EXACT_EXAMPLES = 2_000_000
_EXACT = np.dtype([("score", np.float32), ("weight", np.float32), ("label", np.bool_), ("corrects", np.bool_)])


class _SinceTime:
    """Metrics since an event time. The AUC is exact up to `EXACT_EXAMPLES` examples, if there was no restart."""

    def __init__(self) -> None:
        self._sums = ProgressiveMetrics(1)
        self._rows = np.empty(GATHERED, _EXACT)
        self._kept = 0
        self._all_kept = True

    def update(
        self,
        scores: npt.NDArray[np.float32],
        labels: npt.NDArray[np.float32],
        weights: npt.NDArray[np.float32],
        corrects: npt.NDArray[np.bool_],
    ) -> None:
        self._sums.update(scores, labels, weights, corrects)
        after = self._kept + len(scores)
        if not self._all_kept or after > EXACT_EXAMPLES:
            self._all_kept = False
            return
        if after > len(self._rows):
            # A new array, so that what `frozen` has handed out stays as it was.
            room = max(after, 2 * len(self._rows))
            self._rows = np.concatenate([self._rows[: self._kept], np.empty(room - self._kept, _EXACT)])
        new = self._rows[self._kept : after]
        new["score"], new["weight"], new["label"], new["corrects"] = scores, weights, labels > 0.5, corrects
        self._kept = after

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        return self._sums.state()

    def restore(self, state: Mapping[str, npt.NDArray[np.generic]]) -> None:
        """Go on from a version's sums. Single scores aren't saved, so the AUC comes from bins from then on."""
        self._sums.restore(state)
        self._all_kept = self._sums.total().examples == 0

    def frozen(self) -> _SinceTime:
        """A copy of the present state. It is cheap, since kept scores are only ever appended to."""
        twin = copy.copy(self)
        twin._sums = copy.deepcopy(self._sums)
        return twin

    def metrics(self) -> Metrics:
        total = self._sums.total()
        if not self._all_kept:
            return total
        rows = self._rows[: self._kept]
        return replace(total, auc=auc(rows["score"], rows["label"], rows["weight"], rows["corrects"]))


@dataclass(frozen=True, slots=True)
class FrozenEvaluation:
    """The evaluation up to one moment. `report` may take long, and can be called in any thread."""

    counted: Mapping[Kind, ProgressiveMetrics]
    evaluated: Mapping[Kind, _SinceTime]

    def report(self) -> Report:
        """All metrics of both kinds in every scope."""
        report: dict[tuple[Kind, Scope], Metrics] = {}
        for kind, counted in self.counted.items():
            report[kind, "window"], report[kind, "total"] = counted.window(), counted.total()
        for kind, evaluated in self.evaluated.items():
            report[kind, "evaluation"] = evaluated.metrics()
        return report


class Evaluation:
    """Counts scored examples. `add` is for the training thread, `freeze` for any.

    Args:
        window: examples in the scope `window`.
        evaluation_from_ms: event time from which examples count in the scope `evaluation`; without it there is no such scope.
    """

    def __init__(self, window: int, evaluation_from_ms: int | None = None) -> None:
        kinds: tuple[Kind, Kind] = ("progressive", "served")
        self._lock = threading.Lock()
        self._from_ms = evaluation_from_ms
        self._window = window
        self._counted: dict[Kind, ProgressiveMetrics] = {kind: ProgressiveMetrics(window) for kind in kinds}
        self._evaluated: dict[Kind, _SinceTime] = {} if evaluation_from_ms is None else {kind: _SinceTime() for kind in kinds}
        self._gathered: list[tuple[npt.NDArray[np.float32], ExampleColumns]] = []
        self._rows = 0

    def add(self, scores: npt.NDArray[np.float32], batch: ExampleColumns) -> None:
        """Count the examples of a batch, with the scores that the model gave them before it learned them."""
        with self._lock:
            self._gathered.append((scores, batch))
            self._rows += len(batch)
            if self._rows >= GATHERED:
                self._count()

    def freeze(self) -> FrozenEvaluation:
        """Everything added so far."""
        with self._lock:
            self._count()
            return FrozenEvaluation(
                {kind: copy.deepcopy(counted) for kind, counted in self._counted.items()},
                {kind: evaluated.frozen() for kind, evaluated in self._evaluated.items()},
            )

    def state(self) -> dict[str, torch.Tensor]:
        """Everything added so far, for `restore` (`stream.trainer.bookkeeping.Bookkeeping`)."""
        with self._lock:
            self._count()
            parts = {(kind, "counted"): counted.state() for kind, counted in self._counted.items()}
            parts |= {(kind, "evaluated"): evaluated.state() for kind, evaluated in self._evaluated.items()}
        tensors = {
            f"{kind}.{scope}.{name}": torch.from_numpy(array)
            for (kind, scope), arrays in parts.items()
            for name, array in arrays.items()
        }
        return {"evaluation_from_ms": to_json(self._from_ms), **tensors}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` gave.

        If the setting `evaluation_from_ms` has changed, that scope begins again from nothing.
        """
        same_evaluation = from_json(state.get("evaluation_from_ms")) == self._from_ms
        counted: dict[Kind, ProgressiveMetrics] = {kind: ProgressiveMetrics(self._window) for kind in self._counted}
        evaluated: dict[Kind, _SinceTime] = {kind: _SinceTime() for kind in self._evaluated}
        for kind, metrics in counted.items():
            metrics.restore(_under(state, f"{kind}.counted."))
        for kind, evaluation in evaluated.items():
            if same_evaluation:
                evaluation.restore(_under(state, f"{kind}.evaluated."))
        with self._lock:
            self._counted, self._evaluated = counted, evaluated

    def _count(self) -> None:
        if not self._gathered:
            return
        gathered, self._gathered, self._rows = self._gathered, [], 0
        labels = np.concatenate([batch.labels for _, batch in gathered])
        weights = np.concatenate([counts(batch) for _, batch in gathered])
        corrects = np.concatenate(
            [np.zeros(len(batch), np.bool_) if batch.corrects is None else batch.corrects for _, batch in gathered]
        )
        served = np.concatenate([batch.served for _, batch in gathered])
        progressive = np.concatenate([scores for scores, _ in gathered])
        pairs: tuple[tuple[Kind, npt.NDArray[np.float32]], ...] = (("progressive", progressive), ("served", served))
        for kind, scores in pairs:
            there = ~np.isnan(scores)
            self._counted[kind].update(scores[there], labels[there], weights[there], corrects[there])
            if self._from_ms is not None:
                there &= np.concatenate([batch.impression_ms for _, batch in gathered]) >= self._from_ms
                self._evaluated[kind].update(scores[there], labels[there], weights[there], corrects[there])


def _under(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, npt.NDArray[np.generic]]:
    return {name.removeprefix(prefix): tensor.numpy() for name, tensor in state.items() if name.startswith(prefix)}


def counts(batch: ExampleColumns) -> npt.NDArray[np.float32]:
    """How often each example counts: its weight, divided for a negative by the rate at which negatives were sent."""
    weights = np.ones(len(batch), np.float32) if batch.weights is None else batch.weights
    if batch.rates is None:
        return weights
    sent_at_any_rate = batch.labels > 0.5
    if batch.corrects is not None:
        sent_at_any_rate |= batch.corrects
    return np.where(sent_at_any_rate, weights, weights / batch.rates).astype(np.float32)


_PREFIXES: dict[tuple[Kind, Scope], str] = {
    ("progressive", "window"): "window",
    ("progressive", "total"): "total",
    ("progressive", "evaluation"): "evaluation",
    ("served", "window"): "served",
    ("served", "total"): "served_total",
    ("served", "evaluation"): "evaluation_served",
}


def manifest_metrics(report: Report) -> dict[str, float]:
    """Flat names, as manifests carry them: `window_auc`, `served_calibration`, `evaluation_served_ne`, …

    A scope without examples has only the count. Metrics that aren't defined, like the AUC of a window without a click, are NaN.
    """
    flat: dict[str, float] = {}
    for (kind, scope), metrics in report.items():
        prefix = _PREFIXES[kind, scope]
        flat[f"{prefix}_examples"] = metrics.examples
        if metrics.examples:
            flat[f"{prefix}_log_loss"] = metrics.log_loss
            flat[f"{prefix}_auc"] = metrics.auc
            flat[f"{prefix}_ne"] = metrics.normalised_entropy
            flat[f"{prefix}_calibration"] = metrics.calibration
    # The loss is NaN when all examples have weight 0. That is no sign of a broken model, so the loss is left out.
    return {name: value for name, value in flat.items() if not (name.endswith("log_loss") and math.isnan(value))}
