"""What a field's rows are like on average: where a new value begins, and what an unknown one reads.

A new item, a new hour begins as the average of its field, not at zero. Zero is a place where the MLP is never trained: the rows
of a field share what they have learned in common (all hours of a day, say), and the MLP makes up for it. So a value at zero was
predicted up to seven times too high until its first labels came (docs/experiments.md).

The average is over examples, so that values count as often as they are shown, and forgets over HORIZON of them. With a short
one a new value would be a copy of the last, where a field has one at a time, as the hour.
"""

from __future__ import annotations

import torch

from model.embedding import take
from model.network import Elements
from model.schema import FeatureSchema

__all__ = ["HORIZON", "Typical"]

# Examples over which a field's rows are averaged.
HORIZON = 50_000


class Typical:
    """The typical row of each of F fields: the S single-valued ones, then the L lists.

    embedding    float32 (F, D)
    first_order  float32 (F,)

    A field whose embedding is scaled (`buckets = "scaled"`) has one row only, and keeps 0.
    """

    def __init__(self, schema: FeatureSchema, device: torch.device) -> None:
        singles = [field for field in schema.fields if field.kind != "list"]
        count = len(schema.fields)
        self._averaged = torch.ones(count, device=device)
        for at, field in enumerate(singles):
            if field.kind == "numeric" and field.buckets == "scaled":
                self._averaged[at] = 0.0
        self.embedding = torch.zeros((count, schema.embedding_dim), device=device)
        self.first_order = torch.zeros(count, device=device)

    def follow(
        self, elements: Elements, place: torch.Tensor, embedding: torch.Tensor, first_order: torch.Tensor, seen: int
    ) -> None:
        """Take in a batch.

        Args:
            place: where in `embedding` (R, D) and `first_order` (R,) each element's row is, (B*S + N,).
            seen: examples before it.
        """
        batch, at = elements.rows, elements.rows * elements.singles
        rows = embedding.index_select(0, place[:at]).view(batch, elements.singles, -1).mean(0)
        linear = first_order.index_select(0, place[:at]).view(batch, elements.singles).mean(0)
        if elements.list_of is not None and elements.list_share is not None:
            lists = elements.list_of % elements.lists
            share = elements.list_share / batch
            more = rows.new_zeros((elements.lists, rows.shape[1]))
            more.index_add_(0, lists, embedding.index_select(0, place[at:]) * share.unsqueeze(1))
            rows = torch.cat((rows, more))
            linear = torch.cat((linear, share.new_zeros(elements.lists).index_add_(0, lists, first_order[place[at:]] * share)))
        part = batch / min(seen + batch, max(HORIZON, batch))
        self.embedding.lerp_(rows * self._averaged.unsqueeze(1), part)
        self.first_order.lerp_(linear * self._averaged, part)

    def serving_state(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU."""
        return {
            "typical.embedding": self.embedding.to("cpu", copy=True),
            "typical.first_order": self.first_order.to("cpu", copy=True),
        }

    def restore(self, serving: dict[str, torch.Tensor]) -> None:
        """Takes over a saved state; all are 0 in a version from before there was any."""
        if "typical.embedding" not in serving:
            self.embedding.zero_()
            self.first_order.zero_()
            return
        embedding = take(serving, "typical.embedding", tuple(self.embedding.shape))
        self.first_order.copy_(take(serving, "typical.first_order", tuple(self.first_order.shape)))
        self.embedding.copy_(embedding)
