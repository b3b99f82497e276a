"""Room for tensors that grow: address space is taken at once, memory only as it is written to.

A table that grows by copying stops for as long as the copy takes (2.6 s at 8 M rows), and needs the old and the new memory
meanwhile. Address space costs nothing on a 64-bit system, so a table that reserves as many rows as the machine's memory could
hold never has to be copied. Memory counts as used (RSS) page by page, with the first write to a page; what was only read, or
never touched, costs nothing and reads as zeros.
"""

from __future__ import annotations

import math
import mmap
import os
import platform
import sys

import torch

__all__ = ["reservable_rows", "reserved"]

# Linux' number of the flag, which the module mmap names from Python 3.13 on. It is another one on processors that aren't here.
_NO_RESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64", "riscv64") else None


def reserved(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros on the CPU whose memory is only taken as it is written to.

        weights = reserved((reservable_rows(1 << 16, row_bytes=64), 16), torch.float32)
        weights[:10] = 1  # takes one page

    It has its memory to itself, and the memory goes back to the system when the last tensor that shares it is gone. Don't use
    operations that write to all of it, such as `clone`, `fill_` or `to`: they take memory for the whole shape.

    Where the system can't reserve address space, this is `torch.zeros`. RuntimeError is raised if that much isn't there either.
    """
    mapping = _mapping(math.prod(shape) * dtype.itemsize)
    if mapping is None:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype).view(shape)  # the tensor keeps the mapping


def reservable_rows(least: int, *, row_bytes: int) -> int:
    """How many rows to reserve: as many as this machine's memory could hold, at least `least`.

    row_bytes  bytes of a row in all tensors that are reserved for it

    Where the system can't reserve that much address space (another system than Linux, `vm.overcommit_memory = 2`, a limit by
    `ulimit -v`), this is `least`, and a table has to grow by copying.
    """
    most = _memory_bytes() // row_bytes
    if most <= least or _mapping(most * row_bytes) is None:
        return least
    return most


def _mapping(size: int) -> mmap.mmap | None:
    """Private anonymous memory of `size` bytes that the system doesn't set anything aside for; None if it has no such thing."""
    if _NO_RESERVE is None or size == 0:
        return None
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except (OSError, OverflowError):
        return None


def _memory_bytes() -> int:
    """Memory of this machine, 0 where the system doesn't say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
