"""Deltas of made-up weights, for tests."""

from __future__ import annotations

from typing import Any

import torch

from model.rows import ModelDelta, Rows
from stream.records.delta import DeltaHeader, Point, encode_delta

__all__ = ["header", "model_delta", "pieces", "same"]


def header(sequence: int = 1, *, chain: str = "deepfm/1/0", **more: Any) -> DeltaHeader:
    parent = Point(chain, sequence - 1)
    stated = {"offsets": {"0": 7}, "watermark_ms": 5, "examples_seen": 3, "negative_rate": 1.0, "at_ms": 9, **more}
    return DeltaHeader(chain=chain, sequence=sequence, parent=parent, **stated)


def model_delta(
    rows: int = 3,
    dim: int = 2,
    *,
    gone: int = 1,
    dense: dict[str, tuple[int, ...]] | None = None,
    history: bool = False,
    seed: int = 0,
) -> ModelDelta:
    made = torch.Generator().manual_seed(seed)
    keys = torch.randint(-(2**63), 2**63 - 1, (rows + gone,), generator=made)
    weights = torch.randn(rows, dim, generator=made), torch.randn(rows, generator=made)
    kept = Rows(keys[:rows], *weights, torch.rand(rows, 2, generator=made).mul_(2**20) if history else None)
    tensors = None if dense is None else {name: torch.randn(shape, generator=made) for name, shape in dense.items()}
    return ModelDelta(kept, keys[rows:], tensors, int(torch.randint(0, 2**62, (), generator=made)) * 4 + 3)


def pieces(sequence: int = 1, *, count: int = 1, chain: str = "deepfm/1/0", limit: int = 65_536) -> list[bytes]:
    """A delta in so many pieces: its rows are as many as fill them."""
    delta = model_delta(rows=(count - 1) * limit // 76 + 10, dim=16, seed=sequence)
    encoded = encode_delta(header(sequence, chain=chain), delta, limit)
    assert len(encoded) == count
    return encoded


def same(left: ModelDelta, right: ModelDelta) -> bool:
    """Equal in every bit."""
    mine, theirs = (each.rows.parts() for each in (left, right))
    if [*mine] != [*theirs]:
        return False
    columns = [(left.gone, right.gone), *((_bits(mine[name]), _bits(theirs[name])) for name in mine)]
    if (left.dense is None) != (right.dense is None) or left.digest != right.digest:
        return False
    if left.dense is not None and right.dense is not None:
        if list(left.dense) != list(right.dense):
            return False
        columns += [(left.dense[name].view(torch.int32), right.dense[name].view(torch.int32)) for name in left.dense]
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in columns)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32) if tensor.is_floating_point() else tensor
