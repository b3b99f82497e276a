"""The digest of a model's serving weights: 64 bits that are equal on trainer and scorers exactly if the weights are.

    digest = sum of the rows' hashes + hash of the dense parameters        (mod 2**64)

The sum doesn't depend on the order of the rows, so a replica keeps it current from the rows that change: it takes away the
hashes of their old weights and adds those of the new ones. A row's hash is

    mix(A key + sum over columns of C_j w_j)                               (mod 2**64)

with w_j the 32 bits of a weight or of a count (`model.history`), A and C_j fixed odd numbers, and `mix` the finaliser of
SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). The inner sum is multilinear hashing (Carter and Wegman, "Universal classes of
hash functions", JCSS 1979).

It finds accidents: a row that is missing, stale or left over, a bit that flipped. It is no protection against somebody who
chooses weights so that digests collide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from model.rows import Rows

__all__ = ["dense_hash", "digest_sum", "row_hashes"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1
_SEED = 0x6865616472616365  # "headrace"
# Rows that are hashed at once: their words, 16 to 64 int64 a row, stay in the processor's cache.
_CHUNK = 4096


def row_hashes(rows: Rows) -> torch.Tensor:
    """Hashes int64 (N,) of rows, on the device of the rows."""
    dim = rows.embedding.shape[1]
    factors = _factors(dim, rows.keys.device)
    words = rows.embedding.contiguous().view(torch.int32)
    # The columns that aren't part of the embedding, with their factors.
    others = [(rows.first_order.contiguous().view(torch.int32), factors[1])]
    if rows.history is not None:
        counts = rows.history.contiguous().view(torch.int32)
        others += [(counts[:, column], factors[2 + dim + column]) for column in range(2)]
    if rows.keys.device.type == "cpu":
        in_numpy = [(column.numpy(), np.int64(factor)) for column, factor in others]
        return torch.from_numpy(_hashes(rows.keys.numpy(), words.numpy(), in_numpy, factors[: 2 + dim].numpy()))
    total = words.to(torch.int64).mul_(factors[2 : 2 + dim]).sum(1)
    for column, factor in others:
        total.add_(column.to(torch.int64).mul_(factor))
    return _mix(total.add_(rows.keys * factors[0]))


def _hashes(
    keys: Int64Array, words: Int32Array, others: Sequence[tuple[Int32Array, np.int64]], factors: Int64Array
) -> Int64Array:
    """Hashes (N,) of rows on the CPU, in buffers that are used again: new ones for each chunk take as long as the sums."""
    out = np.empty(len(keys), np.int64)
    wide, other = np.empty((_CHUNK, words.shape[1]), np.int64), np.empty(_CHUNK, np.int64)
    of_columns = np.ascontiguousarray(factors[2:])
    for start in range(0, len(keys), _CHUNK):
        part = slice(start, start + _CHUNK)
        total = out[part]
        count = len(total)
        wide[:count] = words[part]
        np.matmul(wide[:count], of_columns, out=total)
        buffer = other[:count]
        for column, odd in others:
            np.multiply(column[part], odd, out=buffer)
            total += buffer
        np.multiply(keys[part], factors[0], out=buffer)
        total += buffer
        mixed, shifted = total.view(np.uint64), buffer.view(np.uint64)
        for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            np.right_shift(mixed, np.uint64(bits), out=shifted)
            mixed ^= shifted
            mixed *= np.uint64(factor)
        np.right_shift(mixed, np.uint64(31), out=shifted)
        mixed ^= shifted
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


@lru_cache
def _factors(dim: int, device: torch.device) -> torch.Tensor:
    """Odd factors int64 (4 + D,): of the key, of the first-order weight, of the embedding's D columns, of the two counts."""
    counter = torch.arange(1, dim + 5, dtype=torch.int64) * -7046029254386353131 + _SEED  # SplitMix64's increment
    return (_mix(counter) | 1).to(device)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, in place; the masks make the shifts logical."""
    x.bitwise_xor_((x >> 30) & ((1 << 34) - 1)).mul_(-4658895280553007687)
    x.bitwise_xor_((x >> 27) & ((1 << 37) - 1)).mul_(-7723592293110705685)
    return x.bitwise_xor_((x >> 31) & ((1 << 33) - 1))
