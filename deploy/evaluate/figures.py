"""AUC, normalised entropy and calibration with confidence intervals, alone and paired.

Every figure is a smooth function of sums over impressions. Its *influence function* says how much one impression moves it (for
the AUC these are the structural components of DeLong et al., "Comparing the Areas under Two or More Correlated Receiver
Operating Characteristic Curves", Biometrics 44, 1988, equations 4 and 5). The variance of a figure is the sum of squares over
blocks, where a block's term is the sum of the influence of its impressions. Blocks are stretches of the stream, so that what
hangs together in time, such as a session, counts as one observation.

The difference of two runs has as its influence the difference of both: the luck of the impressions, which both share, cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.metrics import measure
from stream.trainer.calibration import is_off

__all__ = ["FIGURES", "Estimate", "Figures", "Judged", "blocks_of", "difference", "estimate", "mean_figures"]

FIGURES = ("auc", "ne", "calibration")

MOST_BLOCKS = 100
"""Blocks of a run: the quantile of Student's t with 99 degrees of freedom is within 2 % of the normal one."""

LEAST_IN_BLOCK = 20
"""Impressions in a block, where there are few."""

_Z = 1.959964  # the 97.5 % quantile of the normal distribution
_CLIP = 1e-7  # as in `model.metrics`

Floats = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]


class Estimate(NamedTuple):
    """A figure and its 95 % confidence interval; the ends are NaN where they aren't known."""

    value: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, slots=True)
