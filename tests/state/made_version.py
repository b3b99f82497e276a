"""Small versions for tests: a model of a few rows, in several pieces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.rows import Rows
from state.manifest import Manifest
from state.pieces import Piece
from state.settings import SnapshotSettings
from state.store import SnapshotStore

__all__ = ["FILES", "ROWS", "at", "folder", "pieces", "serving", "small_pieces", "trainer", "write"]

ROWS, DIM = 5, 3

# With `small_pieces`, which has two rows in a piece; in the order in which they are written.
FILES = [
    "dense.safetensors",
    *(f"{kind}-{index:05d}.safetensors" for index in range(3) for kind in ("serving", "trainer")),
    "trainer.safetensors",
    "manifest.json",
]


def at(path: Path | str) -> SnapshotStore:
    return SnapshotStore(SnapshotSettings(url=str(path)))


def folder(root: Path, version: int) -> Path:
    return root / f"v{version:010d}"


def small_pieces(monkeypatch: pytest.MonkeyPatch, rows: int = 2) -> None:
    """Pieces of `rows` rows from now on."""
    monkeypatch.setattr("state.pieces.PIECE_BYTES", rows * (4 * DIM + 32))


def serving(value: float, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """Serving tensors whose numbers are all different, and other ones for another `value`."""
    return {
        "keys": torch.arange(rows) + 100,
        "embedding": torch.arange(rows * DIM).view(rows, DIM) + value,
        "first_order": torch.arange(rows) - value,
        "mlp.0.weight": torch.full((2, 2), value),
        "bias": torch.tensor(value),
    }


def trainer(value: float, rows: int = ROWS) -> dict[str, torch.Tensor]:
    return {
        "adagrad.embedding": torch.arange(rows * DIM).view(rows, DIM) * value,
        "adagrad.first_order": torch.arange(rows) * value + 1,
        "deferred.owed": torch.arange(rows) / value,
        "deferred.since_ms": torch.arange(rows, dtype=torch.float64) + 1e12,
        "adam.step": torch.tensor(7),
        "kept.gate.state": torch.arange(10, dtype=torch.uint8),
    }


def pieces(value: float, *bounds: int) -> Iterator[Piece]:
    """The rows of `serving` and `trainer`, cut at `bounds`."""
    weights, state = serving(value), trainer(value)
    for start, end in zip((0, *bounds), (*bounds, ROWS), strict=True):
        part = slice(start, end)
        rows = Rows(weights["keys"][part], weights["embedding"][part], weights["first_order"][part])
        yield Piece(rows, {name: state[name][part] for name in state if name.startswith(("adagrad", "deferred"))})


def write(store: SnapshotStore, version: int, value: float = 1.0, *, state: bool = True) -> Manifest:
    """Write a version of one's own."""
    return store.write(Manifest(version=version), serving(value), trainer(value) if state else None)
