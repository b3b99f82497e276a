"""Statistics of the gate: which examples are compared, sums over blocks of clicks, and the mean difference of log loss.

A block's mean difference of log loss, the live weights' less the anchor's, is a weighted mean of two groups:

    difference = share × mean(clicks) + (1 - share) × mean(non-clicks)

The two means come from the compared sample, the share of clicks from the whole stream (post-stratification, Cochran, "Sampling
Techniques", section 5A.9). If the logits of the live model are wrong by a constant, the difference of loss varies between the
two groups and hardly within each. So a small share of the forward passes shows the fault nearly as soon as all of them would.

Pure: no Kafka, no torch, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["Block", "Comparison", "FloatArray", "Group", "compare", "effective", "sample"]

FloatArray = npt.NDArray[np.float64]


class Group(msgspec.Struct, array_like=True):
    """Sums over the clicks, or over the non-clicks, of a block.

    w is an example's weight, d the live loss less the anchor's, gap the live logit less the anchor's. The sums called `stream`
    are over every impression, the others over the compared ones.
    """

    stream: float = 0.0  # Σ w
    stream_squares: float = 0.0  # Σ w²
    weight: float = 0.0  # Σ w
    squares: float = 0.0  # Σ w²
    loss: float = 0.0  # Σ w × the anchor's loss
    d: float = 0.0  # Σ w d
    w2_d: float = 0.0  # Σ w² d
    w2_d2: float = 0.0  # Σ w² d²
    gap: float = 0.0  # Σ w gap
    gap2: float = 0.0  # Σ w gap²

    def plus(self, other: Group) -> Group:
        """The sums of both."""
        return Group(*(getattr(self, name) + getattr(other, name) for name in self.__struct_fields__))


class Block(msgspec.Struct, array_like=True):
    """One block: the sums over its clicks and its non-clicks, and the stream's clicks less those that were corrected."""

    clicks: float = 0.0
    clicked: Group = msgspec.field(default_factory=Group)
    passed_over: Group = msgspec.field(default_factory=Group)

    def plus(self, other: Block) -> Block:
        """The sums of both."""
        return Block(self.clicks + other.clicks, self.clicked.plus(other.clicked), self.passed_over.plus(other.passed_over))

    def pair(
        self,
        labels: npt.NDArray[np.floating],
        weights: FloatArray,
        live: FloatArray,
        anchor: FloatArray,
        *,
        taken_back: bool = False,
    ) -> None:
        """Add compared examples: labels, weights and both logits, (N,) each. `taken_back` subtracts them instead."""
        clicked = np.asarray(labels) > 0.5
        sign = -1.0 if taken_back else 1.0
        for group, mask, toward in ((self.clicked, clicked, -1.0), (self.passed_over, ~clicked, 1.0)):
            if not mask.any():
                continue
            w, mine, theirs = weights[mask], live[mask], anchor[mask]
            loss = np.logaddexp(0.0, toward * theirs)
            d = np.logaddexp(0.0, toward * mine) - loss
            gap = mine - theirs
            group.weight += sign * float(w.sum())
            group.squares += sign * float((w * w).sum())
            group.loss += sign * float((w * loss).sum())
            group.d += sign * float((w * d).sum())
            group.w2_d += sign * float((w * w * d).sum())
            group.w2_d2 += sign * float((w * w * d * d).sum())
            group.gap += sign * float((w * gap).sum())
            group.gap2 += sign * float((w * gap * gap).sum())


class Comparison(msgspec.Struct, frozen=True):
    """The live weights against the anchor over a stretch of blocks, relative to the anchor's loss.

    change    mean difference of the losses, divided by the anchor's loss: 0.01 is 1 % worse
    error     standard error of `change`
    clicks    clicks of the stretch
    loss      the anchor's mean log loss
    """

    change: float
    error: float
    clicks: float
    loss: float


def sample(
    hashes: FloatArray,
    labels: npt.NDArray[np.floating],
    corrects: npt.NDArray[np.bool_] | None,
    *,
    one_in: int,
    click_share: float,
) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Choose the examples to compare: one impression in `one_in`, and the same number again of first labels that are clicks.

    Clicks say most about a model and are few. Where they are fewer than one in `one_in`, every one is compared. Late clicks
    get no larger chance, since the live weights have learned their impressions as non-clicks by then. A late click is compared
    when its impression was compared, by the predictions of that time.

    Args:
        hashes: hashes of the impressions' ids, uniform in [0, 1), (B,).
        click_share: share of clicks among all impressions.

    Returns:
        The rows chosen, (N,), and the weight of each among those of its label, (N,): the inverse of its chance to be chosen.
    """
    by_chance = 1 / one_in
    of_clicks = 1.0 if click_share <= by_chance else by_chance + by_chance / click_share
    of_clicks = min(1.0, of_clicks)
    first_clicks = np.asarray(labels) > 0.5
    if corrects is not None:
        first_clicks &= ~corrects
    rows = np.flatnonzero(hashes < np.where(first_clicks, of_clicks, by_chance))
    return rows, np.where(first_clicks[rows], by_chance / of_clicks, 1.0)


def compare(blocks: Sequence[Block]) -> Comparison:
    """Compare the live weights with the anchor over some blocks, by the formula at the top of this module.

    The variance within clicks is the larger of two: that of d among the compared clicks, and that of the gap of logits among
    all compared examples. The second can stand for the first, since a click's d is nearly its gap, but for the sign. It is
    needed because the d of 25 clicks alone can agree by chance.
    """
    total = blocks[0]
    for block in blocks[1:]:
        total = total.plus(block)
    clicked, others = total.clicked, total.passed_over
    all_clicked, all_others = max(clicked.stream, 0.0), max(others.stream, 0.0)
    everyone = all_clicked + all_others
    if everyone <= 0 or clicked.weight <= 0 or others.weight <= 0:
        return Comparison(0.0, math.inf, total.clicks, 0.0)
    share = all_clicked / everyone
    d1, d0 = clicked.d / clicked.weight, others.d / others.weight
    loss = share * clicked.loss / clicked.weight + (1 - share) * others.loss / others.weight
    compared = clicked.weight + others.weight
    gap = (clicked.gap + others.gap) / compared
    gap_variance = max(0.0, (clicked.gap2 + others.gap2) / compared - gap * gap)
    of_share = ((1 - share) ** 2 * clicked.stream_squares + share**2 * others.stream_squares) / everyone**2
    of_clicked = max(_variance(clicked, d1), gap_variance * clicked.squares / clicked.weight**2)
    variance = (d1 - d0) ** 2 * max(of_share, 0.0) + share**2 * of_clicked + (1 - share) ** 2 * _variance(others, d0)
    mean = share * d1 + (1 - share) * d0
    return Comparison(mean / loss, math.sqrt(variance) / loss, total.clicks, loss)


def _variance(group: Group, mean: float) -> float:
    """The variance of the group's mean of d."""
    return max(0.0, group.w2_d2 - 2 * mean * group.w2_d + mean * mean * group.squares) / group.weight**2


def effective(group: Group) -> float:
    """The effective number of compared examples, smaller where a few weigh most (Kish): (Σ w)² / Σ w²."""
    return group.weight**2 / group.squares if group.weight > 0 and group.squares > 0 else 0.0
