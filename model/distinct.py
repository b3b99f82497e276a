"""The distinct rows of a batch, and sums over the elements that read each of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

__all__ = ["Groups", "bags", "distinct_rows", "group", "put_rows"]

_LOW_HALF = (1 << 32) - 1


class Groups(NamedTuple):
    """N elements, grouped by the row that each of them reads.

    distinct  int64 (U,): the distinct rows, ascending
    inverse   int64 (N,): index in `distinct` of the row of each element
    order     int64 (N,): the elements group by group, in ascending order within each
    starts    int64 (U,): where in `order` each group begins
    """

    distinct: torch.Tensor
    inverse: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor


def group(rows: torch.Tensor) -> Groups:
    """Groups elements by their rows (N,), numbers from 0 to 2**31 - 1.

    Rows in ascending order also make the reads and writes of a batch's rows faster: neighbours are near in memory.
    """
    both = (rows << 32).bitwise_or_(torch.arange(len(rows), device=rows.device))
    on_cpu = rows.device.type == "cpu"  # where numpy is several times as fast as torch
    if on_cpu:
        both.numpy().sort()
    else:
        both = both.sort().values
    sorted_rows, order = both >> 32, both.bitwise_and_(_LOW_HALF)
    begins = torch.ones_like(rows, dtype=torch.bool)
    torch.ne(sorted_rows[1:], sorted_rows[:-1], out=begins[1:])
    starts = torch.from_numpy(np.flatnonzero(begins.numpy())) if on_cpu else begins.nonzero().squeeze(1)
    inverse = torch.empty_like(order).scatter_(0, order, begins.cumsum(0).sub_(1))
    return Groups(sorted_rows.index_select(0, starts), inverse, order, starts)


def bags(
    values: torch.Tensor, index: torch.Tensor, starts: torch.Tensor, weights: torch.Tensor | None = None, *, mean: bool = False
) -> torch.Tensor:
    """Sums or means (U, D) of those rows of `values` that the parts of `index` name, added in their order.

    values   float32 (M, D)
    index    int64 (N,): numbers of rows, part by part
    starts   int64 (U,): where in `index` each part begins
    weights  float32 (N,): factor of each row that `index` names, for sums alone; 1 when None

    It is torch's kernel for bags of embeddings, which reads each row once and writes each sum once. On a CPU it takes a seventh
    of the time of `index_add_`. `torch.nn.functional.embedding_bag` also prepares a backward pass, which takes longer than the
    sums.
    """
    return torch._embedding_bag_forward_only(values, index, starts, False, int(mean), False, weights)[0]


def put_rows(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Writes values (U, D) into rows (U,) of `target` (R, D). Both are contiguous; it does the same as `index_copy_`.

    For rows of many floats, numpy copies each as one piece of memory, which takes a third of the time on a CPU.
    """
    if target.device.type != "cpu":
        target.index_copy_(0, rows, values)
        return
    piece = f"V{target.shape[1] * target.itemsize}"
    np.put(target.numpy().view(piece), rows.numpy(), values.numpy().view(piece), mode="clip")


def distinct_rows(rows: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Distinct rows (U,) of `rows` (N,), in no particular order, found without sorting.

    scratch  int32, longer than the largest row number; its contents don't matter before and have no meaning after

    Each row's cell of `scratch` gets one of the positions at which the row occurs in `rows`, and that position represents it.
    """
    positions = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    scratch.scatter_(0, rows, positions)  # any one of a row's positions may win
    return rows[scratch.index_select(0, rows) == positions]
