"""Spreads the negative part of a row's gradient over time, so that rows of new feature values aren't pushed too low.

A first label is 0 even if the click of its impression comes later. The slope of the log loss, f - y (`model.slopes`), charges
the score f of the impression at once, while the late click that outweighs the charge comes as a correction. For a feature value
that has been shown for long, charges for new impressions and late clicks of older impressions balance. A new value (a new item,
a new hour) has no older impressions: its row is pushed down, the parameters that all rows share are pushed up in return, and
the next new value, whose row has not been pushed down yet, is predicted too high.

So a row is charged p1 f with the first label, and owes the rest, (1 - p1) f, which is charged while late clicks come: after an
event time t, the share 1 - exp(-t / tau) of what a row owes is due. In total a row is charged f for each impression, whatever
p1 and tau are; these decide when, not how much. Both are averages over the stream's own clicks:

- p1 is the share of clicks that the first labels already showed;
- tau is the mean event time between the impression of a late click and the newest first label at the time of its correction.

The bias belongs to every impression and is charged in the same way: shortly after an empty start, a large part of all clicks is
still to come. The MLP's weights are charged at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from model.embedding import take
from model.growing import Column, Growing

__all__ = ["Deferred"]

# Clicks over which the share of late clicks and their delay are averaged: some minutes of a small stream, precise to 2 %.
CLICKS = 5_000.0
# Slopes smaller than this are not divided by, since float32 has 7 digits.
LEAST_SLOPE = 1e-6


class _Owed(NamedTuple):
    """What is owed after an update, until `keep`: by row, by the bias, and since when."""

    distinct: torch.Tensor
    rows: torch.Tensor
    bias: torch.Tensor
    now_ms: float


class Deferred:
    """What each row of the table owes.

        deferred = Deferred(rows)   # which has the columns of `Deferred.COLUMNS`
        factors = deferred.factors(distinct, inverse, owners, mass, slopes, labels, corrects, impression_ms)
        ...                # the update: the slope of each element is the slope of its example times its factor
        deferred.keep()

    Until the first correction comes, everything is due at once and `factors` returns None.
    """

    COLUMNS: Mapping[str, Column] = {
        "owed": Column(parts={"deferred.owed": slice(None)}, optional=True),
        "since_ms": Column(dtype=torch.float64, parts={"deferred.since_ms": slice(None)}, optional=True),
    }

    def __init__(self, rows: Growing) -> None:
        device = rows.device
        self._rows = rows
        # Decaying sums: clicks that first labels showed, clicks that came as corrections, their lags in ms. Then the event time
        # of the newest first label in ms.
        self._means = torch.zeros(4, dtype=torch.float64)
        # What the bias owes, and the event time in ms since which it owes that.
        self._bias = torch.zeros(2, dtype=torch.float64, device=device)
        self._next_means = self._means
        self._changes: _Owed | None = None
        self.bias_charge = torch.zeros((), device=device)
        """What to add to the bias' gradient; set by `factors`."""

    @property
    def known_share(self) -> float:
        """Share p1 of clicks that the first labels showed; 1 until a click comes as a correction."""
        known, late = self._means[:2].tolist()
        return 1.0 if late == 0 else known / (known + late)

    @property
    def lag_ms(self) -> float:
        """Mean event time tau in ms from the impression of a correction to the newest first label, at least 1."""
        _, late, lags, _ = self._means.tolist()
        return max(lags / late, 1.0) if late else 1.0

    def factors(
        self,
        distinct: torch.Tensor,
        inverse: torch.Tensor,
        owners: torch.Tensor,
        mass: torch.Tensor,
        slopes: torch.Tensor,
        labels: torch.Tensor,
        corrects: torch.Tensor | None,
        impression_ms: torch.Tensor,
    ) -> torch.Tensor | None:
        """Factors (E,) for the slopes of the batch's E elements; None if all are 1. `keep` records what is owed then.

        distinct       (U,) distinct rows of the batch
        inverse        (E,) index in `distinct` of each element's row
        owners         (E,) index of the example that each element belongs to
        mass           (B,) total charge of each example: its score times its weight
        slopes         (B,) slopes of the loss by the logits
        labels         (B,) 0 to 1
        corrects       (B,) bool: which labels are corrections; None if none is
        impression_ms  (B,) float64, event times
        """
        self._changes = None
        self.bias_charge.zero_()
        self._next_means = self._delays(labels, corrects, impression_ms)
        later = 1 - self.known_share
        if not later:
            return None
        now_ms = float(self._next_means[3])
        charged = mass if corrects is None else mass.masked_fill(corrects, 0)  # of first labels alone
        owed, since_ms = self._rows["owed"][distinct], self._rows["since_ms"][distinct]
        due = owed * -torch.expm1(-(now_ms - since_ms).clamp_min(0) / self.lag_ms).to(torch.float32)
        by_first = torch.zeros_like(owed).index_add_(0, inverse, charged[owners])
        bias_owed, bias_since_ms = self._bias
        bias_due = bias_owed * -torch.expm1(-(now_ms - bias_since_ms).clamp_min(0) / self.lag_ms)
        bias_later = later * charged.sum()
        self.bias_charge.copy_(bias_due - bias_later)
        self._changes = _Owed(distinct, owed - due + later * by_first, bias_owed - bias_due + bias_later, now_ms)
        # What is due is divided among the row's first labels in this batch in proportion to their charges; among its
        # corrections if the batch has no first label of the row.
        by_any = torch.zeros_like(owed).index_add_(0, inverse, mass[owners])
        has_first = by_first > 0
        per_mass = torch.where(has_first, due / by_first.clamp_min(1e-12), due / by_any.clamp_min(1e-12))[inverse]
        takes = torch.where(has_first[inverse], charged[owners], mass[owners])
        more = takes * per_mass - later * charged[owners]
        divisor = slopes[owners]
        return torch.where(divisor.abs() < LEAST_SLOPE, 1.0, 1 + more / divisor)

    def keep(self) -> None:
        """Record what is owed since the last `factors`. Call this once its update is made; without it nothing has changed."""
        self._means = self._next_means
        if (changes := self._changes) is not None:
            self._bias[0], self._bias[1] = changes.bias, changes.now_ms
            self._rows["owed"][changes.distinct] = changes.rows
            self._rows["since_ms"][changes.distinct] = changes.now_ms
            self._changes = None

    def _delays(self, labels: torch.Tensor, corrects: torch.Tensor | None, impression_ms: torch.Tensor) -> torch.Tensor:
        """`_means` with this batch's labels added."""
        known, late, lags, newest_ms = self._means.tolist()
        clicked = labels > 0.5
        firsts, corrected = impression_ms, impression_ms[:0]
        if corrects is not None:
            firsts, corrected = impression_ms[~corrects], impression_ms[corrects & clicked]
            clicked &= ~corrects
        if len(firsts):
            # The newest of this batch alone: otherwise one wrong time far ahead would delay for ever what is due.
            newest_ms = float(firsts.max())
        fresh = float(clicked.sum())
        keep = (1 - 1 / CLICKS) ** (fresh + len(corrected))
        lag = float((newest_ms - corrected).clamp_min(0).sum()) if len(corrected) else 0.0
        means = known * keep + fresh, late * keep + len(corrected), lags * keep + lag, newest_ms
        return torch.tensor(means, dtype=torch.float64)

    def state(self) -> dict[str, torch.Tensor]:
        """The part of the state that belongs to no row, for `restore`: copies on the CPU."""
        return {"means": self._means.clone(), "bias": self._bias.to("cpu", copy=True)}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continues from what `state` returned. Without it, as in older versions, the bias owes nothing.

        Raises:
            SnapshotMismatch: the state has another shape.
        """
        saved = (take(state, "means", (4,), torch.float64), take(state, "bias", (2,), torch.float64)) if state else None
        self._means.zero_()
        self._bias.zero_()
        if saved is not None:
            self._means.copy_(saved[0])
            self._bias.copy_(saved[1])
