"""Which rows go: those of an age, those that are used too little, and the least used ones when the table is nearly full.

Uses of a row decay by half in each `half_life`. So a row's value is the sum over its impressions of 2^(-age / half_life), which
weighs both how often and how long ago it was used (LRFU: Lee et al., IEEE Transactions on Computers 2001, section 3).

Nothing here takes long at once. A hand goes round the table and looks at some rows after each batch. For a table that is nearly
full, each round counts rows by their value, and so knows below which value rows have to go in the next round.

Time is event time: the median of a batch's impressions, which moves at most an hour a batch, so that some wrong times do no
harm. All state is saved, and rows keep their numbers over a restart, so a trainer that restarts evicts the same rows after the
same batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.growing import Column, Growing
from model.hashing import EMPTY_KEY
from model.table import KeyTable
from model.table_settings import TableSettings

__all__ = ["FIELD", "SEEN", "Eviction"]

SEEN, FIELD = "table.seen", "table.field"
"""Parts of rows in versions: the minute in which a row was last used; the index of its field + 1, or 0 if it isn't known."""

_MINUTE_MS = 60_000
_LONGEST_STEP = 60  # minutes that the clock moves with a batch
# Rows that are looked at after a batch, for each of its elements, and at least: a round takes some 200 batches of 128 examples
# with 39 fields for a million rows. 5,000 rows take 0.3 ms where values are counted.
_SEEN_FOR_AN_ELEMENT = 1
_SEEN_AT_LEAST = 4096
# Most rows that are evicted after a batch: 4,096 take some 2 ms.
_EVICTED_AT_ONCE = 4096
# The least used rows go once less than this share of `max_rows` is free.
_SPARE = 1 / 32
# Values are counted in 8 steps for each doubling, from 2^-24 to 2^16: the exponent of a float32 and 3 bits more.
_STEP_BITS = 20
_LOWEST = (127 - 24) << 3
_STEPS = 40 << 3


class _Round(NamedTuple):
    """The state of a round, as saved.

    hand      the last row that was looked at
    cut       step of values below which rows go, while there are too many; 0: none
    inserted  rows that were inserted in this round
    expected  rows that were inserted in the last round
    """

    hand: int = 0
    cut: int = 0
    inserted: int = 0
    expected: int = 0


