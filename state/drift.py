"""Abrupt changes of the stream itself: of features' null rates, of the scores' distribution, of the click rate.

Examples are summed into blocks of 1,000. Each block is compared with a reference: the blocks before it, the newer ones counting
more. What changes slowly moves the reference and is no drift.

- A feature whose share of nulls changes abruptly says that a producer is broken.
- Scores whose distribution changes, by more than clicks can explain, say that features carry other values than before.
- The click rate alone changes for many good reasons, so it raises an alarm only. Beyond a factor of 4 something is broken:
  clicks are lost, or sent twice.

`docs/training.md` derives the limits. Pure: no Kafka, no torch, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from state.drift_tests import FloatArray, click_evidence, explained_shift, mean_logit, stability_index
from state.settings import SnapshotSettings

__all__ = ["BLOCK_EXAMPLES", "DriftBlock", "DriftState", "DriftWatch"]

BLOCK_EXAMPLES = 1_000
"""Examples in a block. A share of 10 % of them has a standard error of one point, and a click rate of 3 % of 18 % of itself."""
# Part that the reference loses with each block, so that it holds some 50 blocks: 3 minutes at 300 impressions a second.
FORGET = 0.02
# Blocks before anything is judged. The usual variation between blocks is known to a fifth of itself by then.
LEAST_BLOCKS = 20
# Part of a block in what is usual between blocks.
USUAL_PART = 0.02
# How many times its usual standard deviation a null rate may change. Traffic that comes in bursts varies more between blocks
# than chance says, and not normally: at 6 a simulated stream of 20 features was withheld every few days.
DEVIATIONS = 8.0
# How many times its usual value the distribution of scores may change.
TIMES_USUAL = 6.0
# Standard deviations beyond which a change counts as this one in what is usual: one outage during the first blocks must not
# make all later ones usual.
OUTLIER = 3.0
# Share of a limit to which a value must come back before it counts as before. At the limit itself deltas would flow and stop in
# turns.
BACK = 0.75
# Logarithm of the odds against a change of clicks by chance, by the likelihood ratio of two Poisson rates. By chance it is
# exceeded in one of 500,000 comparisons; a day at 300 impressions a second has 130,000.
EVIDENCE = 12.0
# Lengths in blocks over which clicks are compared. At a click rate of 5 % one block shows a factor of 4; at 0.1 % sixteen show
# that there are no clicks any more.
WINDOWS = (1, 2, 4, 8, 16)
# Features that a reason names. The rest are counted.
NAMED = 3


class DriftBlock(msgspec.Struct):
    """Sums over examples that are no corrections, weighted by how often each counts in the stream as it was.

    examples  number of them, unweighted
    weight, squares  Σ w, Σ w²
    nulls     Σ w of the examples without a value, by field
    logits    Σ w by bin of the score's logit (`state.drift_tests.EDGES`)
    clicks    Σ w of the clicks, corrections included
    """

    examples: float = 0.0
    weight: float = 0.0
    squares: float = 0.0
    nulls: list[float] = msgspec.field(default_factory=list)
    logits: list[float] = msgspec.field(default_factory=list)
    clicks: float = 0.0

    def add(self, other: DriftBlock, keep: float = 1.0) -> None:
        """Add another block, after this one was multiplied by `keep`."""
        self.examples = keep * self.examples + other.examples
        self.weight = keep * self.weight + other.weight
        self.squares = keep * self.squares + other.squares
        self.clicks = keep * self.clicks + other.clicks
        self.nulls = _added(self.nulls, other.nulls, keep)
        self.logits = _added(self.logits, other.logits, keep)


class DriftState(msgspec.Struct, kw_only=True):
    """What is remembered over a restart, with the trainer's state.

    blocks     blocks in the reference, each counted once
    reference  the sums of the reference
    clicks     (weight, clicks) of the newest blocks, which are not in `click_reference` yet
    click_reference  (weight, clicks) of those before, the newer ones counting more
    null_variance  usual variance of each field's null rate between blocks
    usual_score    usual change of the scores' distribution between a block and the reference
    burstiness     usual squared deviation of a block's clicks, in units of Poisson's; 1 or more
    problem    why what is learned is withheld; empty while nothing is wrong
    since      sums since the problem began; they become the reference when it is accepted
    alarm      what is unusual about the click rate; empty while nothing is
    explained  by how many logits, from and to, the clicks of an alarm explain that scores move
    """

    open: DriftBlock = msgspec.field(default_factory=DriftBlock)
    blocks: int = 0
    reference: DriftBlock = msgspec.field(default_factory=DriftBlock)
    clicks: list[tuple[float, float]] = msgspec.field(default_factory=list)
    click_reference: tuple[float, float] = (0.0, 0.0)
    null_variance: list[float] = msgspec.field(default_factory=list)
    usual_score: float = 0.0
    burstiness: float = 1.0
    problem: str = ""
    since: DriftBlock = msgspec.field(default_factory=DriftBlock)
    alarm: str = ""
    explained: tuple[float, float] = (0.0, 0.0)


class DriftWatch:
    """Compares each block with the reference.

        watch = DriftWatch(settings.snapshots, [field.name for field in fields])
        watch.add(block)            # sums of some examples; closes the open block once it is full
        watch.state.problem         # "" or why deltas are to be withheld
        watch.accept()              # what is new is what is normal from now on

    For one thread.

    Args:
        fields: names, in the order of `DriftBlock.nulls`.
    """

    def __init__(self, settings: SnapshotSettings, fields: Sequence[str], state: DriftState | None = None) -> None:
        self._settings, self._fields = settings, list(fields)
        self.state = DriftState() if state is None else state
        self.null_change = self.score_change = 0.0
        """The largest change of a null rate, and the change of the scores' distribution, in the newest block."""
        self.click_factor = 1.0
        """Click rate of the newest block over the reference's."""

    def add(self, block: DriftBlock) -> None:
        """Add the sums of some examples."""
        state = self.state
        state.open.add(block)
        if state.open.examples >= BLOCK_EXAMPLES:
            closed, state.open = state.open, DriftBlock()
            self._close(closed)

    def accept(self) -> None:
        """Take what has come since the problem began for normal: it is the reference from now on."""
        state = self.state
        if not state.problem:
            return
        state.problem = ""
        state.reference, state.since = state.since, DriftBlock()
        # Judged again once the new reference is known as well as the first one was.
        state.blocks = max(1, round(state.reference.examples / BLOCK_EXAMPLES))
        state.clicks, state.click_reference = [], (state.reference.weight, state.reference.clicks)
        self._settle()

    def _close(self, block: DriftBlock) -> None:
        state = self.state
        state.clicks.append((block.weight, block.clicks))
        if state.blocks < LEAST_BLOCKS:
            if state.blocks:
                self._compare(block)
            self._fold(block)
            return
        factor = BACK if state.problem else 1.0
        wrong = [*self._compare(block, factor), *self._clicks_wrong(factor)]
        before, state.problem = state.problem, "; ".join(wrong)
        if state.problem:
            if not before:
                state.since = DriftBlock()
            state.since.add(block, 1.0 - FORGET)
            del state.clicks[: -WINDOWS[-1]]
        elif before:
            state.since = DriftBlock()
            state.clicks = state.clicks[-1:]  # those of the problem don't count
            self._fold(block)
        else:
            self._fold(block)

    def _fold(self, block: DriftBlock) -> None:
        """Make a block a part of the reference."""
        state = self.state
        if state.blocks:
            self._learn_usual(block)
        state.reference.add(block, 1.0 - FORGET)
        state.blocks += 1
        while len(state.clicks) > WINDOWS[-1]:
            weight, clicks = state.clicks.pop(0)
            shown, clicked = state.click_reference
            state.click_reference = ((1.0 - FORGET) * shown + weight, (1.0 - FORGET) * clicked + clicks)

    def _learn_usual(self, block: DriftBlock) -> None:
        state = self.state
        part = max(USUAL_PART, 1.0 / state.blocks)
        before = _shares(state.reference)
        floor = (self._settings.drift_null_rate / DEVIATIONS) ** 2  # below this the variance doesn't matter
        known = np.array(state.null_variance) if state.null_variance else np.full(len(before), floor)
        squared = np.minimum((_shares(block) - before) ** 2, OUTLIER**2 * np.maximum(known, floor))
        state.null_variance = (known + part * (squared - known)).tolist()
        state.usual_score += part * (self.score_change - state.usual_score)
        expected = block.weight * state.reference.clicks / max(state.reference.weight, 1e-9)
        if expected > 0 and not state.alarm:  # what has changed says nothing of how much clicks usually vary
            found = (block.clicks - expected) ** 2 / expected
            state.burstiness = max(1.0, state.burstiness + part * (found - state.burstiness))

    def _compare(self, block: DriftBlock, factor: float = 1.0) -> list[str]:
        """What is wrong with a block's features and scores."""
        return [*self._nulls_wrong(block, factor), *self._scores_wrong(block, factor)]

    def _nulls_wrong(self, block: DriftBlock, factor: float) -> list[str]:
        state = self.state
        before, now = _shares(state.reference), _shares(block)
        change = np.abs(now - before)
        self.null_change = float(change.max(initial=0.0))
        by_chance = before * (1 - before) * block.squares / max(block.weight, 1e-9) ** 2
        usual = np.array(state.null_variance) if state.null_variance else np.zeros(len(before))
        limit = np.maximum(self._settings.drift_null_rate, DEVIATIONS * np.sqrt(np.maximum(by_chance, usual)))
        wrong = np.flatnonzero(change > factor * limit)
        if not len(wrong):
            return []
        wrong = wrong[np.argsort(-change[wrong], kind="stable")]
        named = [
            f"{self._fields[at]} ({_percent(now[at])} of the newest {round(block.examples):,} examples, usually "
            f"{_percent(before[at])})"
            for at in wrong[:NAMED].tolist()
        ]
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        return [f"features without a value more or less often than usual: {', '.join(named)}{more}"]

    def _scores_wrong(self, block: DriftBlock, factor: float) -> list[str]:
        state = self.state
        before, now = np.array(state.reference.logits), np.array(block.logits)
        low, high = explained_shift(
            (block.weight, block.clicks), (state.reference.weight, state.reference.clicks), state.burstiness
        )
        self.score_change = stability_index(before, now, low, high)
        limit = max(self._settings.drift_score_distribution, TIMES_USUAL * state.usual_score)
        if self.score_change <= factor * limit:
            return []
        moved = mean_logit(now) - mean_logit(before)
        return [
            f"scores are distributed otherwise than usual: a population stability index of {self.score_change:.2f} (allowed "
            f"{limit:.2f}), on average {moved:+.2f} logits, of which clicks explain {low:+.2f} to {high:+.2f}"
        ]

    def _clicks_wrong(self, factor: float) -> list[str]:
        """What is wrong with the click rate; sets the alarm too."""
        state = self.state
        shown0, clicks0 = state.click_reference
        state.alarm, state.explained = "", (0.0, 0.0)
        if shown0 <= 0:
            return []
        most = self._settings.drift_click_factor ** (1.0 if factor == 1.0 else BACK)
        wrong = ""
        for blocks in WINDOWS:
            if len(state.clicks) < blocks:
                break
            shown = sum(each for each, _ in state.clicks[-blocks:])
            clicks = max(0.0, sum(each for _, each in state.clicks[-blocks:]))
            change = (clicks / shown) / (clicks0 / shown0) if shown > 0 and clicks0 > 0 else math.inf if clicks > 0 else 1.0
            if blocks == 1:
                self.click_factor = change
            if click_evidence((shown, clicks), (shown0, clicks0), state.burstiness) < EVIDENCE:
                continue
            text = (
                f"the click rate of the newest {round(shown):,} impressions is {_percent(clicks / shown)}, usually "
                f"{_percent(clicks0 / shown0)}"
            )
            times = max(change, 1.0 / change if change > 0 else math.inf)
            if times >= self._settings.drift_click_alarm and not state.alarm:
                state.alarm = text
                state.explained = explained_shift((shown, clicks), (shown0, clicks0), state.burstiness)
            if times >= most and not wrong:
                wrong = f"{text}: a change beyond a factor of {self._settings.drift_click_factor:g}"
        return [wrong] if wrong else []

    def _settle(self) -> None:
        self.null_change = self.score_change = 0.0
        self.click_factor = 1.0
        self.state.alarm, self.state.explained = "", (0.0, 0.0)


def _shares(block: DriftBlock) -> FloatArray:
    return np.array(block.nulls) / max(block.weight, 1e-9)


def _added(mine: list[float], others: list[float], keep: float) -> list[float]:
    if not mine:
        return list(others)
    if not others:
        return [keep * each for each in mine]
    found: npt.NDArray[np.float64] = keep * np.array(mine) + np.array(others)
    return found.tolist()


def _percent(share: float) -> str:
    return f"{share * 100:.2g} %" if share < 0.1 else f"{share * 100:.0f} %"
