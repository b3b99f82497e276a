"""Rows of serving weights, as they leave the trainer and arrive at scorers, and what the model changed in an interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["ModelDelta", "RowPrecision", "Rows", "rounded"]

RowPrecision = Literal["float32", "float16"]
"""What scorers have of a row: its weights, or these rounded to float16."""


@dataclass(frozen=True, slots=True)
class Rows:
    """N rows of serving weights on the CPU, each with a key of its own.

    keys         int64 (N,)
    embedding    float32 (N, D)
    first_order  float32 (N,)
    """

    keys: torch.Tensor
    embedding: torch.Tensor
    first_order: torch.Tensor

    def __len__(self) -> int:
        return len(self.keys)


def rounded(rows: Rows, precision: RowPrecision) -> Rows:
    """Rows as scorers have them. All tensors are float32 still.

    Numbers are rounded to the nearest one of float16, ties to even, on every device alike. Those below 6e-5 lose digits, and
    those below 3e-8 become 0. Numbers beyond 65,504 become infinite, which a trainer doesn't publish.
    """
    if precision == "float32":
        return rows
    return Rows(rows.keys, rows.embedding.half().float(), rows.first_order.half().float())


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
