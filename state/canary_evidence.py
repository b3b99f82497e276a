"""What is known of a shadow or canary: sums over the served examples of both sides, and the difference of their log losses.

Shadow. Both versions have scored the same impressions, so their losses are compared in pairs:

    change = mean(candidate's loss - champion's loss) / mean(champion's loss)

Canary. Each version has scored impressions of its own, and those that a candidate chooses to show may be harder or easier to
predict than the champion's. So each side is compared in pairs with a third model, the one in training, as it scores each
example before it learns it; the difference of the two changes is what counts:

    change = change of the candidate's side against that model - change of the champion's side against it

Whether an impression is clicked moves the loss of both scores alike, so its chance cancels in the pairs (a control variate).
With 500 clicks, a difference of 1 % is clear; from the two sides' losses alone it would take some 100,000.

The sums are kept in stretches of at least `STRETCH_CLICKS` clicks. The standard error is the larger of two: that of
`state.gate_blocks.compare`, which takes examples for independent, and that of the stretches among each other, which sees
what examples of one time have in common.

Pure: no Kafka, no torch, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from state.canary import Mode, Side
from state.gate_blocks import Block, FloatArray, compare

__all__ = ["Difference", "Evidence", "Stretch", "Tally"]

# A stretch closes once each side has this many clicks. The mean over fewer is not near enough to normal.
STRETCH_CLICKS = 25
# Stretches kept. Beyond, neighbours are joined, so that a trial of any length stays below 30 kB.
MAX_STRETCHES = 64
# Stretches from which the spread among them is an estimate of the error.
LEAST_STRETCHES = 8

Labels = npt.NDArray[np.floating]


class Tally(msgspec.Struct, array_like=True):
    """Sums over the served scores of one side. w is an example's weight, p its score, l its log loss."""

    weight: float = 0.0  # Σ w
    squares: float = 0.0  # Σ w²
    clicks: float = 0.0  # Σ w over clicks
    click_squares: float = 0.0  # Σ w² over clicks
    predicted: float = 0.0  # Σ w p
    loss: float = 0.0  # Σ w l
    w2_l: float = 0.0  # Σ w² l
    w2_l2: float = 0.0  # Σ w² l²

    def add(self, labels: Labels, weights: FloatArray, logits: FloatArray, sign: float) -> None:
        """Add examples, (N,) each; a `sign` of -1 takes them back."""
        clicked = np.asarray(labels) > 0.5
        w, squared = weights, weights * weights
        loss = np.logaddexp(0.0, np.where(clicked, -logits, logits))
        self.weight += sign * float(w.sum())
        self.squares += sign * float(squared.sum())
        self.clicks += sign * float(w[clicked].sum())
        self.click_squares += sign * float(squared[clicked].sum())
        self.predicted += sign * float((w / (1.0 + np.exp(-logits))).sum())
        self.loss += sign * float((w * loss).sum())
        self.w2_l += sign * float((squared * loss).sum())
        self.w2_l2 += sign * float((squared * loss * loss).sum())

    @property
    def calibration(self) -> float:
        """Predictions divided by clicks; NaN without clicks."""
        return self.predicted / self.clicks if self.clicks > 0 else math.nan

    @property
    def calibration_error(self) -> float:
        """Standard error of `calibration`, from the number of clicks alone (Poisson)."""
        return self.calibration * math.sqrt(max(self.click_squares, 0.0)) / self.clicks if self.clicks > 0 else math.inf

    @property
    def click_rate(self) -> float:
        """Clicks per impression; NaN without impressions."""
        return self.clicks / self.weight if self.weight > 0 else math.nan

    def side(self) -> Side:
        """The figures for people."""
        if self.weight <= 0:
            return Side()
        loss = self.loss / self.weight
        variance = max(0.0, self.w2_l2 - 2 * loss * self.w2_l + loss * loss * self.squares)
        return Side(
            examples=round(self.weight, 1),
            clicks=round(self.clicks, 1),
            log_loss=loss,
            log_loss_error=math.sqrt(variance) / self.weight,
            calibration=self.calibration if self.clicks > 0 else None,
        )


class Stretch(msgspec.Struct, array_like=True):
    """Sums of pairs. `candidate`: the candidate against the champion (shadow), or each side against the model in training."""

    candidate: Block = msgspec.field(default_factory=Block)
    champion: Block = msgspec.field(default_factory=Block)

    def plus(self, other: Stretch) -> Stretch:
        """The sums of both."""
        return Stretch(self.candidate.plus(other.candidate), self.champion.plus(other.champion))


class Difference(NamedTuple):
    """Log loss of the candidate against the champion's, as a part of it, and its standard error."""

    change: float
    error: float


