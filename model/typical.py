"""The average row of each field: the initial row of a new value, and the row that unknown values read.

A new item or a new hour begins at the average of its field, not at zero. The MLP is never trained with rows at zero: all rows
of a field learn what its values have in common (all hours of a day, say), and the MLP compensates for it. So a value that began
at zero was predicted up to seven times too high until its first labels came (docs/experiments.md).

The average is taken over examples, so that values count as often as they are shown, and decays over HORIZON examples. With a
short horizon, a field that has one value at a time, such as the hour, would begin each value as a copy of the last one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from model.embedding import take
from model.network import Elements
from model.schema import FeatureSchema

__all__ = ["HORIZON", "Typical"]

# Examples over which a field's rows are averaged.
HORIZON = 50_000


class Typical:
    """The average row of each of F fields: the S single-valued fields, then the L lists.

    embedding    float32 (F, D)
    first_order  float32 (F,)

    A scaled field (`buckets = "scaled"` or `"standard"`) has one row only, which is always known; its average stays 0.
    """

    def __init__(self, schema: FeatureSchema, device: torch.device) -> None:
        count = len(schema.fields)
        self._averaged = torch.ones(count, device=device)
        for index, field in enumerate(schema.singles):
            if field.is_scaled:
                self._averaged[index] = 0.0
        self.embedding = torch.zeros((count, schema.embedding_dim), device=device)
        self.first_order = torch.zeros(count, device=device)

    def follow(
        self, elements: Elements, embedded: torch.Tensor, rows: torch.Tensor, first_order: torch.Tensor, seen: int
    ) -> None:
        """Adds a batch to the averages.

        embedded  (B, F, D): embeddings of the fields
        rows      (B*S + N,): row of `first_order` (R,) of each element
        seen      examples before this batch
        """
        batch = elements.rows
        lists_from = batch * elements.singles  # where the elements of lists begin
        own, others = rows[:lists_from], rows[lists_from:]
        linear = first_order.index_select(0, own).view(batch, elements.singles).mean(0)
        if elements.list_of is not None and elements.list_share is not None:
            lists = elements.list_of % elements.lists
            share = elements.list_share / batch
            linear = torch.cat((linear, share.new_zeros(elements.lists).index_add_(0, lists, first_order[others] * share)))
        part = batch / min(seen + batch, max(HORIZON, batch))
        self.embedding.lerp_(embedded.mean(0) * self._averaged.unsqueeze(1), part)
        self.first_order.lerp_(linear * self._averaged, part)

    def serving_state(self) -> dict[str, torch.Tensor]:
        """Copies of the averages on the CPU, by the names that snapshots use."""
        return {
            "typical.embedding": self.embedding.to("cpu", copy=True),
            "typical.first_order": self.first_order.to("cpu", copy=True),
        }

    def restore(self, serving: Mapping[str, torch.Tensor]) -> None:
        """Replaces the averages by saved ones; by 0 for a version without them. Raises SnapshotMismatch for another shape."""
        if "typical.embedding" not in serving:
            self.embedding.zero_()
            self.first_order.zero_()
            return
        embedding = take(serving, "typical.embedding", tuple(self.embedding.shape))
        self.first_order.copy_(take(serving, "typical.first_order", tuple(self.first_order.shape)))
        self.embedding.copy_(embedding)
