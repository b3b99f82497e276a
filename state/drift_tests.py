"""Statistics of drift: how far two distributions of scores are apart, and what clicks say of it. Pure."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["EDGES", "FloatArray", "click_evidence", "explained_shift", "histogram", "mean_logit", "stability_index"]

FloatArray = npt.NDArray[np.float64]

# Bins of logits: an eighth wide, since a shift of a logit's eighth is an eighth of the click rate, and distributions are moved
# by whole bins. Beyond 12 there are no scores that mean anything.
_WIDTH = 0.125
EDGES: FloatArray = np.arange(-12.0, 12.0 + _WIDTH / 2, _WIDTH)
"""Edges of the bins of logits, ascending; the first and the last bin also hold what lies outside."""
_CENTRES = (EDGES[1:] + EDGES[:-1]) / 2
# Bins of equal weight into which the reference's scores are divided. Ten is the custom of the population stability index.
_QUANTILES = 10
# Weight of a bin that holds nothing, as a share of all: half an example in 1,000.
_LEAST = 5e-4
# Standard errors by which the click rate may be otherwise than found.
_SURE = 2.0


def histogram(logits: FloatArray, weights: FloatArray) -> FloatArray:
    """The weights of logits (N,) by bin, (len(EDGES) - 1,)."""
    at = np.clip(((logits - EDGES[0]) / _WIDTH).astype(np.int64), 0, len(_CENTRES) - 1)
    return np.bincount(at, weights, len(_CENTRES)).astype(np.float64)


def mean_logit(weights: FloatArray) -> float:
    """The mean logit of a histogram; 0 for an empty one."""
    total = weights.sum()
    return float((weights * _CENTRES).sum() / total) if total > 0 else 0.0


def stability_index(before: FloatArray, now: FloatArray, low: float, high: float) -> float:
    """The population stability index of two histograms, Σ (p - q) ln(p / q) over ten bins of equal weight in `before`.

    It is the symmetric divergence of Kullback and Leibler (1951), section 2. For two samples of one distribution it is nine
    times the sum of one over their sizes on average; 0.25 is the custom for a major change. Before the comparison, `now` is
    moved back by the part of its mean's change that lies between `low` and `high`.

    Args:
        low, high: logits by which clicks explain that scores have moved.
    """
    if before.sum() <= 0 or now.sum() <= 0:
        return 0.0
    moved = min(max(mean_logit(now) - mean_logit(before), low), high)
    now = _moved(now, -round(moved / _WIDTH))
    share = np.cumsum(before) / before.sum()
    cuts = np.unique(np.searchsorted(share, np.arange(1, _QUANTILES) / _QUANTILES) + 1)
    cuts = cuts[cuts < len(before)]
    p = np.maximum(np.add.reduceat(now, np.concatenate(([0], cuts))) / now.sum(), _LEAST)
    q = np.maximum(np.add.reduceat(before, np.concatenate(([0], cuts))) / before.sum(), _LEAST)
    return float(((p - q) * np.log(p / q)).sum())


def _moved(weights: FloatArray, bins: int) -> FloatArray:
    """A histogram moved up by some bins; what would leave it stays in the last one."""
    if not bins:
        return weights
    at = np.clip(np.arange(len(weights)) + bins, 0, len(weights) - 1)
    return np.bincount(at, weights, len(weights)).astype(np.float64)


def explained_shift(now: tuple[float, float], before: tuple[float, float], burstiness: float) -> tuple[float, float]:
    """By how many logits scores may have moved because clicks have: from 0 to the change of the click rate's log odds.

    It is wider by two standard errors of that change (Woolf 1955, for the log odds ratio).

    Args:
        now, before: weight of the impressions, and of the clicks among them.
        burstiness: variance of clicks in units of Poisson's.
    """
    (shown, clicks), (shown0, clicks0) = now, before
    cells = [max(each, 0.0) + 0.5 for each in (clicks, shown - clicks, clicks0, shown0 - clicks0)]
    change = math.log(cells[0] / cells[1]) - math.log(cells[2] / cells[3])
    error = _SURE * math.sqrt(burstiness * sum(1 / each for each in cells))
    return min(0.0, change - error), max(0.0, change + error)


def click_evidence(now: tuple[float, float], before: tuple[float, float], burstiness: float) -> float:
    """How much clicks speak for two rates instead of one: half the likelihood ratio statistic of two Poisson rates.

    By chance it exceeds x with a probability of at most about exp(-x) (Chernoff's bound).

    Args:
        now, before: weight of the impressions, and of the clicks among them.
        burstiness: variance of clicks in units of Poisson's.
    """
    (shown, clicks), (shown0, clicks0) = now, before
    clicks, clicks0 = max(clicks, 0.0), max(clicks0, 0.0)
    if shown <= 0 or shown0 <= 0 or clicks + clicks0 <= 0:
        return 0.0
    share = shown / (shown + shown0)
    total = clicks + clicks0
    evidence = sum(each * math.log(each / (total * part)) for each, part in ((clicks, share), (clicks0, 1 - share)) if each > 0)
    return max(0.0, evidence) / burstiness
