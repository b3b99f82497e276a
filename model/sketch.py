"""How often keys without a row were seen, in bounded memory: a count-min sketch that forgets.

A key has one counter in each of DEPTH arrays, and its count is the least of them (Cormode and Muthukrishnan, "An improved data
stream summary: the count-min sketch", J. Algorithms 2005). Only counters that are too low are raised ("conservative update",
Estan and Varghese, SIGCOMM 2002, section 3.2). So a count is never too low, and is too high only if other keys share all
counters. After as many additions as an array has counters, all counters and the number of additions are halved, as in TinyLFU
(Einziger, Friedman and Manes, ACM Transactions on Storage 2017, section 3.3). Of keys that were never seen, 4 % are counted too
high until the first time, and 0.6 % later.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["Sketch"]

DEPTH = 4
LARGEST = 255
"""A counter is a byte, and stays at this number."""


class Sketch:
    """Counts of keys.

        sketch = Sketch(1 << 20, torch.device("cpu"))   # a MiB of counters
        counts = sketch.seen(keys, times)               # how often each of the distinct keys was seen, these times included
        sketch.add(keys, times)                         # the same, and these times are counted from now on

    Nothing is drawn at random, so a sketch that is saved and restored goes on as it would have.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        width = max(size // DEPTH, 1)
        self.width = 1 << (width.bit_length() - 1)
        self._counters = torch.zeros(DEPTH * self.width, dtype=torch.uint8, device=device)
        self._starts = torch.arange(DEPTH, device=device) * self.width
        self._steps = torch.arange(DEPTH, device=device)
        self._added = 0

    def seen(self, keys: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """How often distinct keys (N,) were seen, now (N,) and before, int64 (N,)."""
        return self._counts(self._cells(keys), times)

    def _counts(self, cells: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        before = self._counters.index_select(0, cells.flatten()).view(cells.shape).amin(1)
        return (before.to(torch.int64) + times).clamp_(max=LARGEST)

    def add(self, keys: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Adds how often distinct keys (N,) were seen now (N,). Returns how often they were seen in all, int64 (N,)."""
        cells = self._cells(keys)  # (N, DEPTH)
        counts = self._counts(cells, times)
        raised = counts.to(torch.uint8).unsqueeze(1).expand(cells.shape)
        self._counters.scatter_reduce_(0, cells.flatten(), raised.flatten(), "amax")
        self._added += len(keys)
        if self._added >= self.width:
            self._counters.bitwise_right_shift_(1)  # 8 MiB take 1 ms, 32 MiB 12 ms
            self._added //= 2
        return counts

    def _cells(self, keys: torch.Tensor) -> torch.Tensor:
        """The counters of each key, (N, DEPTH), by double hashing (Kirsch and Mitzenmacher, ESA 2006)."""
        mixed = (keys ^ ((keys >> 32) & 0xFFFFFFFF)) * -4658895280553007687
        first = (mixed >> 32) & 0xFFFFFFFF
        step = ((mixed ^ (first * 0x9E3779B1)) & 0xFFFFFFFF) | 1
        return (first.unsqueeze(1) + step.unsqueeze(1) * self._steps).bitwise_and_(self.width - 1).add_(self._starts)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU, for `restore`."""
        return {"counters": self._counters.to("cpu", copy=True), "added": torch.tensor(self._added)}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from what `state` gave. Begins from nothing with none, and with one of another size."""
        counters, added = state.get("counters"), state.get("added")
        if counters is None or added is None or counters.shape != self._counters.shape or counters.dtype != torch.uint8:
            self._counters.zero_()
            self._added = 0
            return
        self._counters.copy_(counters)
        self._added = int(added)
