"""Quality of scores: log loss, AUC, normalised entropy and calibration, over arrays and over a moving window.

Log loss and AUC have their usual definitions; normalised entropy and calibration those of He et al., "Practical Lessons from
Predicting Clicks on Ads at Facebook" (ADKDD 2014), section 3. A metric is NaN where it isn't defined: AUC without both a
positive and a negative, normalised entropy where all labels are equal, calibration without a positive, and all of them without
examples.

A label may *correct* an earlier label: a late click corrects a negative, and a click that was found invalid is corrected to a
negative. A correction counts with its own label, and removes one example of the other label with the correction's score and
weight. So every impression counts once in the end, with its latest label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from model.errors import ModelError

__all__ = ["Metrics", "ProgressiveMetrics", "auc", "calibration", "log_loss", "measure", "normalised_entropy"]

Float64Array = npt.NDArray[np.float64]

# An example in the ring buffer of the window.
_ROW = np.dtype([("score", np.float32), ("label", np.float32), ("weight", np.float32), ("corrects", np.bool_)])

_CLIP = 1e-7
"""Scores are clipped this far from 0 and 1, where a wrong label would cost an infinite loss; below it float32 has no 1 - p."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Metrics of `examples` examples, of which `positives` are clicked after all corrections. Corrections aren't examples."""

    examples: int
    positives: int
    log_loss: float
    auc: float
    normalised_entropy: float
    calibration: float


def auc(
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    corrects: npt.ArrayLike | None = None,
) -> float:
    """Area under the ROC curve, exact: how often a positive scores above a negative, with ties as one half.

    A pair of examples counts with the product of their weights.
    """
    p, y, w = _arrays(scores, labels, weights)
    back = _taken_back(w, corrects)
    if not len(p):
        return float("nan")
    order = np.argsort(p, kind="stable")
    p, clicked, w, back = p[order], y[order] > 0.5, w[order], back[order]
    starts = np.flatnonzero(np.concatenate(([True], p[1:] != p[:-1])))
    positive = np.add.reduceat(np.where(clicked, w, -back), starts)  # weight of each distinct score
    negative = np.add.reduceat(np.where(clicked, -back, w), starts)
    return _area(negative, positive)


def _area(negative: Float64Array, positive: Float64Array) -> float:
    """AUC from the weights of negatives and of positives (N,) at each of N rising scores."""
    negatives, positives = negative.sum(), positive.sum()
    # A sum is below 0 if a window has a correction and no longer the label that it takes back.
    if negatives <= 0 or positives <= 0:
        return float("nan")
    below = np.cumsum(negative) - negative
    # The weight at a single score is below 0 if a correction has another score than the label that it takes back.
    return float(np.clip((positive * (below + negative / 2)).sum() / (negatives * positives), 0, 1))


