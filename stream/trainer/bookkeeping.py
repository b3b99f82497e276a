"""What the trainer keeps besides the model: saved in each version's trainer state, and restored at a start.

    training = Training(learner, cutter, evaluation, metrics, bookkeeping={"gate": gate}, ...)
    training.restore(start.bookkeeping)

Each part has a name. Its tensors are in `trainer.safetensors`, next to the learner's, as `kept.NAME.KEY`. A part begins from
nothing when the version has no tensors of that name, as in versions of older releases, or tensors in a layout that the part
doesn't know.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
import torch

from model.errors import ModelError

__all__ = [
    "PREFIX",
    "Bookkeeping",
    "State",
    "bookkeeping_in",
    "bookkeeping_state",
    "from_json",
    "restore_bookkeeping",
    "to_json",
]

log = logging.getLogger(__name__)

State = Mapping[str, torch.Tensor]
PREFIX = "kept."
"""Before the names of all tensors of bookkeeping in a version."""


class Bookkeeping(Protocol):
    """A part of the trainer whose state is saved in the versions. Both methods are called between two batches."""

    def state(self) -> State:
        """CPU tensors by key, contiguous, sharing no memory with what changes later.

        `to_json` makes a tensor of plain values.
        """
        ...

    def restore(self, state: State) -> None:
        """Go on from what `state` gave. Raises ModelError, before anything changes, for an unknown layout."""
        ...


def bookkeeping_state(parts: Mapping[str, Bookkeeping]) -> dict[str, torch.Tensor]:
    """The tensors of all parts, under their names in a version."""
    return {f"{PREFIX}{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state().items()}


def bookkeeping_in(trainer: State) -> dict[str, torch.Tensor]:
    """The tensors in a version's trainer state that belong to parts, and not to the learner."""
    return {name: tensor for name, tensor in trainer.items() if name.startswith(PREFIX)}


def restore_bookkeeping(parts: Mapping[str, Bookkeeping], saved: State) -> None:
    """Restore each part from its own tensors. A part that can't read them begins from nothing, which is logged."""
    for name, part in parts.items():
        prefix = f"{PREFIX}{name}."
        own = {full.removeprefix(prefix): tensor for full, tensor in saved.items() if full.startswith(prefix)}
        if not own:
            continue
        try:
            part.restore(own)
        except ModelError as error:
            log.warning("the version's state of %r can't be used, it begins from nothing: %s", name, error)


def to_json(value: object) -> torch.Tensor:
    """A value as JSON in a tensor of bytes. msgspec structs and dataclasses are allowed."""
    return torch.frombuffer(bytearray(msgspec.json.encode(value)), dtype=torch.uint8)


def from_json(tensor: torch.Tensor | None, type: Any = Any) -> Any:
    """The value that `to_json` was given, as `type`.

    Raises ModelError when there is no tensor, or when it holds something else.
    """
    if tensor is None:
        raise ModelError(f"saved state: expected JSON of {type}, found nothing")
    try:
        return msgspec.json.decode(tensor.numpy().tobytes(), type=type)
    except (msgspec.DecodeError, TypeError, RuntimeError) as error:
        raise ModelError(f"saved state: expected JSON of {type}, found something else: {error}") from error
