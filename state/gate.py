"""The gate: whether new versions may become champion by themselves.

There is one state, *flowing* or *withheld*. It is decided by blocks of clicks, in which the live weights (before they learn an
example) are compared with an anchor, an older version known to be good, on the same examples. Only a share of the
impressions is compared, chosen by a hash of the id; clicks and non-clicks are counted on all of them.

A block's mean difference of log loss is a weighted mean of two groups, clicks and non-clicks:

    difference = share × mean(clicks) + (1 - share) × mean(non-clicks)

The means come from the compared sample, the share of clicks from the whole stream (post-stratification, Cochran, "Sampling
Techniques", section 5A.9). A model that is wrong by a constant differs between the groups and hardly within them, so
it shows with few of the forward passes nearly as soon as it would with all of them.

Pure: no Kafka, no torch, no clock. `docs/training.md` derives the rule and says what it finds how soon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from state.settings import SnapshotSettings

__all__ = [
    "Block",
    "Comparison",
    "Flow",
    "Gate",
    "GateReport",
    "GateState",
    "Group",
    "Verdict",
    "compare",
    "judge_version",
    "not_finite",
    "sample",
]

Flow = Literal["flowing", "withheld"]
FloatArray = npt.NDArray[np.float64]

# A block closes once it compares this many clicks, however many the stream had: a mean over fewer is not near enough to normal
# for a limit of 4 standard errors to be met by chance as rarely as the normal distribution says.
COMPARED_CLICKS = 25
# Standard errors by which a stretch must be worse: by chance one block in 30,000 is, and a day at 300 impressions/s has 6,500.
STANDARD_ERRORS = 4.0
# Blocks judged together, the newest ones: gross faults show in one block, small ones only over several.
STRETCHES = (1, 2, 4, 8)
# Blocks kept: a new line is released by a stretch of `anchor_clicks`, which is 5 blocks at the shipped settings.
KEPT_BLOCKS = 16
# Lines remembered as passed; an operator who goes back and forth between models has two or three.
KEPT_LINES = 20

# Undefined while a window holds only clicks or only non-clicks, which is no sign of a broken model.
_UNDEFINED_FOR_ONE_CLASS = ("auc", "ne", "normalised_entropy", "calibration")


class Group(msgspec.Struct, array_like=True):
    """Sums over the clicks, or the non-clicks, of a block. w is an example's weight, d the live loss less the anchor's.

    `stream` counts every impression, the other sums the compared ones. `gap` is the live logit less the anchor's.
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
        """Both together."""
        return Group(*(getattr(self, name) + getattr(other, name) for name in self.__struct_fields__))


class Block(msgspec.Struct, array_like=True):
    """One block: its clicks, its non-clicks, and how many clicks the stream had (corrections taken back)."""

    clicks: float = 0.0
    clicked: Group = msgspec.field(default_factory=Group)
    passed_over: Group = msgspec.field(default_factory=Group)

    def plus(self, other: Block) -> Block:
        """Both together."""
        return Block(self.clicks + other.clicks, self.clicked.plus(other.clicked), self.passed_over.plus(other.passed_over))


class Comparison(msgspec.Struct, frozen=True):
    """The live weights against the anchor over a stretch of blocks, relative to the anchor's loss.

    change    mean difference of the losses over the anchor's loss: 0.01 is 1 % worse
    error     standard error of `change`
    clicks    clicks of the stretch
    loss      the anchor's mean log loss
    """

    change: float
    error: float
    clicks: float
    loss: float


class GateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate knew when a version was captured: it travels in the manifest and in the registry's record.

    line       the epoch in which this line of weights began from nothing; 0 for lines of before there were reports
    flow       flowing or withheld, `reason` says why and `since_ms` since when (wall clock, ms since epoch)
    anchor     the version compared with; None when there is none, or when served scores stand in for it
    loss_change, loss_error  of the newest stretch judged, as in `Comparison`; None when none was
    compared_clicks  clicks in the blocks judged since the flow last changed
    clicks, negatives  impressions seen since the line began, by the labels that they have now
    passed     other lines that this one was compared with and not found worse than
    spread     standard deviation of the logits of the newest 1,000 scores or so; None with fewer
    problems   what is wrong with the version itself; empty when it is sane
    """

    line: int = 0
    flow: Flow = "flowing"
    reason: str = ""
    since_ms: int = 0
    anchor: int | None = None
    loss_change: float | None = None
    loss_error: float | None = None
    compared_clicks: int = 0
    clicks: int = 0
    negatives: int = 0
    passed: tuple[int, ...] = ()
    spread: float | None = None
    problems: tuple[str, ...] = ()


class Verdict(msgspec.Struct, frozen=True):
    """Whether a version may be promoted by itself, and why."""

    passed: bool
    reason: str


class GateState(msgspec.Struct, kw_only=True):
    """All that the gate must remember over a restart: it travels in the trainer's state."""

    line: int = 0
    flow: Flow = "flowing"
    reason: str = "nothing was compared yet"
    since_ms: int = 0
    anchor: int | None = None
    against: int | None = None
    """The line of a champion that this line has yet to be compared with; None when it is the champion's own."""
    passed: tuple[int, ...] = ()
    last: Comparison | None = None
    compared_clicks: float = 0.0
    clicks: float = 0.0
    negatives: float = 0.0
    blocks: list[Block] = msgspec.field(default_factory=list)
    open: Block = msgspec.field(default_factory=Block)


