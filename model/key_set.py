"""A set of keys to which a few are added many times."""

from __future__ import annotations

import torch

__all__ = ["KeySet"]

# Keys that are collected before they are sorted: some ms.
_SORTED_AT_LEAST = 65_536


class KeySet:
    """It is sorted only once it has doubled, so adding a few keys to many costs what the few cost."""

    def __init__(self, device: torch.device) -> None:
        self._sorted = torch.empty(0, dtype=torch.int64, device=device)
        self._added: list[torch.Tensor] = []
        self._added_count = 0

    def __len__(self) -> int:
        """Number of keys, at least."""
        return len(self._sorted) + self._added_count

    def add(self, keys: torch.Tensor) -> None:
        """Adds keys (N,), which may repeat. The tensor is kept, so it must not be changed later."""
        self._added.append(keys)
        self._added_count += len(keys)
        if self._added_count > max(len(self._sorted), _SORTED_AT_LEAST):
            self.distinct()

    def distinct(self) -> torch.Tensor:
        """The keys (N,) in ascending order, each once."""
        if self._added_count:
            self._sorted = torch.unique(torch.cat((self._sorted, *self._added)))
        self._added, self._added_count = [], 0
        return self._sorted

    def clear(self) -> None:
        """Removes all keys."""
        self._sorted, self._added, self._added_count = self._sorted[:0], [], 0
