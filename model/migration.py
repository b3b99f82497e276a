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
from typing import NamedTuple

import torch

from model.errors import SnapshotMismatch
from model.network import HISTORY_NUMBERS, dense_model
from model.schema import FieldSpec
from model.schema_change import SchemaChange
from model.settings import ModelSettings

__all__ = ["moved_dense", "moved_trainer", "require_movable"]

_MOMENTS = ("adam.exp_avg", "adam.exp_avg_sq")
"""Tensors of the optimizer that lie as the dense part's flat buffer does."""


class _Axis(NamedTuple):
    """What lies along an axis of a parameter: `each` inputs for each field, then `rest` that belong to no field.

    First come the `embedded` ones of each field, which are the D floats of an embedding or none, field by field; then the
    others of each field.
    """

    each: int
    embedded: int
    rest: int


def require_movable(change: SchemaChange, settings: ModelSettings) -> None:
    """Raises SnapshotMismatch if a model of these settings can't go on with other fields."""
    if not change.moves_nothing:
        _axes(change, settings)


def moved_dense(change: SchemaChange, dense: Mapping[str, torch.Tensor], settings: ModelSettings) -> dict[str, torch.Tensor]:
    """The serving tensors that are no rows, as the new schema has them. Other tensors among them stay as they are.

    settings  the model's, which don't change

    Raises:
        SnapshotMismatch: this model's parameters can't be moved.
    """
    moved = dict(dense)
    if change.moves_nothing:
        return moved
    for name, axes in _axes(change, settings).items():
        if name in moved and moved[name].dim() == len(axes):  # else restoring says what is wrong with it
            moved[name] = _moved(change, moved[name], axes)
    for name in ("typical.embedding", "typical.first_order"):
        if name in moved:
            moved[name] = _picked(moved[name], 0, change.came_from)
    return moved


def moved_trainer(change: SchemaChange, small: Mapping[str, torch.Tensor], settings: ModelSettings) -> dict[str, torch.Tensor]:
    """The trainer's tensors that are no rows, as the new schema has them. New inputs have moments of 0.

    settings  the model's, which don't change

    Raises:
        SnapshotMismatch: this model's parameters can't be moved.
    """
    moved = dict(small)
    if change.moves_nothing:
        return moved
    cpu = torch.device("cpu")
    old, new = dense_model(change.before, settings, cpu), dense_model(change.after, settings, cpu)
    for name in _MOMENTS:
        if name not in moved or len(moved[name]) != len(old.parameters):
            continue  # restoring says what is wrong with it
        flat = torch.zeros_like(new.parameters)
        for each, axes in _axes(change, settings).items():
            before, after = old.named[each], new.named[each]
            part = _part(moved[name], before)
            _part(flat, after).copy_(_moved(change, part, axes))
        moved[name] = flat
    return moved


def _part(flat: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """The part of a flat buffer that a parameter has in its own."""
    return flat[view.storage_offset() : view.storage_offset() + view.numel()].view(view.shape)


def _axes(change: SchemaChange, settings: ModelSettings) -> dict[str, tuple[_Axis, ...]]:
    """The axes of each parameter of the dense part, as the sizes of models with one field more, and two more, say them."""
    nowhere, schemas = torch.device("meta"), [change.before]
    for more in range(2):
        fields = (*schemas[-1].fields, FieldSpec(name=f"\0{more}"))
        schemas.append(change.before.model_copy(update={"fields": fields}))
    count = len(change.before.fields)
    besides = HISTORY_NUMBERS if settings.row_history else 0
    models = [dense_model(schema, settings, nowhere) for schema in schemas]
    found = {}
    for name in models[0].named:
        axes = []
        for size, one_more, two_more in zip(*(model.named[name].shape for model in models), strict=True):
            each = one_more - size
            if two_more - one_more != each:
                raise SnapshotMismatch(
                    f"model.name = {settings.name}: expected parameters with as many inputs for each field, found {name}, "
                    "which has inputs for pairs of fields. Such a model can't go on with other fields: put features.fields "
                    "back, or begin a new model"
                )
            axes.append(_Axis(each, max(each - besides, 0), size - count * each))
        found[name] = tuple(axes)
    return found


def _moved(change: SchemaChange, parameter: torch.Tensor, axes: Sequence[_Axis]) -> torch.Tensor:
    """A parameter with the inputs of each field where the field is now."""
    count = len(change.before.fields)
    for number, axis in enumerate(axes):
        if not axis.each:
            continue
        index: list[int | None] = []
        for start, width in ((0, axis.embedded), (count * axis.embedded, axis.each - axis.embedded)):
            for field in change.came_from:
                index += [None] * width if field is None else range(start + field * width, start + (field + 1) * width)
        index += range(count * axis.each, count * axis.each + axis.rest)
        parameter = _picked(parameter, number, index)
    return parameter


def _picked(tensor: torch.Tensor, axis: int, index: Sequence[int | None]) -> torch.Tensor:
    """Slices of a tensor along an axis; zeros where the index is None."""
    at = torch.tensor([-1 if each is None else each for each in index], dtype=torch.int64, device=tensor.device)
    shape = [-1 if each == axis else 1 for each in range(tensor.dim())]
    return tensor.index_select(axis, at.clamp_min(0)).masked_fill((at < 0).view(shape), 0)
