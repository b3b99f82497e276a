"""What the trainer keeps beside the model, saved in each version's trainer state and taken up again at a start.

    training = Training(learner, cutter, scores, metrics, kept={"gate": gate}, ...)
    training.restore(start.kept)

The parts' tensors stand beside the learner's in `trainer.safetensors`, as `kept.NAME.KEY`. A version that holds nothing under a
name, as one of an older release does, leaves that part as it began; so does one whose layout the part no longer knows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
import torch

from model.errors import ModelError

__all__ = ["Kept", "State", "from_json", "kept_of", "restore_kept", "state_of", "to_json"]

log = logging.getLogger(__name__)

State = Mapping[str, torch.Tensor]
_PREFIX = "kept."


class Kept(Protocol):
    """A part of the trainer whose state travels with the versions. Both methods are called between two batches."""

    def state(self) -> State:
        """CPU tensors by key, contiguous, sharing no memory with what changes later. `to_json` makes one of plain figures."""
        ...

    def restore(self, state: State) -> None:
        """Goes on from what `state` gave. Raises ModelError, before anything changes, for a layout that it doesn't know."""
        ...


def state_of(parts: Mapping[str, Kept]) -> dict[str, torch.Tensor]:
    """The tensors of all parts, under the names that they have in a version."""
    return {f"{_PREFIX}{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state().items()}


def kept_of(trainer: State) -> dict[str, torch.Tensor]:
    """Of a version's trainer state, what belongs to parts and not to the learner."""
    return {name: tensor for name, tensor in trainer.items() if name.startswith(_PREFIX)}


def restore_kept(parts: Mapping[str, Kept], kept: State) -> None:
    """Hand each part its own tensors. A part that can't read them begins anew, which is logged."""
    for name, part in parts.items():
        prefix = f"{_PREFIX}{name}."
        own = {full.removeprefix(prefix): tensor for full, tensor in kept.items() if full.startswith(prefix)}
        if not own:
            continue
        try:
            part.restore(own)
        except ModelError as error:
            log.warning("the version's state of %r can't be used and begins anew: %s", name, error)


def to_json(value: Any) -> torch.Tensor:
    """Anything that JSON can say, as a tensor of bytes. msgspec structs and dataclasses are fine."""
    return torch.frombuffer(bytearray(msgspec.json.encode(value)), dtype=torch.uint8)


def from_json(tensor: torch.Tensor | None, type: Any = Any) -> Any:
    """The value back, as `type`. Raises ModelError where there is no tensor or where it holds something else."""
    if tensor is None:
        raise ModelError(f"saved state: expected JSON of {type}, found nothing")
    try:
        return msgspec.json.decode(tensor.numpy().tobytes(), type=type)
    except (msgspec.DecodeError, TypeError, RuntimeError) as error:
        raise ModelError(f"saved state: expected JSON of {type}, found something else: {error}") from error