class Judged:
    """N scored labels.

    scores    (N,)
    labels    (N,): 0 or 1
    weights   (N,): how often each counts
    corrects  (N,): whether the label is a correction, which takes back the opposite label (`model.metrics`); None if none is
    blocks    (N,): number of the block that the impression belongs to
    """

    scores: Floats
    labels: Floats
    weights: Floats
    corrects: npt.NDArray[np.bool_] | None
    blocks: Int64s

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Judged:
        """Only these labels."""
        corrects = None if self.corrects is None else self.corrects[rows]
        return Judged(self.scores[rows], self.labels[rows], self.weights[rows], corrects, self.blocks[rows])


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of one group of impressions in one run, or their mean over several runs that differ in their seeds.

    impressions  summed weights
    clicks       summed weights of the positives
    mean_score   mean score
    values       (3,): AUC, normalised entropy, calibration
    influence    (blocks, 3): how much each block moves each figure
    seed_error   (3,): standard error of the mean over seeds; 0 with one seed
    """

    impressions: float
    clicks: float
    mean_score: float
    values: Floats
    influence: Floats
    seed_error: Floats

    def estimate(self, name: str) -> Estimate:
        """A figure of `FIGURES` with its interval."""
        return _estimates(self.values, self.influence, self.seed_error)[FIGURES.index(name)]

    @property
    def off(self) -> bool:
        """Whether the calibration is away from 1 by more than chance and more than the tolerance, as the trainer has them."""
        found = self.estimate("calibration")
        return is_off(found.value, found.error / _student(max(1, len(self.influence) - 1)), self.clicks)

    @property
    def ctr(self) -> float:
        """Clicks by impressions."""
        return self.clicks / self.impressions if self.impressions > 0 else math.nan


def blocks_of(count: int) -> Int64s:
    """The block of each of `count` impressions in event-time order, (count,)."""
    blocks = max(1, min(MOST_BLOCKS, count // LEAST_IN_BLOCK))
    return np.arange(count) * blocks // max(1, count)


def estimate(judged: Judged, blocks: int) -> Figures:
    """The figures of these labels.

    Args:
        blocks: number of blocks in the whole run.
    """
    found = measure(judged.scores, judged.labels, judged.weights, judged.corrects)
    values = np.array([found.auc, found.normalised_entropy, found.calibration])
    p, y, w, block = judged.scores, judged.labels, judged.weights, judged.blocks
    if judged.corrects is not None:  # what is taken back has a negative weight
        back = judged.corrects
        p, block = np.concatenate([p, p[back]]), np.concatenate([block, block[back]])
        y, w = np.concatenate([y, 1 - y[back]]), np.concatenate([w, -w[back]])
    weight, clicks = float(w.sum()), float(w @ y)
    by_block = np.full((blocks, 3), np.nan)
    if 0 < clicks < weight:
        each = (
            _auc_influence(p, y, w, found.auc),
            _ne_influence(p, y, found.normalised_entropy, clicks, weight),
            (p - found.calibration * y) / clicks,
        )
        by_block = np.stack([np.bincount(block, w * influence, minlength=blocks) for influence in each], axis=1)
    return Figures(weight, clicks, float(w @ p) / weight if weight > 0 else math.nan, values, by_block, np.zeros(3))


def _auc_influence(p: Floats, y: Floats, w: Floats, area: float) -> Floats:
    """Influence of each label on the AUC: how often a positive is above the negatives, a negative below the positives."""
    order = np.argsort(p, kind="stable")
    sorted_p = p[order]
    starts = np.flatnonzero(np.concatenate(([True], sorted_p[1:] != sorted_p[:-1])))
    group = np.empty(len(p), np.int64)
    group[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(p))))
    positive = np.bincount(group, w * y, minlength=len(starts))
    negative = np.bincount(group, w * (1 - y), minlength=len(starts))
    positives, negatives = positive.sum(), negative.sum()
    below = np.cumsum(negative) - negative / 2  # weight of negatives below each score, half of those at it
    above = positives - (np.cumsum(positive) - positive / 2)
    of_positives = (below[group] / negatives - area) / positives
    of_negatives = (above[group] / positives - area) / negatives
    return np.where(y > 0.5, of_positives, of_negatives)


def _ne_influence(p: Floats, y: Floats, value: float, clicks: float, weight: float) -> Floats:
    """Influence on L / G, with L the summed loss and G = -(Y log(Y / W) + (W - Y) log(1 - Y / W)) of Y clicks in W labels."""
    kept = np.clip(p, _CLIP, 1 - _CLIP)
    loss = -(y * np.log(kept) + (1 - y) * np.log1p(-kept))
    rate = clicks / weight
    base = -weight * (rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
    moved = -math.log1p(-rate) + y * math.log((1 - rate) / rate)  # what one label adds to G
    influence: Floats = (loss - value * moved) / base
    return influence


def mean_figures(each: Sequence[Figures]) -> Figures:
    """The mean over runs that differ in their seeds."""
    values = np.stack([one.values for one in each])
    seeds = len(each)
    error = values.std(axis=0, ddof=1) / math.sqrt(seeds) if seeds > 1 else np.zeros(3)
    return Figures(
        impressions=each[0].impressions,
        clicks=each[0].clicks,
        mean_score=float(np.mean([one.mean_score for one in each])),
        values=values.mean(axis=0),
        influence=np.stack([one.influence for one in each]).mean(axis=0),
        seed_error=error,
    )


def difference(ours: Sequence[Figures], base: Sequence[Figures]) -> dict[str, Estimate]:
    """By figure, how much our run is above the base, paired by impression and by seed."""
    differences = [
        Figures(
            one.impressions, one.clicks, one.mean_score, one.values - other.values, one.influence - other.influence, np.zeros(3)
        )
        for one, other in zip(ours, base, strict=True)
    ]
    mean = mean_figures(differences)
    return dict(zip(FIGURES, _estimates(mean.values, mean.influence, mean.seed_error), strict=True))


def _estimates(values: Floats, influence: Floats, seed_error: Floats) -> list[Estimate]:
    blocks = len(influence)
    if blocks < 2:
        return [Estimate(float(value), math.nan, math.nan) for value in values]
    variance = (influence**2).sum(axis=0) * blocks / (blocks - 1) + seed_error**2
    errors = _student(blocks - 1) * np.sqrt(variance)
    return [
        Estimate(float(value), float(value - error), float(value + error)) for value, error in zip(values, errors, strict=True)
    ]


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by its expansion in 1 / freedom (Abramowitz and Stegun, 26.7.5); 2 % off at 2."""
    z = _Z
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
