"""How good scores are: log loss, AUC, normalised entropy, calibration, over arrays and over a moving window.

Log loss and AUC as usual; normalised entropy and calibration as in He et al., "Practical Lessons from Predicting Clicks
on Ads at Facebook" (ADKDD 2014), section 3. Every one is NaN where it isn't defined: AUC without both a positive and a
negative, normalised entropy where the label never varies, calibration without a positive, all of them without examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from model.errors import ModelError

__all__ = ["Metrics", "ProgressiveMetrics", "auc", "calibration", "log_loss", "measure", "normalised_entropy"]

Float64Array = npt.NDArray[np.float64]

_CLIP = 1e-7
"""A score of exactly 0 or 1 in the wrong would cost infinitely much; below this a float32 can't say 1 - p."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Metrics of `examples` examples, of which `positives` have a label above 0.5."""

    examples: int
    positives: int
    log_loss: float
    auc: float
    normalised_entropy: float
    calibration: float


def auc(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Area under the ROC curve, exact: how often a positive scores above a negative, ties counting half.

    A pair of examples counts by the product of their weights.
    """
    p, y, w = _arrays(scores, labels, weights)
    order = np.argsort(p, kind="stable")
    p, clicked, w = p[order], y[order] > 0.5, w[order]
    starts = np.flatnonzero(np.concatenate(([True], p[1:] != p[:-1]))) if len(p) else np.empty(0, np.int64)
    positive = np.add.reduceat(np.where(clicked, w, 0), starts) if len(p) else np.empty(0)  # weight of each distinct score
    negative = np.add.reduceat(np.where(clicked, 0, w), starts) if len(p) else np.empty(0)
    pairs = positive.sum() * negative.sum()
    if pairs == 0:
        return float("nan")
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs)


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


def measure(scores: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Metrics:
    """All metrics of B scores. Raises ModelError for a score or label that isn't a number from 0 to 1."""
    p, y, w = _arrays(scores, labels, weights)
    loss = float(_losses(p, y) @ w)
    return Metrics(
        examples=len(p),
        positives=int((y > 0.5).sum()),
        log_loss=_ratio(loss, float(w.sum())),
        auc=auc(p, y, w),
        normalised_entropy=_ratio(loss, _base_loss(float(y @ w), float(w.sum()))),
        calibration=_ratio(float(p @ w), float(y @ w)),
    )


class ProgressiveMetrics:
    """Metrics of a stream of scored examples: of the last `window` ones, and of all since the start.

        metrics = ProgressiveMetrics(window=100_000)
        metrics.update(learner.learn(batch, labels), labels)
        metrics.window().auc, metrics.total().log_loss

    The window's metrics are exact. Of the whole stream only sums are kept, and its AUC is computed from 10,000 bins of
    the score, which is within 1e-4 or so of the exact one.
    """

    _BINS = 10_000

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ModelError(f"window: expected 1 example or more, found {window}")
        self._ring = np.zeros((3, window))  # scores, labels, weights
        self._filled = 0
        self._next = 0
        self._examples = 0
        self._positives = 0
        self._sums = np.zeros(4)  # loss, weight, label, score: weighted
        self._bins = np.zeros((2, self._BINS))  # weight of negatives and of positives by score

    def update(self, scores: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> None:
        """Takes B scored examples. Raises ModelError for a score or label that isn't a number from 0 to 1."""
        p, y, w = _arrays(scores, labels, weights)
        self._examples += len(p)
        self._positives += int((y > 0.5).sum())
        self._sums += (_losses(p, y) @ w, w.sum(), y @ w, p @ w)
        bins = np.minimum((p * self._BINS).astype(np.int64), self._BINS - 1) + self._BINS * (y > 0.5)
        self._bins += np.bincount(bins, w, minlength=2 * self._BINS).reshape(2, self._BINS)
        size = self._ring.shape[1]
        kept = np.stack((p, y, w))[:, -size:]
        at = (self._next + np.arange(kept.shape[1])) % size
        self._ring[:, at] = kept
        self._next = (self._next + kept.shape[1]) % size
        self._filled = min(size, self._filled + kept.shape[1])

    def window(self) -> Metrics:
        """Of the last examples, at most the window's size."""
        scores, labels, weights = self._ring[:, : self._filled]
        return measure(scores, labels, weights)

    def total(self) -> Metrics:
        """Of all examples so far."""
        loss, weight, label, score = self._sums.tolist()
        middles = (np.arange(self._BINS) + 0.5) / self._BINS
        zero_one = np.repeat((0.0, 1.0), self._BINS)
        return Metrics(
            examples=self._examples,
            positives=self._positives,
            log_loss=_ratio(loss, weight),
            auc=auc(np.tile(middles, 2), zero_one, self._bins.ravel()),
            normalised_entropy=_ratio(loss, _base_loss(label, weight)),
            calibration=_ratio(score, label),
        )


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
    return float(value / by) if by else float("nan")
