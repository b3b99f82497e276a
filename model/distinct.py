"""The distinct keys and rows of a batch, and sums over the elements that share one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from model.batch import Int64Array

__all__ = ["Groups", "bags", "distinct_rows", "group", "put_rows"]

_MULTIPLIER = np.int64(-7046029254386353131)  # 2**64 / golden ratio as a signed odd integer: Fibonacci hashing (Knuth, 6.4)


class Groups(NamedTuple):
    """N elements, grouped by a value of each, such as their keys or their rows.

    distinct  int64 (U,): the distinct values, in no particular order
    inverse   int64 (N,): index in `distinct` of the value of each element
    order     int64 (N,): the elements group by group, in ascending order within each
    starts    int64 (U,): where in `order` each group begins
    """

    distinct: torch.Tensor
    inverse: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor

    def members(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The elements (E,) of M different groups (M,), ascending, and the index (E,) among these of each one's group."""
        which = torch.full_like(self.starts, -1).index_copy_(0, groups, torch.arange(len(groups), device=groups.device))
        of_all = which.index_select(0, self.inverse)
        elements = (of_all >= 0).nonzero().squeeze(1)
        return elements, of_all.index_select(0, elements)


def group(values: torch.Tensor) -> Groups:
    """Groups elements by their values, int64 (N,)."""
    if values.device.type == "cpu":
        return Groups(*map(torch.from_numpy, _on_cpu(values.numpy())))
    together, order = values.sort(stable=True)
    begins = torch.ones_like(values, dtype=torch.bool)
    torch.ne(together[1:], together[:-1], out=begins[1:])
    starts = begins.nonzero().squeeze(1)
    inverse = torch.empty_like(order).scatter_(0, order, begins.cumsum(0).sub_(1))
    return Groups(together.index_select(0, starts), inverse, order, starts)


def _on_cpu(values: Int64Array) -> tuple[Int64Array, ...]:
    """The parts of `Groups`.

    numpy sorts numbers several times as fast as torch, but not pairs. So as many bits of a hash as fit beside an element's
    number are sorted with it.
    """
    bits = len(values).bit_length()
    number = (1 << bits) - 1
    words = values * _MULTIPLIER
    words &= ~number
    words |= np.arange(len(values))
    words.sort()
    order = words & number
    words >>= bits
    together = values[order]
    begins = _begins(together)
    starts = np.flatnonzero(begins)
    if np.count_nonzero(_begins(words)) != len(starts):  # the hashes of two values agree in these bits
        order = np.argsort(values, kind="stable")
        together = values[order]
        begins = _begins(together)
        starts = np.flatnonzero(begins)
    inverse = np.empty_like(order)
    inverse[order] = np.cumsum(begins) - 1
    return together[starts], inverse, order, starts


def _begins(values: Int64Array) -> npt.NDArray[np.bool_]:
    """Where a value differs from the one before; true for the first."""
    begins = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=begins[1:])
    return begins


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