class Evidence(msgspec.Struct, kw_only=True):
    """The sums of one trial.

    of         the operation that began the trial
    from_ms    event time from which the champion's side of a canary counts: that of the candidate's first example, so that both
               sides are of the same time; None before
    candidate, champion  sums of the sides
    """

    of: str = ""
    mode: Mode = "shadow"
    from_ms: int | None = None
    candidate: Tally = msgspec.field(default_factory=Tally)
    champion: Tally = msgspec.field(default_factory=Tally)
    stretches: list[Stretch] = msgspec.field(default_factory=list)
    open: Stretch = msgspec.field(default_factory=Stretch)

    def add_pairs(
        self, labels: Labels, weights: FloatArray, candidate: FloatArray, champion: FloatArray, *, taken_back: bool = False
    ) -> None:
        """Add examples that both versions have scored (shadow): labels, weights and logits, (N,) each."""
        sign = -1.0 if taken_back else 1.0
        self.candidate.add(labels, weights, candidate, sign)
        self.champion.add(labels, weights, champion, sign)
        _add(self.open.candidate, labels, weights, candidate, champion, taken_back=taken_back)

    def add_side(
        self,
        labels: Labels,
        weights: FloatArray,
        served: FloatArray,
        live: FloatArray,
        *,
        is_candidate: bool,
        taken_back: bool = False,
    ) -> None:
        """Add examples of one side of a canary: labels, weights, logits served and of the model in training, (N,) each."""
        tally, block = (self.candidate, self.open.candidate) if is_candidate else (self.champion, self.open.champion)
        tally.add(labels, weights, served, -1.0 if taken_back else 1.0)
        _add(block, labels, weights, served, live, taken_back=taken_back)

    def close_stretch(self) -> bool:
        """Begin another stretch if the open one is full. Returns whether it was."""
        sides = [self.open.candidate] if self.mode == "shadow" else [self.open.candidate, self.open.champion]
        if min(side.clicks for side in sides) < STRETCH_CLICKS:
            return False
        self.stretches.append(self.open)
        self.open = Stretch()
        if len(self.stretches) > MAX_STRETCHES:
            even = self.stretches[::2], self.stretches[1::2]
            joined = [one.plus(two) for one, two in zip(*even, strict=False)]
            self.stretches = joined + self.stretches[2 * len(joined) :]
        return True

    @property
    def clicks(self) -> float:
        """Clicks of the candidate's examples in closed stretches, which are those that decisions count."""
        return sum(stretch.candidate.clicks for stretch in self.stretches)

    def difference(self) -> Difference:
        """The change over all closed stretches, and its standard error, which is infinite while too little is known."""
        if not self.stretches:
            return Difference(0.0, math.inf)
        total = self.stretches[0]
        for stretch in self.stretches[1:]:
            total = total.plus(stretch)
        whole = self._difference_of(total)
        return Difference(whole.change, max(whole.error, self._spread()))

    def _difference_of(self, stretch: Stretch) -> Difference:
        candidate = compare([stretch.candidate])
        if self.mode == "shadow":
            return Difference(candidate.change, candidate.error)
        champion = compare([stretch.champion])
        return Difference(candidate.change - champion.change, math.hypot(candidate.error, champion.error))

    def _spread(self) -> float:
        """The standard error of the mean of the stretches' changes, weighted by their clicks; 0 for a few stretches."""
        found = [(each.candidate.clicks, self._difference_of(each)) for each in self.stretches]
        return _error_of_mean(
            [clicks for clicks, one in found if math.isfinite(one.error)],
            [one.change for _, one in found if math.isfinite(one.error)],
        )


def _error_of_mean(weights: Sequence[float], values: Sequence[float]) -> float:
    count = len(values)
    if count < LEAST_STRETCHES:
        return 0.0
    w, x = np.asarray(weights), np.asarray(values)
    mean = float((w * x).sum() / w.sum())
    return math.sqrt(float((w * w * (x - mean) ** 2).sum()) * count / (count - 1)) / float(w.sum())


def _add(block: Block, labels: Labels, weights: FloatArray, mine: FloatArray, theirs: FloatArray, *, taken_back: bool) -> None:
    """Add pairs of logits to a block that compares every example, so that its sample is the whole stream."""
    sign = -1.0 if taken_back else 1.0
    clicked = np.asarray(labels) > 0.5
    block.clicks += sign * int(np.count_nonzero(weights[clicked]))
    for group, mask in ((block.clicked, clicked), (block.passed_over, ~clicked)):
        group.stream += sign * float(weights[mask].sum())
        group.stream_squares += sign * float((weights[mask] ** 2).sum())
    block.pair(labels, weights, mine, theirs, taken_back=taken_back)
