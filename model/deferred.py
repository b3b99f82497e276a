"""When a row pays for its negatives: the part that later clicks will take back is due only when these come.

A first label says 0 also where the click is still to come. The slope f - y of the log loss (`model.slopes`) charges f for the
whole impression at once, while the clicks that answer it come later. For a feature value that has been there for long, the
charges for new impressions and the late clicks of older ones balance. For a new one (a new item, a new hour) there are no older
ones: its row is pushed down, what all rows share is pushed up in return, and the next new value, whose row begins at 0, is
predicted too high.

So a row is charged p1 f with the first label and the rest, (1 - p1) f, over the time in which late clicks come: of what a row
owes, the share 1 - exp(-t / tau) falls due in t. In sum a row is charged f for each impression, whatever p1 and tau are: they
say when, not how much. Both are means over the stream's own clicks. p1 is the share that the first labels knew; tau is the
event time by which the corrections of the others came behind the newest first label. The bias is a row of every impression, and
is charged like one: at a start the clicks still to come are a large part of all. The MLP's weights are charged at once.
"""

from __future__ import annotations

import torch

from model.embedding import take
from model.errors import SnapshotMismatch

__all__ = ["Deferred"]

# Clicks over which the share of late ones and their delay are averaged: some minutes of a small stream, and known to 2 %.
CLICKS = 5_000.0
# Share of the unit slope below which an example's own slope can't be divided by: float32 has 7 digits.
LEAST_SLOPE = 1e-6


