"""Rows of serving weights, as they leave the trainer and arrive at scorers, and what the model changed in an interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["ModelDelta", "Rows"]


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
