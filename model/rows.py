"""Rows of serving weights, as they leave the trainer and arrive at scorers, and what the model changed in an interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from model.growing import Column

__all__ = ["ROW_PARTS", "ModelDelta", "RowPrecision", "Rows", "rounded", "serving_columns"]

ROW_PARTS = ("keys", "embedding", "first_order", "history")
"""Names of the parts of `Rows`, which versions use, too. Only models with row history have the last one."""

RowPrecision = Literal["float32", "float16"]
"""What scorers have of a row: its weights, or these rounded to float16."""


@dataclass(frozen=True, slots=True)
class Rows:
    """N rows of serving weights on the CPU, each with a key of its own.

    keys         int64 (N,)
    embedding    float32 (N, D)
    first_order  float32 (N,)
    history      float32 (N, 2): examples and clicks (`model.history`); None in a model without row history
    """

    keys: torch.Tensor
    embedding: torch.Tensor
    first_order: torch.Tensor
    history: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(cls, parts: Mapping[str, torch.Tensor]) -> Rows:
        """Rows of their parts by name; others are ignored."""
        return cls(**{name: parts[name] for name in ROW_PARTS if name in parts})

    def parts(self) -> dict[str, torch.Tensor]:
        """The parts that there are, by name."""
        parts = {"keys": self.keys, "embedding": self.embedding, "first_order": self.first_order}
        return parts if self.history is None else {**parts, "history": self.history}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Rows:
        """Rows of what `change` makes of each part."""
        return Rows.of({name: change(part) for name, part in self.parts().items()})


def serving_columns(dim: int, *, history: bool) -> dict[str, Column]:
    """Columns for all parts of `Rows` but the keys."""
    columns = {"embedding": Column((dim,)), "first_order": Column()}
    return {**columns, "history": Column((2,))} if history else columns


def rounded(rows: Rows, precision: RowPrecision) -> Rows:
    """Rows as scorers have them. All tensors are float32 still.

    Numbers are rounded to the nearest one of float16, ties to even, on every device alike. Those below 6e-5 lose digits, and
    those below 3e-8 become 0. Numbers beyond 65,504 become infinite, which a trainer doesn't publish. Counts keep
    all their digits.
    """
    if precision == "float32":
        return rows
    return Rows(rows.keys, rows.embedding.half().float(), rows.first_order.half().float(), rows.history)


@dataclass(frozen=True, slots=True)
class ModelDelta:
    """What changed in the serving weights since the last delta: copies on the CPU.

    rows    the rows that were touched, with their present weights; a key is in `rows` or in `gone`, never in both
    gone    int64 (M,): keys of rows that were evicted
    dense   dense parameters and average rows by name, all of them; None: they stay as they are
    digest  of all serving weights once this is applied (`model.digest`)
    """

    rows: Rows
    gone: torch.Tensor
    dense: Mapping[str, torch.Tensor] | None
    digest: int
