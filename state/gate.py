"""The gate: whether new versions may become champion without an operator.

The gate has one state, *flowing* or *withheld*. Blocks of clicks decide it, a *doubt* about a single delta withholds as well
(`stream/trainer/sanity.py`), and an operator may release what is withheld. In a block, the live weights (before they learn an
example) are compared with an anchor, an older version known to be good, on the same examples. Only a share of the impressions
is compared, chosen by a hash of the id; clicks and non-clicks are counted on all of them (`state/gate_blocks.py`).

Pure: no Kafka, no torch, no clock. `docs/training.md` derives the rule, and says how soon it finds which fault.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from state.gate_blocks import Block, Comparison, FloatArray, compare, effective
from state.gate_report import Flow, GateReport
from state.settings import SnapshotSettings

__all__ = ["Doubt", "Gate", "GateState"]

# A block closes once it compares at least this many clicks, however many the stream had. A mean over fewer is not near enough
# to normal: a limit of 4 standard errors would be exceeded by chance more often than the normal distribution says.
COMPARED_CLICKS = 25
# Standard errors by which a stretch must be worse than allowed. By chance one block in 30,000 is that much worse, and a day at
# 300 impressions/s has 6,500 blocks.
STANDARD_ERRORS = 4.0
# How many of the newest blocks are judged together. Gross faults show in one block, small ones only over several.
STRETCHES = (1, 2, 4, 8)
# Blocks kept, at least. A new line is released by a stretch of `anchor_clicks`, which is 10 blocks at the default settings. As
# many blocks are kept as the longest stretch has.
KEPT_BLOCKS = 16
# Lines remembered as passed. An operator who goes back and forth between models has two or three.
KEPT_LINES = 20


class Doubt(msgspec.Struct, frozen=True):
    """Why deltas are withheld whatever the blocks say: a delta alone wasn't sane.

    since_ms      wall clock, ms since epoch
    watermark_ms  event time up to which was trained then
    """

    reason: str
    since_ms: int
    watermark_ms: int


class GateState(msgspec.Struct, kw_only=True):
    """What the gate must remember over a restart. It is saved with the trainer's state.

    doubt     set while a delta alone isn't sane
    vouched   loss change at which an operator released it last, while the anchor stays the same: as much worse counts as fine
    released  operation of the last release by an operator that was carried out
    """

    line: int = 0
    flow: Flow = "flowing"
    reason: str = "nothing was compared yet"
    since_ms: int = 0
    anchor: int | None = None
    against: int | None = None
    """The line of the champion, which this line has yet to be compared with; None when the champion is of this line."""
    passed: tuple[int, ...] = ()
    last: Comparison | None = None
    compared_clicks: float = 0.0
    clicks: float = 0.0
    negatives: float = 0.0
    blocks: list[Block] = msgspec.field(default_factory=list)
    open: Block = msgspec.field(default_factory=Block)
    doubt: Doubt | None = None
    vouched: float = 0.0
    released: str = ""


class Gate:
    """Gathers blocks and decides the flow.

        gate = Gate(settings.snapshots, GateState(line=7))
        gate.count(labels, corrects, weights)                       # all examples
        gate.pair(labels, weights, live_logits, anchor_logits)      # the compared ones, once they are scored
        if gate.block_is_full:
            gate.close_block(now_ms)
        gate.state.flow

    For one thread. A correction moves its impression to the other label: `count` and `pair` subtract the first label.
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
        """Count the labels of all examples, (B,) each.

        Args:
            weights: how often each example counts in the comparison, which makes up for negatives left out of the stream; 0 for
                an example that can't be compared.
            comparable: whether there is an anchor. Without one, labels are counted but no block is filled.
        """
        clicked = np.asarray(labels) > 0.5
        self._see(clicked, weights, 1.0, comparable)
        if corrects is not None and corrects.any():
            # Subtract what was counted under the other label.
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
        """Add compared examples to the open block: labels, weights and both logits, (N,) each.

        Args:
            taken_back: subtract them instead. They were added before under these labels, with these logits, and are corrected
                now.
        """
        self.state.open.pair(labels, weights, live, anchor, taken_back=taken_back)

    @property
    def click_share(self) -> float:
        """The share of clicks among all impressions since the line began."""
        everyone = self.state.clicks + self.state.negatives
        return self.state.clicks / everyone if everyone > 0 else 0.0

    @property
    def block_is_full(self) -> bool:
        """Whether the open block can be judged. Pair all examples that were counted before closing it."""
        block = self.state.open
        return block.clicks >= self._settings.gate_block_clicks and effective(block.clicked) >= COMPARED_CLICKS

    @property
    def share_is_due(self) -> bool:
        """Whether the stream has had enough clicks for a block, so that the gathered sample is worth scoring now."""
        return self.state.open.clicks >= self._settings.gate_block_clicks

    def close_block(self, now_ms: int) -> None:
        """Judge the open block together with those before it, and begin another."""
        state = self.state
        kept = max(KEPT_BLOCKS, math.ceil(self._settings.anchor_clicks / self._settings.gate_block_clicks))
        state.blocks = [*state.blocks, state.open][-kept:]
        state.compared_clicks += state.open.clicks
        state.open = Block()
        if state.flow == "flowing":
            self._withhold_if_worse(now_ms)
        else:
            self._release_if_fine(now_ms)

    def anchored(self, version: int | None) -> None:
        """Compare with another anchor from now on. Closed blocks stay, since they compared with a good version too."""
        if version != self.state.anchor:
            self.state.anchor, self.state.vouched = version, 0.0
            self._begin_block()

    def oppose(self, line: int, now_ms: int) -> None:
        """The champion is of another line: withhold this line until the two were compared over enough clicks."""
        state = self.state
        if state.against == line:
            return
        state.against, state.blocks, state.compared_clicks = line, [], 0.0
        self._begin_block()
        wanted = self._settings.anchor_clicks
        self._turn("withheld", now_ms, f"a new line, not shown to predict as well as the champion over {wanted} clicks yet")

    def unopposed(self, now_ms: int) -> None:
        """The champion is of this line, or there is none: no comparison with another line is needed any more."""
        if self.state.against is not None:
            self.state.against, self.state.blocks = None, []
            self._begin_block()
            self._turn("flowing", now_ms, "the champion is of this line")

    def doubt(self, reason: str, now_ms: int, watermark_ms: int) -> bool:
        """Withhold until `trust`, since a delta isn't sane. Returns whether that is news; the time of the first doubt stays."""
        before = self.state.doubt
        if before is None:
            self.state.doubt = Doubt(reason, now_ms, watermark_ms)
        else:
            self.state.doubt = msgspec.structs.replace(before, reason=reason)
        return before is None

    def trust(self, now_ms: int, why: str) -> bool:
        """End a doubt: the weights are sane. Returns whether there was one."""
        if self.state.doubt is None:
            return False
        self.state.doubt = None
        if self.state.flow == "flowing":
            self.state.since_ms, self.state.reason = now_ms, f"released: {why}"
        return True

    def release(self, operation: str, who: str, why: str, now_ms: int) -> None:
        """An operator vouches for the live weights: release them.

        From now on, until there is another anchor, only what is worse than they are now by the margin is withheld.
        """
        state = self.state
        state.released, state.doubt = operation, None
        if state.against is not None:
            state.passed = (*state.passed, state.against)[-KEPT_LINES:]
            state.against = None
        if state.last is not None:
            state.vouched = max(0.0, state.last.change)
        state.blocks, state.compared_clicks = [], 0.0
        self._begin_block()
        self._turn("flowing", now_ms, f"released by {who}: {why}")

    @property
    def _limit(self) -> float:
        return self._settings.gate_loss_margin + self.state.vouched

    def report(self, problems: Sequence[str] = (), spread: float | None = None) -> GateReport:
        """The report that a version carries."""
        state, last, doubt = self.state, self.state.last, self.state.doubt
        reason, since_ms = (state.reason, state.since_ms) if doubt is None else (doubt.reason, doubt.since_ms)
        return GateReport(
            line=state.line,
            flow=state.flow if doubt is None else "withheld",
            reason=reason,
            since_ms=since_ms,
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
        state, limit = self.state, self._limit
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
        state, limit = self.state, self._limit
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


def _percent(change: float) -> str:
    return f"{change * 100:+.1f} %"
