"""How good scores are: log loss, AUC, normalised entropy, calibration, over arrays and over a moving window.

Log loss and AUC as usual; normalised entropy and calibration as in He et al., "Practical Lessons from Predicting Clicks
on Ads at Facebook" (ADKDD 2014), section 3. Every one is NaN where it isn't defined: AUC without both a positive and a
negative, normalised entropy where the label never varies, calibration without a positive, all of them without examples.

Where labels are late, a positive may *correct* a negative that was counted before: it counts as itself, and takes back a
negative of the same score and weight. So in sum every impression counts once, with the label that it has by now.
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
    """Metrics of `examples` examples, of which `positives` have a label above 0.5. Corrections aren't examples of their own."""

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
    order = np.argsort(p, kind="stable")
    p, clicked, w, back = p[order], y[order] > 0.5, w[order], back[order]
    starts = np.flatnonzero(np.concatenate(([True], p[1:] != p[:-1]))) if len(p) else np.empty(0, np.int64)
    positive = np.add.reduceat(np.where(clicked, w, 0), starts) if len(p) else np.empty(0)  # weight of each distinct score
    negative = np.add.reduceat(np.where(clicked, 0, w) - back, starts) if len(p) else np.empty(0)
    pairs = positive.sum() * negative.sum()
    if pairs <= 0:  # below 0 where more is taken back than counted: in a window that begins between the two
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


def measure(
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    corrects: npt.ArrayLike | None = None,
) -> Metrics:
    """All metrics of B scores; `corrects` (B,) bool says which of them take back a negative.

    Raises ModelError for a score or label that isn't a number from 0 to 1.
    """
    p, y, w = _arrays(scores, labels, weights)
    back = _taken_back(w, corrects)
    loss, weight, label, score = _sums(p, y, w, back)
    return Metrics(
        examples=len(p) - _count(corrects),
        positives=int((y > 0.5).sum()),
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

    The window's metrics are exact. Of the whole stream only sums are kept, and its AUC is computed from 10,000 bins of
    the score, which is within 1e-4 or so of the exact one.
    """

    _BINS = 10_000

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ModelError(f"window: expected 1 example or more, found {window}")
        self._ring = np.zeros((4, window))  # scores, labels, weights, whether it takes back a negative
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
        self._positives += int((y > 0.5).sum())
        self._sums += _sums(p, y, w, back)
        low = np.minimum((p * self._BINS).astype(np.int64), self._BINS - 1)
        self._bins += np.bincount(low + self._BINS * (y > 0.5), w, minlength=2 * self._BINS).reshape(2, self._BINS)
        self._bins[0] -= np.bincount(low, back, minlength=self._BINS)
        size = self._ring.shape[1]
        corrected = np.zeros(len(p)) if corrects is None else np.asarray(corrects, np.float64)
        kept = np.stack((p, y, w, corrected))[:, -size:]
        at = (self._next + np.arange(kept.shape[1])) % size
        self._ring[:, at] = kept
        self._next = (self._next + kept.shape[1]) % size
        self._filled = min(size, self._filled + kept.shape[1])

    def window(self) -> Metrics:
        """Of the last examples, at most the window's size."""
        scores, labels, weights, corrects = self._ring[:, : self._filled]
        return measure(scores, labels, weights, corrects)

    def total(self) -> Metrics:
        """Of all examples so far."""
        loss, weight, label, score = self._sums.tolist()
        middles = (np.arange(self._BINS) + 0.5) / self._BINS
        zero_one = np.repeat((0.0, 1.0), self._BINS)
        weights = np.maximum(self._bins, 0)  # a progressive score may be taken back in another bin than it was counted in
        return Metrics(
            examples=self._examples,
            positives=self._positives,
            log_loss=_ratio(loss, weight),
            auc=auc(np.tile(middles, 2), zero_one, weights.ravel()),
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


def _taken_back(w: Float64Array, corrects: npt.ArrayLike | None) -> Float64Array:
    """Weight of the negative that each example takes back."""
    return np.zeros(len(w)) if corrects is None else w * np.asarray(corrects, np.float64)


def _count(corrects: npt.ArrayLike | None) -> int:
    return 0 if corrects is None else int(np.count_nonzero(corrects))


def _sums(p: Float64Array, y: Float64Array, w: Float64Array, back: Float64Array) -> tuple[float, float, float, float]:
    """Loss, weight, label and score, summed by weight; `back` are negatives to be taken away."""
    loss, weight, score = _losses(p, y) @ w, w.sum(), p @ w
    if back.any():
        loss, weight, score = loss - _losses(p, np.zeros(len(p))) @ back, weight - back.sum(), score - p @ back
    return float(loss), float(weight), float(y @ w), float(score)


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
