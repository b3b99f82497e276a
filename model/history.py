"""What each row has seen: how many examples, and how many clicks, and what the dense part reads of them.

Beside its weights a row keeps two counts (setting `model.row_history`):

    n   weight of the examples that the row was in; a negative has the weight 1 / rate, since the stream keeps that share
    c   weight of those that were clicked

They say at once what gradient steps learn over hundreds of examples, and how much is known of a row: an embedding doesn't say
whether it stands for one example or for a million. For each field the dense part reads

    lift  = log((c + K) / (odds (n - c) + K))        odds = C / (N - C), the odds of a click among all examples
    known = log(1 + min(n, LIMIT / 2)) / 5

The lift is the logit of the row's smoothed click rate less the logit of the base rate b = C / N. The smoothed rate has a prior
of K clicks in K / b examples, r = (c + K) / (n + K / b). Then r / (1 - r) = b (c + K) / (b (n - c) + K (1 - b)), and division
by b / (1 - b) gives the formula above. A prior of a fixed number of examples would be worth far less than one click where
clicks are rare. Both numbers are 0 for a key without a row and for a new row.

All counts are as of the end of the batch before, so an example never reads its own label. A correction is the second label of
its impression: it reads the counts without what the first label has added, unless that is in the same batch and isn't counted
yet. Otherwise the counts would show which examples are corrections, and so their labels. A first label counts in n; a
correction changes c alone, since its impression is in n already.

Where n exceeds LIMIT, n and c are scaled down to n = LIMIT / 2, so the past counts half. Without this, float32 would stop
counting at 2^24. The scaling changes neither of the two numbers beyond the rounding. Nothing depends on a clock.

The counts are serving state: versions and deltas carry them, and the digest covers them. C and N go with the dense weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from model.distinct import bags
from model.embedding import Gathered, take
from model.growing import Growing
from model.network import HISTORY_NUMBERS, Elements

__all__ = ["BASE", "RowHistory", "history_inputs", "row_numbers", "take_base"]

BASE = "history.base"
"""Name of the tensor (2,) with N and C, which goes with the dense weights."""

# Clicks of the prior. On KuaiRand 1 to 5 are nearly as good, and 20 are worth nothing (docs/experiments.md).
PRIOR_CLICKS = 2.0
# Weight of examples at which the past is halved. A step of 1 is exact in float32 up to 2^24, and one of 0.1 up to 2^20.
LIMIT = float(1 << 20)
# Brings log(1 + n) into 0 to 2.6, the scale of the lift.
_KNOWN_SCALE = 0.2
# Clicks and negatives that the base rate has at least: at the start the odds are 1.
_LEAST = 0.5
_ODD = -7046029254386353131  # SplitMix64's increment


def row_numbers(counts: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Lift and known (N, 2) of rows with these counts n and c (N, 2); `base` (2,) holds N and C."""
    examples, clicks = counts[:, 0].contiguous(), counts[:, 1].contiguous()
    odds = base[1].clamp_min(_LEAST) / (base[0] - base[1]).clamp_min(_LEAST)
    unclicked = (examples - clicks).clamp_min_(0)
    lift = (clicks + PRIOR_CLICKS).div_(unclicked.mul_(odds).add_(PRIOR_CLICKS)).log_()
    known = examples.clamp_max(LIMIT / 2).log1p_().mul_(_KNOWN_SCALE)
    return torch.stack((lift, known), 1)


