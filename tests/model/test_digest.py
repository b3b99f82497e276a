from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.digest import _factors, digest_sum, row_hashes
from model.rows import Rows

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=(gpu, pytest.mark.gpu))])

MASK = (1 << 64) - 1


def rows_of(count: int, dim: int, *, history: bool = False) -> Rows:
    generator = torch.Generator().manual_seed(count)
    keys = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)
    rows = Rows(keys, torch.randn(count, dim, generator=generator), torch.randn(count, generator=generator))
    return replace(rows, history=torch.rand(count, 2, generator=generator).mul_(2**20)) if history else rows


def defined(rows: Rows, row: int) -> int:
    """The hash of one row by its definition, in Python's integers."""
    key_factor, first_factor, *factors = _factors(rows.embedding.shape[1], torch.device("cpu")).tolist()
    x = key_factor * int(rows.keys[row]) + first_factor * int(rows.first_order[row].view(torch.int32))
    counts = [] if rows.history is None else rows.history[row].view(torch.int32).tolist()
    words = [*rows.embedding[row].view(torch.int32).tolist(), *counts]
    x += sum(factor * word for factor, word in zip(factors, words, strict=len(counts) > 0))
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@devices
@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize(("count", "dim"), [(0, 4), (1, 1), (5000, 16), (9000, 3)])
def test_hashes_are_as_defined(count: int, dim: int, history: bool, device: str) -> None:
    rows = rows_of(count, dim, history=history)
    found = row_hashes(rows.map(lambda part: part.to(device))).cpu()
    assert found.shape == (count,)
    for row in range(0, count, 499):
        assert int(found[row]) & MASK == defined(rows, row)
    assert digest_sum(found) == sum(int(each) & MASK for each in found) & MASK


def test_the_hash_of_a_row_never_changes() -> None:
    rows = Rows(torch.tensor([7, -1]), torch.tensor([[1.0, -2.0], [0.0, 3.5]]), torch.tensor([0.25, -0.0]))
    assert row_hashes(rows).tolist() == [525594837089681287, 5935940413700397726]


def test_parts_of_larger_tensors_have_the_same_hashes() -> None:
    rows = rows_of(300, 8)
    wide = torch.zeros(300, 16)
    wide[:, :8] = rows.embedding
    pairs = torch.stack((rows.first_order, rows.first_order), dim=1)
    assert torch.equal(row_hashes(Rows(rows.keys, wide[:, :8], pairs[:, 1])), row_hashes(rows))
    assert torch.equal(row_hashes(Rows(rows.keys[7:9], rows.embedding[7:9], rows.first_order[7:9])), row_hashes(rows)[7:9])


@pytest.mark.parametrize("column", range(4))
def test_every_bit_counts(column: int) -> None:
    rows = rows_of(1, 4)
    before = row_hashes(rows)
    for bit in range(32):
        rows.embedding.view(torch.int32)[0, column] ^= int(np.int32(1 << bit if bit < 31 else -(1 << 31)))
        assert not torch.equal(row_hashes(rows), before)
        rows.embedding.view(torch.int32)[0, column] ^= int(np.int32(1 << bit if bit < 31 else -(1 << 31)))
    assert torch.equal(row_hashes(rows), before)