class Gate:
    """Gathers blocks and decides the flow.

        gate = Gate(settings.snapshots, GateState(line=7))
        gate.count(labels, corrects, weights)                       # every example
        gate.pair(labels, weights, live_logits, anchor_logits)      # the compared ones, when they are scored
        if gate.block_is_full:
            gate.close_block(now_ms)
        gate.state.flow

    For one thread. A correction counts its impression under the other label: `count` and `pair` take the first label back.
    """

    def __init__(self, settings: SnapshotSettings, state: GateState) -> None:
        self._settings = settings
        self.state = state

    def count(
        self,
        labels: npt.NDArray[np.floating],
        corrects: npt.NDArray[np.bool_] | None,
        weights: FloatArray,
        *,
        comparable: bool = True,
    ) -> None:
        """Take in the labels of all examples, (B,) each.

        Args:
            weights: how often each counts in the comparison, those left out of the stream too; 0: it can't be compared.
            comparable: whether there is an anchor; without one labels are seen, but no block is filled.
        """
        clicked = np.asarray(labels) > 0.5
        self._see(clicked, weights, 1.0, comparable)
        if corrects is not None and corrects.any():
            # What was counted under the other label is taken back.
            self._see(~clicked[corrects], weights[corrects], -1.0, comparable)

    def _see(self, clicked: npt.NDArray[np.bool_], weights: FloatArray, sign: float, comparable: bool) -> None:
        clicks = int(np.count_nonzero(clicked))
        self.state.clicks += sign * clicks
        self.state.negatives += sign * (len(clicked) - clicks)
        if not comparable:
            return
        block = self.state.open
        block.clicks += sign * int(np.count_nonzero(weights[clicked]))
        for group, mask in ((block.clicked, clicked), (block.passed_over, ~clicked)):
            w = weights[mask]
            group.stream += sign * float(w.sum())
            group.stream_squares += sign * float((w * w).sum())

    def pair(
        self,
        labels: npt.NDArray[np.floating],
        weights: FloatArray,
        live: FloatArray,
        anchor: FloatArray,
        *,
        taken_back: bool = False,
    ) -> None:
        """Take in compared examples: labels, weights and both logits, (N,) each.

        Args:
            taken_back: the examples were taken in before under these labels, with these logits, and are corrected now.
        """
        clicked = np.asarray(labels) > 0.5
        sign = -1.0 if taken_back else 1.0
        for group, mask, toward in ((self.state.open.clicked, clicked, -1.0), (self.state.open.passed_over, ~clicked, 1.0)):
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

    @property
    def click_share(self) -> float:
        """Clicks of all impressions since the line began."""
        everyone = self.state.clicks + self.state.negatives
        return self.state.clicks / everyone if everyone > 0 else 0.0

    @property
    def block_is_full(self) -> bool:
        """Whether the open block can be judged. Examples still to be paired belong to it: pair them before closing it."""
        block = self.state.open
        return block.clicks >= self._settings.gate_block_clicks and _effective(block.clicked) >= COMPARED_CLICKS

    @property
    def share_is_due(self) -> bool:
        """Whether the stream has had enough clicks for a block, so that the gathered sample is worth scoring now."""
        return self.state.open.clicks >= self._settings.gate_block_clicks

    def close_block(self, now_ms: int) -> None:
        """Judge the open block with those before it, and begin another."""
        state = self.state
        state.blocks = [*state.blocks, state.open][-KEPT_BLOCKS:]
        state.compared_clicks += state.open.clicks
        state.open = Block()
        if state.flow == "flowing":
            self._withhold_if_worse(now_ms)
        else:
            self._release_if_fine(now_ms)

    def anchored(self, version: int | None) -> None:
        """Compare with another anchor from now on. Blocks that are closed stay: they too compared with a good version."""
        if version != self.state.anchor:
            self.state.anchor = version
            self._begin_block()

    def oppose(self, line: int, now_ms: int) -> None:
        """The champion is of another line: this line is withheld until it was compared with it over enough clicks."""
        state = self.state
        if state.against == line:
            return
        state.against, state.blocks, state.compared_clicks = line, [], 0.0
        self._begin_block()
        wanted = self._settings.anchor_clicks
        self._turn("withheld", now_ms, f"a new line, not compared with the champion's over {wanted} clicks yet")

    def unopposed(self, now_ms: int) -> None:
        """The champion is of this line, or there is none: what was to be compared with another no longer matters."""
        if self.state.against is not None:
            self.state.against, self.state.blocks = None, []
            self._begin_block()
            self._turn("flowing", now_ms, "the champion is of this line")

    def report(self, problems: Sequence[str] = (), spread: float | None = None) -> GateReport:
        """As a version carries it."""
        state, last = self.state, self.state.last
        return GateReport(
            line=state.line,
            flow=state.flow,
            reason=state.reason,
            since_ms=state.since_ms,
            anchor=state.anchor,
            loss_change=None if last is None else last.change,
            loss_error=None if last is None else last.error,
            compared_clicks=round(state.compared_clicks),
            clicks=round(state.clicks),
            negatives=round(state.negatives),
            passed=state.passed,
            spread=spread,
            problems=tuple(problems),
        )

    def _rival(self) -> str:
        return "the served scores" if self.state.anchor is None else f"version {self.state.anchor}"

    def _begin_block(self) -> None:
        self.state.open = Block()

    def _withhold_if_worse(self, now_ms: int) -> None:
        state, limit = self.state, self._settings.gate_loss_margin
        newest = [compare(state.blocks[-length:]) for length in STRETCHES if length <= len(state.blocks)]
        if not math.isfinite(newest[-1].error):  # nothing was compared in any of them
            return
        state.last = newest[-1]
        for found in newest:
            if found.change - STANDARD_ERRORS * found.error > limit:
                state.last = found
                state.blocks, state.compared_clicks = [], 0.0
                self._turn(
                    "withheld",
                    now_ms,
                    f"log loss {_percent(found.change)} ± {found.error * 100:.1f} % against {self._rival()}'s "
                    f"{found.loss:.4f} over {found.clicks:.0f} clicks (allowed {_percent(limit)})",
                )
                return
        state.reason = f"log loss {_percent(state.last.change)} ± {state.last.error * 100:.1f} % against {self._rival()}"

    def _release_if_fine(self, now_ms: int) -> None:
        state, limit = self.state, self._settings.gate_loss_margin
        wanted = self._settings.gate_block_clicks if state.against is None else self._settings.anchor_clicks
        stretch: list[Block] = []
        for block in reversed(state.blocks):
            stretch.append(block)
            if sum(each.clicks for each in stretch) >= wanted:
                break
        else:
            return
        found = compare(stretch)
        if not math.isfinite(found.error):
            return
        state.last = found
        compared = f"log loss {_percent(found.change)} ± {found.error * 100:.1f} % over {found.clicks:.0f} fresh clicks"
        if not found.change < limit:
            state.reason = f"{state.reason.split('; now ')[0]}; now {compared}"
            return
        if state.against is not None:
            state.passed = (*state.passed, state.against)[-KEPT_LINES:]
            state.against = None
        state.blocks, state.compared_clicks = [], 0.0
        self._turn("flowing", now_ms, f"released: {compared} (allowed {_percent(limit)})")

    def _turn(self, flow: Flow, now_ms: int, reason: str) -> None:
        if flow != self.state.flow or not self.state.since_ms:
            self.state.since_ms = now_ms
        self.state.flow, self.state.reason = flow, reason