def history_inputs(elements: Elements, counts: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """What the dense part reads, (B, 2F): lift and known of each single-valued field, then of each list.

    A list reads the means over its elements, as for embeddings. A scaled field reads the history of its one row as it is.

    counts  float32 (B*S + N, 2): n and c of each element's row
    base    float32 (2,): N and C
    """
    return _by_field(elements, row_numbers(counts, base))


def _by_field(elements: Elements, numbers: torch.Tensor) -> torch.Tensor:
    """The numbers (B, 2F) of all fields, from those of the elements (B*S + N, 2)."""
    batch, lists_from = elements.rows, elements.rows * elements.singles
    own = numbers[:lists_from].view(batch, elements.singles * HISTORY_NUMBERS)
    if elements.list_of is None or elements.list_share is None:
        return own
    pooled = numbers.new_zeros((batch * elements.lists, HISTORY_NUMBERS))
    pooled.index_add_(0, elements.list_of, numbers[lists_from:] * elements.list_share.unsqueeze(1))
    return torch.cat((own, pooled.view(batch, -1)), 1)


class _Counted(NamedTuple):
    """What a batch adds to the counts, until `keep`.

    gathered  the rows as they were before it
    owners    (K,): the example that each element with a row belongs to
    added     (B, 2): what each example adds to n and c
    """

    gathered: Gathered
    owners: torch.Tensor
    added: torch.Tensor


class RowHistory:
    """The counts of all rows and of all examples, kept by a learner.

    history = RowHistory(rows)  # which has the column "history"
    inputs = history.read(elements, gathered, labels, weights, corrects, negative_rate)
    ...                         # the update
    history.keep()
    """

    def __init__(self, rows: Growing) -> None:
        self._rows = rows
        self.base = torch.zeros(2, device=rows.device)
        """N and C: weight of all examples, and of those that were clicked."""
        self._counted: _Counted | None = None

    def read(
        self,
        elements: Elements,
        gathered: Gathered,
        labels: torch.Tensor,
        weights: torch.Tensor | None,
        corrects: torch.Tensor | None,
        negative_rate: float,
        impression_ms: torch.Tensor | None = None,
        own: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the dense part reads of a batch, (B, 2F). `keep` counts the batch then.

        gathered       the batch's rows
        labels         (B,): 0 to 1
        weights        (B,): of the examples; all 1 when None
        corrects       (B,) bool: which labels are corrections; None if none is
        negative_rate  share of negatives that the stream keeps
        impression_ms  (B,): event times, which tell impressions with equal features apart; None if they aren't known
        own            (K,): which elements have a row, if `gathered` has the rows of these alone; None: all have one
        """
        assert gathered.history is not None
        owners = elements.owners()
        # What each row has: its counts if some elements are to read others, else its numbers.
        held = row_numbers(gathered.history, self.base) if corrects is None else gathered.history
        numbers = held.index_select(0, gathered.inverse)
        if own is not None:  # the others read 0
            numbers = numbers.new_zeros((len(owners), 2)).index_copy_(0, own, numbers)
        added = torch.stack((labels + (1 - labels) / negative_rate, labels), 1)
        if corrects is not None:
            back = corrects.unsqueeze(1)
            by_correction = torch.stack((torch.zeros_like(labels), 2 * labels - 1), 1)
            # The first label was a negative if this one is a click. A negative that may have been left out is 1 on average.
            by_first = torch.stack((torch.ones_like(labels), 1 - labels), 1)
            if weights is not None:
                by_first *= weights.unsqueeze(1)
            counted = (corrects & ~_first_is_here(elements, owners, corrects, impression_ms)).unsqueeze(1)
            taken = torch.where(counted, by_first, 0).index_select(0, owners)
            counts = numbers.sub_(taken.mul_(_times(elements, owners, corrects))).clamp_min_(0)
            numbers = row_numbers(counts, self.base)
            added = torch.where(back, by_correction, added)
        if weights is not None:
            added *= weights.unsqueeze(1)
        self._counted = _Counted(gathered, owners if own is None else owners.index_select(0, own), added)
        return _by_field(elements, numbers)

    def keep(self) -> None:
        """Counts the batch of the last `read`. Call this once its update is made; without it nothing has changed."""
        assert self._counted is not None
        (gathered, owners, added), self._counted = self._counted, None
        assert gathered.history is not None
        groups = gathered.groups
        more = bags(added, owners.index_select(0, groups.order), groups.starts)
        self._rows["history"].index_copy_(0, groups.distinct, _bounded(gathered.history + more))
        self.base.copy_(_bounded(self.base + added.sum(0)))

    def serving_state(self) -> dict[str, torch.Tensor]:
        """A copy of N and C on the CPU, by the name that versions use."""
        return {BASE: self.base.to("cpu", copy=True)}


def _first_is_here(
    elements: Elements, owners: torch.Tensor, corrects: torch.Tensor, impression_ms: torch.Tensor | None
) -> torch.Tensor:
    """Which examples (B,) are in the batch as first labels: those of equal features and times."""
    mixed = elements.keys * _ODD  # so that sums of keys differ; modulo 2**64
    sums = torch.zeros(elements.rows, dtype=torch.int64, device=mixed.device).index_add_(0, owners, mixed ^ (mixed >> 31))
    if impression_ms is not None:
        sums += impression_ms.long() * _ODD
    return torch.isin(sums, sums[~corrects])


def _times(elements: Elements, owners: torch.Tensor, examples: torch.Tensor) -> torch.Tensor:
    """How often each element's key is in its example, (N, 1): a list may repeat a value, and fields may share rows.

    examples  (B,) bool: for these examples; 1 for the others
    """
    times = torch.ones(len(owners), device=owners.device)
    at = examples.index_select(0, owners).nonzero().squeeze(1)
    pairs = elements.keys.index_select(0, at) + owners.index_select(0, at) * _ODD  # modulo 2**64
    _, which, counts = torch.unique(pairs, return_inverse=True, return_counts=True)
    return times.index_copy_(0, at, counts.index_select(0, which).to(times.dtype)).unsqueeze(1)


def take_base(serving: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """N and C (2,) of saved serving tensors. Raises SnapshotMismatch if there are none."""
    return take(serving, BASE, (2,))


def _bounded(counts: torch.Tensor) -> torch.Tensor:
    """Counts (…, 2), scaled down where n exceeds `LIMIT`. A click that is taken back after that doesn't make c negative."""
    examples = counts[..., :1]
    return counts.clamp_min(0).mul_(torch.where(examples > LIMIT, LIMIT / 2 / examples, 1.0))
