"""How good scores are: log loss, AUC, normalised entropy, calibration, over arrays and over a moving window.

Log loss and AUC as usual; normalised entropy and calibration as in He et al., "Practical Lessons from Predicting Clicks
on Ads at Facebook" (ADKDD 2014), section 3. Every one is NaN where it isn't defined: AUC without both a positive and a
negative, normalised entropy where the label never varies, calibration without a positive, all of them without examples.

A label may *correct* one that was counted before: a late click corrects a negative, a click that was found invalid is corrected
to a negative. A correction counts as itself and takes back an example of the other label with its own score and weight. So in
sum every impression counts once, with the label that it has by now.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.errors import ModelError

__all__ = ["Metrics", "ProgressiveMetrics", "auc", "calibration", "log_loss", "measure", "normalised_entropy"]

Float64Array = npt.NDArray[np.float64]

# An example as the window keeps it.
_ROW = np.dtype([("score", np.float32), ("label", np.float32), ("weight", np.float32), ("corrects", np.bool_)])

_CLIP = 1e-7
"""A score of exactly 0 or 1 in the wrong would cost infinitely much; below this a float32 can't say 1 - p."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Metrics of `examples` examples, of which `positives` are clicked by now. Corrections aren't examples of their own."""

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
    """Area under the ROC curve, exact: how often a positive scores above a negative, ties counting half.

    A pair of examples counts by the product of their weights.
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
    """AUC from the weight of negatives and of positives (N,) at each of N rising scores."""
    negatives, positives = negative.sum(), positive.sum()
    if negatives <= 0 or positives <= 0:  # below 0 where more is taken back than counted: in a window that begins in between
        return float("nan")
    below = np.cumsum(negative) - negative
    # Single scores may hold less than nothing, where an example is taken back at another score than it was counted at.
    return float(np.clip((positive * (below + negative / 2)).sum() / (negatives * positives), 0, 1))


def log_loss(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Mean negative log likelihood, in nats, with scores kept within 1e-7 of 0 and 1."""
    p, y, w = _arrays(scores, labels, weights)
    return _ratio(float(_losses(p, y) @ w), float(w.sum()))


def normalised_entropy(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Log loss over that of always saying the base rate: below 1 is better than knowing nothing (equation 1)."""
    p, y, w = _arrays(scores, labels, weights)
    return _ratio(float(_losses(p, y) @ w), _base_loss(float(y @ w), float(w.sum())))


def calibration(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Expected over observed positives: 1 is right, 2 promises twice as many as came."""
    p, y, w = _arrays(scores, labels, weights)
    return _ratio(float(p @ w), float(y @ w))


def measure(
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    corrects: npt.ArrayLike | None = None,
) -> Metrics:
    """All metrics of B scores; `corrects` (B,) bool says which of them take back an example of the other label.

    Raises ModelError for a score or label that isn't a number from 0 to 1.
    """
    p, y, w = _arrays(scores, labels, weights)
    back = _taken_back(w, corrects)
    loss, weight, label, score = _sums(p, y, w, back)
    return Metrics(
        examples=len(p) - _count(corrects),
        positives=_positives(y, corrects),
        log_loss=_ratio(loss, weight),
        auc=auc(p, y, w, corrects),
        normalised_entropy=_ratio(loss, _base_loss(label, weight)),
        calibration=_ratio(score, label),
    )


class ProgressiveMetrics:
    """Metrics of a stream of scored examples: of the last `window` ones, and of all since the start.

        metrics = ProgressiveMetrics(window=100_000)
        metrics.update(learner.learn(batch, labels), labels)
        metrics.window().auc, metrics.total().log_loss

    The window's metrics are exact, of float32 scores. Of the whole stream only sums are kept, and its AUC is computed from bins
    of the score's log odds, 256 to a factor of e: equal bins of the score itself would put a whole stream with a CTR of 0.01 %
    into a handful of them. It is within 1e-4 of the exact one.
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
        self._sums = np.zeros(4)  # loss, weight, label, score: weighted
        self._bins = np.zeros((2, self._BINS))  # weight of negatives and of positives by score

    def update(
        self,
        scores: npt.ArrayLike,
        labels: npt.ArrayLike,
        weights: npt.ArrayLike | None = None,
        corrects: npt.ArrayLike | None = None,
    ) -> None:
        """Takes B scored examples, as `measure` does. Raises ModelError for a score or label that isn't from 0 to 1."""
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
        """Of the last examples, at most the window's size."""
        rows = self._ring[: self._filled]
        return measure(rows["score"], rows["label"], rows["weight"], rows["corrects"])

    def total(self) -> Metrics:
        """Of all examples so far."""
        loss, weight, label, score = self._sums.tolist()
        return Metrics(
            examples=self._examples,
            positives=self._positives,
            log_loss=_ratio(loss, weight),
            auc=_area(*self._bins),
            normalised_entropy=_ratio(loss, _base_loss(label, weight)),
            calibration=_ratio(score, label),
        )

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Copies of all that `restore` needs, as plain arrays by name."""
        rows = np.roll(self._ring[: self._filled], -self._next if self._filled == len(self._ring) else 0)  # oldest first
        return {
            "counts": np.array([self._examples, self._positives]),
            "sums": self._sums.copy(),
            "bins": self._bins.copy(),
            **{name: rows[name].copy() for name in _ROW.names or ()},
        }

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Goes on from what `state` gave, in the place of what was counted so far. The window keeps as many as it has room for.

        Raises:
            ModelError: something is missing or has another shape, as of another release; nothing has changed then.
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
        self._examples, self._positives = (int(each) for each in state["counts"])
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
    """Weight of the other label that each example takes back."""
    return np.zeros(len(w)) if corrects is None else w * np.asarray(corrects, np.float64)


def _count(corrects: npt.ArrayLike | None) -> int:
    return 0 if corrects is None else int(np.count_nonzero(corrects))


def _positives(y: Float64Array, corrects: npt.ArrayLike | None) -> int:
    """How many are positive by now: a correction to a negative takes one away."""
    clicked = y > 0.5
    return int(clicked.sum()) - (0 if corrects is None else int((~clicked & np.asarray(corrects, np.bool_)).sum()))


def _sums(p: Float64Array, y: Float64Array, w: Float64Array, back: Float64Array) -> tuple[float, float, float, float]:
    """Loss, weight, label and score, summed by weight; `back` is the weight taken away of the other label."""
    loss, weight, label, score = _losses(p, y) @ w, w.sum(), y @ w, p @ w
    if back.any():
        loss, weight = loss - _losses(p, 1 - y) @ back, weight - back.sum()
        label, score = label - (1 - y) @ back, score - p @ back
    return float(loss), float(weight), float(label), float(score)


def _losses(p: Float64Array, y: Float64Array) -> Float64Array:
    kept = np.clip(p, _CLIP, 1 - _CLIP)
    return np.asarray(-(y * np.log(kept) + (1 - y) * np.log1p(-kept)))


def _base_loss(positives: float, weight: float) -> float:
    """Summed loss of always predicting the base rate."""
    negatives = weight - positives
    if positives <= 0 or negatives <= 0:
        return 0.0
    return float(-(positives * np.log(positives / weight) + negatives * np.log(negatives / weight)))


def _ratio(value: float, by: float) -> float:
    return float(value / by) if by > 0 else float("nan")
