"""The distinct rows of a batch, found without sorting."""

from __future__ import annotations

import torch

__all__ = ["distinct_rows", "unique_rows"]


def unique_rows(rows: torch.Tensor, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct rows (U,), in no particular order, and the inverse (N,): the index in them of each of `rows` (N,).

    scratch  int32, longer than the largest row number; its contents don't matter before and have no meaning after

    It needs no sorting: each row's cell of `scratch` gets one of the positions at which the row occurs in `rows`, and that
    position represents the row.
    """
    positions = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    scratch.scatter_(0, rows, positions)  # any one of a row's positions may win
    representative = scratch.index_select(0, rows)
    represents = representative == positions
    index = torch.cumsum(represents, 0).sub_(1)
    return rows[represents], index.index_select(0, representative)


def distinct_rows(rows: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Distinct rows (U,) of `rows` (N,), in no particular order; `scratch` as for `unique_rows`."""
    positions = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    scratch.scatter_(0, rows, positions)
    return rows[scratch.index_select(0, rows) == positions]