def log_loss(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Mean negative log likelihood, in nats, with scores kept within 1e-7 of 0 and 1."""
    p, y, w = _arrays(scores, labels, weights)
    return _ratio(float(_losses(p, y) @ w), float(w.sum()))


def normalised_entropy(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Log loss over the log loss of always predicting the base rate (equation 1). Below 1 the scores beat it."""
    p, y, w = _arrays(scores, labels, weights)
    return _ratio(float(_losses(p, y) @ w), _base_loss(float(y @ w), float(w.sum())))


def calibration(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Expected over observed positives: 1 is right, at 2 the scores predict twice as many clicks as there were."""
    p, y, w = _arrays(scores, labels, weights)
    return _ratio(float(p @ w), float(y @ w))


def measure(
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    corrects: npt.ArrayLike | None = None,
) -> Metrics:
    """All metrics of B scores; `corrects` (B,) bool says which labels are corrections.

    Raises ModelError for a score or label that isn't a number from 0 to 1.
    """
    p, y, w = _arrays(scores, labels, weights)
    back = _taken_back(w, corrects)
    return _metrics(len(p) - _count(corrects), _positives(y, corrects), _sums(p, y, w, back), auc(p, y, w, corrects))


class ProgressiveMetrics:
    """Metrics of a stream of scored examples: over the last `window` examples, and over all since the start.

        metrics = ProgressiveMetrics(window=100_000)
        metrics.update(learner.learn(batch, labels), labels)
        metrics.window().auc, metrics.total().log_loss

    The window's metrics are exact, from float32 scores. For the whole stream only sums are kept. Its AUC is computed from bins
    of the score's log odds, 256 bins for each unit, and is within 1e-4 of the exact AUC. (Bins of equal width in the score
    itself would put all scores of a stream with a CTR of 0.01 % into a handful of bins.)
    """

    _BINS_A_UNIT = 256
    _BINS = 2 * math.ceil(-math.log(_CLIP) * _BINS_A_UNIT)  # log odds of the clipped scores: -16.1 to 16.1

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ModelError(f"window: expected 1 example or more, found {window}")
        self._ring = np.zeros(window, _ROW)
        self._filled = 0
        self._next = 0
        self._examples = 0
        self._positives = 0
        self._sums = np.zeros(4)  # see `_Sums`
        self._bins = np.zeros((2, self._BINS))  # weights of negatives and of positives, by bin of the score

    def update(
        self,
        scores: npt.ArrayLike,
        labels: npt.ArrayLike,
        weights: npt.ArrayLike | None = None,
        corrects: npt.ArrayLike | None = None,
    ) -> None:
        """Adds B scored examples; arguments and errors are those of `measure`."""
        p, y, w = _arrays(scores, labels, weights)
        back = _taken_back(w, corrects)
        self._examples += len(p) - _count(corrects)
        self._positives += _positives(y, corrects)
        self._sums += _sums(p, y, w, back)
        clicked = y > 0.5
        at = self._bin_of(p)
        bins = np.bincount(at + self._BINS * clicked, w, minlength=2 * self._BINS)
        if back.any():
            bins -= np.bincount(at + self._BINS * ~clicked, back, minlength=2 * self._BINS)
        self._bins += bins.reshape(2, self._BINS)
        rows = np.empty(len(p), _ROW)
        rows["score"], rows["label"], rows["weight"] = p, y, w
        rows["corrects"] = False if corrects is None else np.asarray(corrects, np.bool_)
        self._keep(rows)

    def _keep(self, rows: npt.NDArray[np.void]) -> None:
        size = len(self._ring)
        kept = rows[-size:]
        self._ring[(self._next + np.arange(len(kept))) % size] = kept
        self._next = (self._next + len(kept)) % size
        self._filled = min(size, self._filled + len(kept))

    def _bin_of(self, p: Float64Array) -> npt.NDArray[np.int64]:
        kept = np.clip(p, _CLIP, 1 - _CLIP)
        odds = np.floor(np.log(kept / (1 - kept)) * self._BINS_A_UNIT).astype(np.int64) + self._BINS // 2
        return np.clip(odds, 0, self._BINS - 1)

    def window(self) -> Metrics:
        """Metrics of the last examples, at most `window` of them."""
        rows = self._ring[: self._filled]
        return measure(rows["score"], rows["label"], rows["weight"], rows["corrects"])

    def total(self) -> Metrics:
        """Metrics of all examples so far."""
        return _metrics(self._examples, self._positives, _Sums(*self._sums.tolist()), _area(*self._bins))

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The state for `restore`: copies, as arrays by name."""
        rows = np.roll(self._ring[: self._filled], -self._next if self._filled == len(self._ring) else 0)  # oldest first
        return {
            "counts": np.array([self._examples, self._positives]),
            "sums": self._sums.copy(),
            "bins": self._bins.copy(),
            **{name: rows[name].copy() for name in _ROW.names or ()},
        }

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replaces all that was counted so far by a saved state. A smaller window keeps its last examples.

        Raises:
            ModelError: an array is missing or has another shape, as in a state of another release; nothing has changed then.
        """
        rows = np.zeros(len(state["score"]) if "score" in state else 0, _ROW)
        wanted = {"counts": (2,), "sums": (4,), "bins": self._bins.shape, **dict.fromkeys(_ROW.names or (), rows.shape)}
        for name, shape in wanted.items():
            if name not in state or state[name].shape != shape:
                found = f"shape {state[name].shape}" if name in state else "nothing"
                raise ModelError(f"saved metrics: {name}: expected shape {shape}, found {found}")
        for name in _ROW.names or ():
            rows[name] = state[name]
        self._filled = self._next = 0
        self._keep(rows)
        self._examples, self._positives = (int(count) for count in state["counts"])
        self._sums[:], self._bins[:] = state["sums"], state["bins"]


def _arrays(
    scores: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None
) -> tuple[Float64Array, Float64Array, Float64Array]:
    p, y = np.asarray(scores, np.float64), np.asarray(labels, np.float64)
    w = np.ones(len(p)) if weights is None else np.asarray(weights, np.float64)
    if not p.shape == y.shape == w.shape or p.ndim != 1:
        raise ModelError(f"metrics: expected scores, labels and weights of one length, found {p.shape}, {y.shape}, {w.shape}")
    for name, array in (("scores", p), ("labels", y)):
        wrong = np.flatnonzero(~((array >= 0) & (array <= 1)))
        if len(wrong):
            raise ModelError(f"{name}: expected numbers from 0 to 1, found {array[wrong[0]]} in row {wrong[0]}")
    wrong = np.flatnonzero(~((w >= 0) & np.isfinite(w)))
    if len(wrong):
        raise ModelError(f"weights: expected finite numbers, 0 or more, found {w[wrong[0]]} in row {wrong[0]}")
    return p, y, w


def _taken_back(w: Float64Array, corrects: npt.ArrayLike | None) -> Float64Array:
    """Weight (N,) of the opposite label that each example removes: 0 but for corrections."""
    return np.zeros(len(w)) if corrects is None else w * np.asarray(corrects, np.float64)


def _count(corrects: npt.ArrayLike | None) -> int:
    return 0 if corrects is None else int(np.count_nonzero(corrects))


def _positives(y: Float64Array, corrects: npt.ArrayLike | None) -> int:
    """How many impressions are positive after these labels: a correction to a negative removes one."""
    clicked = y > 0.5
    return int(clicked.sum()) - (0 if corrects is None else int((~clicked & np.asarray(corrects, np.bool_)).sum()))


class _Sums(NamedTuple):
    """Sums over examples, each multiplied by its weight."""

    loss: float
    weight: float
    label: float
    score: float


def _metrics(examples: int, positives: int, sums: _Sums, area: float) -> Metrics:
    return Metrics(
        examples=examples,
        positives=positives,
        log_loss=_ratio(sums.loss, sums.weight),
        auc=area,
        normalised_entropy=_ratio(sums.loss, _base_loss(sums.label, sums.weight)),
        calibration=_ratio(sums.score, sums.label),
    )


def _sums(p: Float64Array, y: Float64Array, w: Float64Array, back: Float64Array) -> _Sums:
    """Sums over examples; `back` (N,) is the weight of the opposite label that is removed (`_taken_back`)."""
    loss, weight, label, score = _losses(p, y) @ w, w.sum(), y @ w, p @ w
    if back.any():
        loss, weight = loss - _losses(p, 1 - y) @ back, weight - back.sum()
        label, score = label - (1 - y) @ back, score - p @ back
    return _Sums(float(loss), float(weight), float(label), float(score))


def _losses(p: Float64Array, y: Float64Array) -> Float64Array:
    kept = np.clip(p, _CLIP, 1 - _CLIP)
    return np.asarray(-(y * np.log(kept) + (1 - y) * np.log1p(-kept)))


def _base_loss(positives: float, weight: float) -> float:
    """Summed loss of always predicting the base rate; 0 where all labels are equal."""
    negatives = weight - positives
    if positives <= 0 or negatives <= 0:
        return 0.0
    return float(-(positives * np.log(positives / weight) + negatives * np.log(negatives / weight)))


def _ratio(value: float, by: float) -> float:
    return float(value / by) if by > 0 else float("nan")