class Deferred:
    """What rows owe, by row of the table.

        deferred = Deferred(room, device)
        factors = deferred.factors(distinct, place, of, mass, slopes, labels, corrects, impression_ms)
        ...                # the update: each element's slope is its example's times its factor
        deferred.keep()

    Until the first correction comes everything is due at once, and `factors` says None.
    """

    def __init__(self, room: int, device: torch.device) -> None:
        self._owed = torch.zeros(room, device=device)
        self._since_ms = torch.zeros(room, dtype=torch.float64, device=device)
        # Clicks known by first labels, those that corrected, the latter's lags in ms, and the newest first label's time.
        self._means = torch.zeros(4, dtype=torch.float64)
        # What the bias owes, and since when.
        self._bias = torch.zeros(2, dtype=torch.float64, device=device)
        self._next_means = self._means
        self._changes: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float] | None = None
        self.bias_charge = torch.zeros((), device=device)
        """What the bias is charged besides its slopes, after `factors`."""

    @property
    def known_share(self) -> float:
        """Share p1 of clicks that the first labels knew; 1 as long as none came later."""
        known, late = self._means[:2].tolist()
        return 1.0 if late == 0 else known / (known + late)

    @property
    def lag_ms(self) -> float:
        """Mean event time tau by which corrections come behind the newest first label, at least 1."""
        _, late, lags, _ = self._means.tolist()
        return max(lags / late, 1.0) if late else 1.0

    def factors(
        self,
        distinct: torch.Tensor,
        place: torch.Tensor,
        of: torch.Tensor,
        mass: torch.Tensor,
        slopes: torch.Tensor,
        labels: torch.Tensor,
        corrects: torch.Tensor | None,
        impression_ms: torch.Tensor,
    ) -> torch.Tensor | None:
        """What each element's slope is to be multiplied by (E,); None: all are 1. What is owed changes with `keep`.

        distinct       (U,) rows of the batch
        place          (E,) which of them each element is
        of             (E,) which example each element belongs to
        mass           (B,) what each example is charged in all: score times weight
        slopes         (B,) slopes of the loss by the logits
        labels         (B,) 0 to 1
        corrects       (B,) bool, None where none does
        impression_ms  (B,) float64, event times
        """
        self._changes = None
        self.bias_charge.zero_()
        self._next_means = self._delays(labels, corrects, impression_ms)
        later = 1 - self.known_share
        if not later:
            return None
        now_ms = float(self._next_means[3])
        self._make_room(int(distinct.max()) + 1)
        charged = mass if corrects is None else mass.masked_fill(corrects, 0)  # first labels
        owed, since_ms = self._owed[distinct], self._since_ms[distinct]
        due = owed * -torch.expm1(-(now_ms - since_ms).clamp_min(0) / self.lag_ms).to(torch.float32)
        by_first = torch.zeros_like(owed).index_add_(0, place, charged[of])
        bias_owed, bias_since_ms = self._bias
        bias_due = bias_owed * -torch.expm1(-(now_ms - bias_since_ms).clamp_min(0) / self.lag_ms)
        bias_later = later * charged.sum()
        self.bias_charge.copy_(bias_due - bias_later)
        self._changes = distinct, owed - due + later * by_first, bias_owed - bias_due + bias_later, now_ms
        # What is due goes to the row's first labels of this batch by their scores, or else to its corrections.
        by_any = torch.zeros_like(owed).index_add_(0, place, mass[of])
        has = by_first > 0
        each = torch.where(has, due / by_first.clamp_min(1e-12), due / by_any.clamp_min(1e-12))[place]
        takes = torch.where(has[place], charged[of], mass[of])
        more = takes * each - later * charged[of]
        divisor = slopes[of]
        return torch.where(divisor.abs() < LEAST_SLOPE, 1.0, 1 + more / divisor)

    def keep(self) -> None:
        """Take over what the last `factors` came to: the update that it was for is made."""
        self._means = self._next_means
        if self._changes is not None:
            distinct, owed, bias_owed, now_ms = self._changes
            self._bias[0], self._bias[1] = bias_owed, now_ms
            self._owed[distinct] = owed
            self._since_ms[distinct] = now_ms
            self._changes = None

    def _delays(self, labels: torch.Tensor, corrects: torch.Tensor | None, impression_ms: torch.Tensor) -> torch.Tensor:
        """The means with this batch's labels."""
        known, late, lags, newest_ms = self._means.tolist()
        back = torch.zeros(len(labels), dtype=torch.bool, device=labels.device) if corrects is None else corrects
        clicked = labels > 0.5
        firsts = impression_ms[~back]
        if len(firsts):
            newest_ms = float(firsts.max())  # of this batch: a single wrong time can't hold back what is due for good
        corrected = impression_ms[back & clicked]
        fresh = float((~back & clicked).sum())
        keep = (1 - 1 / CLICKS) ** (fresh + len(corrected))
        lag = float((newest_ms - corrected).clamp_min(0).sum()) if len(corrected) else 0.0
        means = known * keep + fresh, late * keep + len(corrected), lags * keep + lag, newest_ms
        return torch.tensor(means, dtype=torch.float64)

    def state(self, rows: int) -> dict[str, torch.Tensor]:
        """Copies on the CPU of the table's first `rows` rows, without row 0."""
        self._make_room(rows + 1)
        return {
            "owed": self._owed[1 : rows + 1].to("cpu", copy=True),
            "since_ms": self._since_ms[1 : rows + 1].to("cpu", copy=True),
            "means": self._means.clone(),
            "bias": self._bias.to("cpu", copy=True),
        }

    def restore(self, state: dict[str, torch.Tensor], rows: int) -> None:
        """Takes over a saved state; an empty one, of a version from before there was any, owes nothing."""
        self._owed.zero_()
        self._since_ms.zero_()
        self._means.zero_()
        self._bias.zero_()
        if not state:
            return
        if len(state["owed"]) != rows or len(state["since_ms"]) != rows or state["means"].shape != (4,):
            raise SnapshotMismatch(f"snapshot: tensors 'deferred.*': expected {rows} rows, found {len(state['owed'])}")
        self._make_room(rows + 1)
        self._owed[1 : rows + 1] = state["owed"].to(self._owed.device)
        self._since_ms[1 : rows + 1] = state["since_ms"].to(self._owed.device)
        self._means.copy_(state["means"])
        self._bias.copy_(take(state, "bias", (2,), torch.float64))

    def _make_room(self, rows: int) -> None:
        room = len(self._owed)
        if rows <= room:
            return
        while room < rows:
            room *= 2
        for name in ("_owed", "_since_ms"):
            old = getattr(self, name)
            new = torch.zeros(room, dtype=old.dtype, device=old.device)
            new[: len(old)] = old
            setattr(self, name, new)
