"""The digest of a model's serving weights: 64 bits that are equal on trainer and scorers exactly if the weights are.

    digest = sum of the rows' hashes + hash of the dense parameters        (mod 2**64)

The sum doesn't depend on the order of the rows, so a replica keeps it current from the rows that change: it takes away the
hashes of their old weights and adds those of the new ones. A row's hash is

    mix(A key + sum over columns of C_j w_j)                               (mod 2**64)

with w_j the 32 bits of a weight, A and C_j fixed odd numbers, and `mix` the finaliser of SplitMix64 (Steele, Lea and Flood,
OOPSLA 2014). The inner sum is multilinear hashing (Carter and Wegman, "Universal classes of hash functions", JCSS 1979).

It finds accidents: a row that is missing, stale or left over, a bit that flipped. It is no protection against somebody who
chooses weights so that digests collide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch

from model.rows import Rows

__all__ = ["dense_hash", "digest_sum", "row_hashes"]

_MASK = (1 << 64) - 1
_SEED = 0x6865616472616365  # "headrace"
# Rows that are hashed at once: their words, 16 to 64 int64 a row, stay in the processor's cache.
_CHUNK = 4096


def row_hashes(rows: Rows) -> torch.Tensor:
    """Hashes int64 (N,) of rows, on the device of the rows."""
    factors = _factors(rows.embedding.shape[1], rows.keys.device)
    out = torch.empty_like(rows.keys)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        total = _weighted_sums(rows.embedding[part].contiguous().view(torch.int32), factors[2:])
        total.add_(rows.first_order[part].contiguous().view(torch.int32).to(torch.int64).mul_(factors[1]))
        total.add_(rows.keys[part] * factors[0])
        out[part] = _mix(total)
    return out


def digest_sum(hashes: torch.Tensor) -> int:
    """The sum of hashes (N,) modulo 2**64, from 0 to 2**64 - 1."""
    return int(hashes.sum()) & _MASK


def dense_hash(dense: Mapping[str, torch.Tensor]) -> int:
    """The hash of dense parameters on the CPU, from 0 to 2**64 - 1. It depends on names, shapes and bits."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(dense):
        tensor = dense[name].contiguous()
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(tensor.numpy().data)
    return int.from_bytes(digest.digest(), "little")


def _weighted_sums(words: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The sums int64 (N,) of int32 words (N, D), each times the factor (D,) of its column, modulo 2**64."""
    if words.device.type == "cpu":  # numpy multiplies matrices of integers in one pass: half the time
        return torch.from_numpy(words.numpy().astype(np.int64) @ factors.numpy())
    return words.to(torch.int64).mul_(factors).sum(1)


@lru_cache
def _factors(dim: int, device: torch.device) -> torch.Tensor:
    """Odd factors int64 (2 + D,): of the key, of the first-order weight, of each column of the embedding."""
    counter = torch.arange(1, dim + 3, dtype=torch.int64) * -7046029254386353131 + _SEED  # SplitMix64's increment
    return (_mix(counter) | 1).to(device)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, in place; the masks make the shifts logical."""
    x.bitwise_xor_((x >> 30) & ((1 << 34) - 1)).mul_(-4658895280553007687)
    x.bitwise_xor_((x >> 27) & ((1 << 37) - 1)).mul_(-7723592293110705685)
    return x.bitwise_xor_((x >> 31) & ((1 << 33) - 1))
