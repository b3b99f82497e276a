"""Serving weights as the checker keeps them: dictionaries and numpy, without the product's code for weights and digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Point", "Weights", "digest"]

Array = npt.NDArray[np.generic]
GOLDEN, SEED = 0x9E3779B97F4A7C15, 0x6865616472616365
ROW_TENSORS = ("keys", "embedding", "first_order")


class Point(NamedTuple):
    """The weights after delta `sequence` of a chain."""

    chain: str
    sequence: int


@dataclass(frozen=True)
class Weights:
    """Rows by key, each its embedding and then its first-order weight as bytes; dense tensors by name."""

    rows: dict[int, bytes]
    dense: dict[str, Array]
    rate: float = 1.0

    @classmethod
    def of(cls, tensors: Mapping[str, Array], rate: float = 1.0) -> Weights:
        """From all serving tensors by name."""
        joined = np.column_stack([tensors["embedding"], tensors["first_order"]]).astype("<f4", copy=False)
        rows = {int(key): row.tobytes() for key, row in zip(tensors["keys"].tolist(), joined, strict=True)}
        return cls(rows, {name: np.array(each) for name, each in tensors.items() if name not in ROW_TENSORS}, rate)

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return len(next(iter(self.rows.values()), b""))

    def tensors(self) -> dict[str, Array]:
        """All serving tensors by name, the rows in the order of their keys."""
        keys = sorted(self.rows)
        joined = np.frombuffer(b"".join(self.rows[key] for key in keys), "<f4")
        joined = joined.reshape(len(keys), -1) if keys else joined.reshape(0, 2)
        return {
            **self.dense,
            "keys": np.array(keys, np.int64),
            "embedding": joined[:, :-1].copy(),
            "first_order": joined[:, -1].copy(),
        }


def digest(weights: Weights) -> str:
    """The digest that docs/events.md describes, computed whole."""
    names = hashlib.blake2b(digest_size=8)
    for name in sorted(weights.dense):
        tensor = np.ascontiguousarray(weights.dense[name])
        names.update(f"{name}:{tuple(tensor.shape)}:torch.{tensor.dtype};".encode())
        names.update(tensor.tobytes())
    total = int.from_bytes(names.digest(), "little")
    if weights.rows:
        found = weights.tensors()
        words = np.column_stack([found["first_order"], found["embedding"]]).astype("<f4").view("<i4").astype(np.int64)
        counter = np.arange(1, words.shape[1] + 2, dtype=np.uint64) * np.uint64(GOLDEN)
        factors = _mixed(counter + np.uint64(SEED)) | np.uint64(1)
        sums = (words.view(np.uint64) * factors[1:]).sum(1, dtype=np.uint64)
        hashes = _mixed(sums + found["keys"].view(np.uint64) * factors[0])
        total += int(hashes.sum(dtype=np.uint64))
    return f"{total % (1 << 64):016x}"


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
