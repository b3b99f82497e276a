"""Whether served scores are as good as they were: block after block of clicks, against their own history. Pure.

A block is judged by two metrics of the scores that impressions were shown with:

- normalised entropy: out of band when it is above the mean of the blocks before it by more than `served_ne_margin`, and by more
  than `SIGMAS` of their standard deviations;
- calibration (predicted over actual clicks): out of band when it is outside `served_calibration_band` by more than
  `CALIBRATION_ERRORS` of its own standard error, which is 1 / sqrt(clicks).

`served_blocks` blocks in a row must be out of band for an alarm. The first block in band ends it. Blocks out of band don't
count for the history. `bench/served_band.py` measures false alarms, and how soon faults are found.
"""

from __future__ import annotations

import math

import msgspec

from state.registry import Champion
from state.settings import SnapshotSettings

__all__ = ["BandState", "Block", "ServedBand", "decision_of"]

# How far a block must be from what is expected. False alarms and time until an alarm: docs/experiments.md.
SIGMAS = 4.0
CALIBRATION_ERRORS = 2.0
# Blocks until the history counts, and the number of blocks over which it forgets: a click rate that changes over the day
# changes normalised entropy too, and at 15 clicks a second 50 blocks are 11 minutes.
FIRST_BLOCKS, MEMORY_BLOCKS = 20, 50


class Block(msgspec.Struct, frozen=True):
    """Metrics of the served scores of a block."""

    clicks: int
    normalised_entropy: float
    calibration: float


class BandState(msgspec.Struct, frozen=True, kw_only=True):
    """What is known after some blocks.

    blocks          that count for the history
    mean, variance  of their normalised entropies, moving
    out             blocks out of band in a row, up to the newest
    alarm           why there is an alarm; empty without one
    last            the newest block
    under           decision of an operator under which the blocks were gathered (`decision_of`)
    """

    blocks: int = 0
    mean: float = 0.0
    variance: float = 0.0
    out: int = 0
    alarm: str = ""
    last: Block | None = None
    under: str = ""


def decision_of(champion: Champion) -> str:
    """Names what was last decided by hand about the champion: a hold or its end, a promotion, a rollback; empty for nothing."""
    moved = next((move.operation for move in reversed(champion.moves) if move.how != "auto"), "")
    return "/".join(filter(None, (champion.hold_operation, moved)))


class ServedBand:
    """Judges blocks.

    band = ServedBand(settings.snapshots)
    band.judge(Block(200, 0.71, 1.02))
    band.state.alarm
    """

    def __init__(self, settings: SnapshotSettings, state: BandState | None = None) -> None:
        self._settings = settings
        self.state = state or BandState()

    def judge(self, block: Block) -> None:
        """Take the next block."""
        state, why = self.state, self._out_of_band(block)
        if not why:
            self.state = self._remembering(block)
            return
        out = state.out + 1
        alarm = f"{why}, in {out} blocks of clicks in a row" if out >= self._settings.served_blocks else ""
        self.state = msgspec.structs.replace(state, out=out, alarm=alarm, last=block)

    def begin_again(self, under: str = "") -> None:
        """Forget the blocks out of band, and the history: somebody has decided that scores are as they should be."""
        self.state = BandState(under=under)

    def _out_of_band(self, block: Block) -> str:
        """Why a block is out of band; empty where it isn't."""
        state, settings = self.state, self._settings
        low, high = settings.served_calibration_band
        if block.calibration > 0:
            log, error = math.log(block.calibration), CALIBRATION_ERRORS / math.sqrt(max(1, block.clicks))
            if log - error > math.log(high) or (low > 0 and log + error < math.log(low)):
                return f"calibration of served scores {block.calibration:.3g}, expected {low:g} to {high:g}"
        if state.blocks < FIRST_BLOCKS or math.isnan(block.normalised_entropy):
            return ""
        above = block.normalised_entropy - state.mean
        if above > settings.served_ne_margin * state.mean and above > SIGMAS * math.sqrt(state.variance):
            return f"normalised entropy of served scores {block.normalised_entropy:.4f}, expected {state.mean:.4f} as before"
        return ""

    def _remembering(self, block: Block) -> BandState:
        state = self.state
        if math.isnan(block.normalised_entropy):
            return msgspec.structs.replace(state, out=0, alarm="", last=block)
        blocks = state.blocks + 1
        share = 1 / min(blocks, MEMORY_BLOCKS)
        step = block.normalised_entropy - state.mean
        mean = state.mean + share * step
        variance = (1 - share) * (state.variance + share * step * step)
        return BandState(blocks=blocks, mean=mean, variance=variance, last=block, under=state.under)
