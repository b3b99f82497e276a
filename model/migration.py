"""Going on with other fields: what of a version stays, when the schema of the settings isn't the one that it was trained with.

Rows belong to keys, and a key says nothing of the schema, so all rows stay. What depends on the fields is the dense part, which
reads them side by side, and the average row of each field. Both are moved to where the fields are now:

    a field that is the same   keeps its inputs of the dense part, with the optimizer's state, and its average row
    a field that is new        begins with inputs of weight 0 and an average row of 0
    a field that is gone       takes its inputs with it; its rows stay, and nobody reads them

An unknown value reads the average row. So, at the moment of the change, a new field adds 0 to every logit, and the scores are
what they were. It learns from then on. A new field that shares the space of an earlier field reads rows that exist, so scores
change at once: by first-order weights and, in a factorization machine, by products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from model.network import dense_model
from model.schema_change import SchemaChange
from model.settings import ModelSettings

__all__ = ["moved_dense", "moved_trainer"]

_WIDE_AXES = {"mlp.0.weight": (1,)}
"""Axes of the dense part's parameters along which the inputs lie: the fields' embeddings side by side."""

_MOMENTS = ("adam.exp_avg", "adam.exp_avg_sq")
"""Tensors of the optimizer that lie as the dense part's flat buffer does."""


def moved_dense(change: SchemaChange, dense: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The serving tensors that are no rows, as the new schema has them. Other tensors among them stay as they are."""
    moved = dict(dense)
    if change.is_none:
        return moved
    for name, axes in _WIDE_AXES.items():
        if name in moved:
            moved[name] = _moved(change, moved[name], axes)
    for name in ("typical.embedding", "typical.first_order"):
        if name in moved:
            moved[name] = _picked(moved[name], 0, change.came_from)
    return moved


def moved_trainer(change: SchemaChange, small: Mapping[str, torch.Tensor], settings: ModelSettings) -> dict[str, torch.Tensor]:
    """The trainer's tensors that are no rows, as the new schema has them. New inputs have moments of 0.

    settings  the model's, which don't change
    """
    moved = dict(small)
    if change.is_none:
        return moved
    cpu = torch.device("cpu")
    old, new = dense_model(change.before, settings, cpu), dense_model(change.after, settings, cpu)
    for name in _MOMENTS:
        if name not in moved or len(moved[name]) != len(old.parameters):
            continue  # restoring says what is wrong with it
        flat = torch.zeros_like(new.parameters)
        for each, view in new.named.items():
            before = old.named[each]
            start = before.storage_offset()
            part = moved[name][start : start + before.numel()].view(before.shape)
            start = view.storage_offset()
            flat[start : start + view.numel()] = _moved(change, part, _WIDE_AXES.get(each, ())).reshape(-1)
        moved[name] = flat
    return moved


def _moved(change: SchemaChange, parameter: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """A parameter with the inputs along these axes where the fields are now."""
    dim = change.after.embedding_dim
    for axis in axes:
        wide = len(change.before.fields) * dim
        index: list[int | None] = []
        for before in change.came_from:
            index += [None] * dim if before is None else list(range(before * dim, (before + 1) * dim))
        index += range(wide, parameter.shape[axis])
        parameter = _picked(parameter, axis, index)
    return parameter


def _picked(tensor: torch.Tensor, axis: int, index: Sequence[int | None]) -> torch.Tensor:
    """Slices of a tensor along an axis; zeros where the index is None."""
    at = torch.tensor([-1 if each is None else each for each in index], dtype=torch.int64, device=tensor.device)
    shape = [-1 if each == axis else 1 for each in range(tensor.dim())]
    return tensor.index_select(axis, at.clamp_min(0)).masked_fill((at < 0).view(shape), 0)