def judge_version(
    report: GateReport | None,
    metrics: Mapping[str, float],
    examples_seen: int,
    *,
    champion_line: int | None,
    settings: SnapshotSettings,
) -> Verdict:
    """Whether a version may become champion by itself.

    Args:
        report: of the version; None for one that no gate has looked at, which is never promoted by itself.
        champion_line: the line of the champion; None when there is no champion.
    """
    if report is None:
        return Verdict(False, "no gate has looked at it")
    problems = [*report.problems, *(f"not finite: {name}" for name in not_finite(metrics))]
    if problems:
        return Verdict(False, "; ".join(problems))
    seen = f"{report.clicks} clicks and {report.negatives} non-clicks seen"
    if not (report.clicks > 0 and report.negatives > 0):
        return Verdict(False, f"one class only: {seen}")
    if champion_line is None:
        enough = min(report.clicks, report.negatives) >= settings.first_clicks and examples_seen >= settings.first_examples
        wanted = f"a first champion needs {settings.first_clicks} of each and {settings.first_examples} examples"
        return Verdict(enough, f"the first champion, {seen}" if enough else f"{seen} in {examples_seen} examples; {wanted}")
    if champion_line not in (report.line, *report.passed):
        return Verdict(
            False,
            f"of another line than the champion and not compared with it over enough clicks yet ({report.reason})",
        )
    return Verdict(report.flow == "flowing", f"{report.flow}: {report.reason}")


def sample(
    hashes: FloatArray,
    labels: npt.NDArray[np.floating],
    corrects: npt.NDArray[np.bool_] | None,
    *,
    one_in: int,
    click_share: float,
) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Which examples are compared: one impression in `one_in`, and as many first labels that are clicks again.

    Clicks say most about a model and are few: where they are fewer than one in `one_in`, every one is compared. A late click
    isn't among those, since the live weights have learned its impression as a non-click by then; it is compared when its
    impression was, by the predictions of that time.

    Args:
        hashes: of the impressions' ids, uniform in [0, 1), (B,).

    Returns:
        Rows (N,), and what each counts among those of its label, (N,): the inverse of how likely it was to be chosen.
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
    """The live weights against the anchor over some blocks, by the formula at the top of this module.

    Within clicks the variance is that of d among the compared clicks or that of the gap of logits among all compared
    examples, whichever is larger: a click's d is nearly its gap, and 25 clicks alone can agree by chance.
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
    """Of the group's mean of d."""
    return max(0.0, group.w2_d2 - 2 * mean * group.w2_d + mean * mean * group.squares) / group.weight**2


def _effective(group: Group) -> float:
    """Compared examples, fewer where a few weigh most (Kish): (Σ w)² / Σ w²."""
    return group.weight**2 / group.squares if group.weight > 0 and group.squares > 0 else 0.0


def _percent(change: float) -> str:
    return f"{change * 100:+.1f} %"


def not_finite(metrics: Mapping[str, float]) -> list[str]:
    """Metrics that a sane version can't have, by name; what isn't defined for one class alone is no sign of a fault."""
    broken = []
    for name, value in metrics.items():
        if math.isfinite(value) or name.endswith(_UNDEFINED_FOR_ONE_CLASS):
            continue
        kind = name.split("_", 1)[0]
        if metrics.get(f"{kind}_examples") == 0:  # the mean over nothing
            continue
        broken.append(name)
    return sorted(broken)