class Eviction:
    """Stamps rows as they are used, and chooses rows to be evicted.

    eviction.follow(impression_ms)            # before a batch is learned
    eviction.used(rows, inverse, fields)      # the distinct rows of the batch
    keys = eviction.due(inserted, elements)   # after the batch: keys whose rows are to go now
    """

    COLUMNS: Mapping[str, Column] = {
        "seen": Column(dtype=torch.int32, parts={SEEN: slice(None)}, optional=True),
        "uses": Column(parts={"table.uses": slice(None)}, optional=True),
        "field": Column(dtype=torch.int16, parts={FIELD: slice(None)}, optional=True),
    }

    def __init__(self, settings: TableSettings, rows: Growing, keys: KeyTable) -> None:
        self._settings, self._rows = settings, rows
        self._keys = keys
        self._half_life = settings.half_life_ms / _MINUTE_MS
        self._oldest = -(-settings.evict_after_ms // _MINUTE_MS)
        self._round = _Round()
        self._histogram = torch.zeros(_STEPS, dtype=torch.int64, device=rows.device)
        self.now = 0
        """The minute of event time, since 1970; 0 until a batch has times."""
        self._since = 0  # the minute in which it began: rows that were there before count as used then

    def follow(self, impression_ms: npt.NDArray[np.float64]) -> None:
        """Moves the clock on to the times of a batch (B,)."""
        minute = int(np.sort(impression_ms)[len(impression_ms) // 2]) // _MINUTE_MS
        if not self.now:
            self.now = self._since = max(minute, 1)
        elif minute > self.now:
            self.now = min(minute, self.now + _LONGEST_STEP)

    def used(self, rows: torch.Tensor, inverse: torch.Tensor) -> None:
        """Stamps the distinct rows (U,) of a batch, each once for each of its elements; `inverse` (N,) is their index."""
        seen, uses = self._rows["seen"], self._rows["uses"]
        times = torch.bincount(inverse, minlength=len(rows))
        value = self._decayed(uses.index_select(0, rows), seen.index_select(0, rows)).add_(times)
        uses.index_copy_(0, rows, value)
        seen.index_fill_(0, rows, self.now)

    def due(self, inserted: int, elements: int) -> torch.Tensor:
        """Keys (N,) whose rows are to be evicted now, after a batch of so many elements that so many rows were inserted for."""
        last, limit = self._keys.last_row, self._settings.max_rows
        self._round = self._round._replace(inserted=self._round.inserted + inserted)
        first = self._round.hand + 1
        crowded = bool(limit) and 2 * len(self._keys) > limit  # so early, since a round's count is needed in time
        if not self.now or not last or not (self._oldest or self._settings.evict_below or crowded):
            return torch.empty(0, dtype=torch.int64, device=self._rows.device)
        end = min(first + max(_SEEN_AT_LEAST, _SEEN_FOR_AN_ELEMENT * elements), last + 1)
        keys = self._keys.keys_of(slice(first, end))
        seen = self._rows["seen"][first:end]
        seen = torch.where(seen == 0, self._since, seen)
        there = keys != EMPTY_KEY
        going = torch.zeros_like(there)
        if self._oldest:
            going |= seen < self.now - self._oldest
        steps = None
        if self._settings.evict_below or crowded:
            values = self._decayed(self._rows["uses"][first:end].clamp(min=1), seen)
            going |= values < self._settings.evict_below
            if crowded:
                steps = ((values.view(torch.int32) >> _STEP_BITS) - _LOWEST).clamp_(0, _STEPS - 1)
        going &= there
        if steps is not None:
            going = self._with_least_used(going, steps, there)
        at = going.nonzero().squeeze(1)
        if len(at) > _EVICTED_AT_ONCE:
            at = at[:_EVICTED_AT_ONCE]
            end = first + int(at[-1]) + 1
        if steps is not None:
            stays = there & ~going
            self._histogram += torch.bincount(steps[: end - first][stays[: end - first]], minlength=_STEPS)
        self._round = self._round._replace(hand=end - 1)
        gone = keys.index_select(0, at)
        if end > last:
            self._end_round(len(self._keys) - len(gone))
        return gone

    def _with_least_used(self, going: torch.Tensor, steps: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """`going` (N,), and the first rows with few uses, as many as there are too many."""
        surplus = len(self._keys) - self._goal() - int(going.sum())
        if not self._round.cut or surplus <= 0:
            return going
        least = (steps < self._round.cut) & there & ~going
        least &= least.cumsum(0) <= surplus
        return going | least

    def _goal(self) -> int:
        """Down to how many rows the least used ones go, so that there is room for what a round brings."""
        limit = self._settings.max_rows
        return limit - max(int(_SPARE * limit), min(self._round.expected, limit // 4))

    def _end_round(self, rows: int) -> None:
        """Begins the next round, with the value below which rows go in it."""
        self._round = _Round(expected=self._round.inserted)
        if not self._settings.max_rows:
            return
        surplus = rows - self._goal() + self._round.expected
        ascending = self._histogram.cumsum(0)
        counted = int(ascending[-1])  # fewer than all where counting began within the round
        if surplus > 0 and counted >= 0.9 * rows:
            cut = int((ascending < surplus).sum()) + 1
            self._round = self._round._replace(cut=min(cut, _STEPS))
        self._histogram.zero_()

    def _decayed(self, uses: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Uses (N,) as of now, of rows that were last used in these minutes (N,)."""
        return (seen - self.now).to(torch.float32).div_(self._half_life).exp2_().mul_(uses)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU of all but the columns, for `restore`."""
        return {
            "round": torch.tensor([self.now, self._since, *self._round]),
            "histogram": self._histogram.to("cpu", copy=True),
        }

    def restore(self, state: Mapping[str, torch.Tensor], keys: KeyTable) -> None:
        """Goes on with restored rows, from what `state` gave. Begins from nothing without it."""
        self._keys = keys
        self._histogram.zero_()
        self.now = self._since = 0
        self._round = _Round()
        saved, histogram = state.get("round"), state.get("histogram")
        if saved is None or histogram is None or histogram.shape != (_STEPS,) or len(saved) != 2 + len(self._round):
            return
        self._histogram.copy_(histogram)
        self.now, self._since, *rest = (int(number) for number in saved)
        self._round = _Round(*rest)
