"""A term of a model's logit: its parameters, forward and backward pass, and its nodes in an exported graph."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

__all__ = ["Graph", "GraphInputs", "Inputs", "Part", "Shape", "Term", "uniform"]


class Shape(NamedTuple):
    """The sizes of what a model reads: F fields with embeddings of D floats, and E extra inputs an example."""

    fields: int
    dim: int
    extra: int = 0

    @property
    def embedded(self) -> int:
        """F*D, the number of floats of an example's embeddings."""
        return self.fields * self.dim

    @property
    def inputs(self) -> int:
        """F*D + E, the number of floats that an MLP or a cross layer reads."""
        return self.embedded + self.extra


@dataclass(frozen=True, slots=True)
class Inputs:
    """What B examples give to the terms.

    embedded  (B, F, D): embeddings of the fields
    flat      (B, F*D): the same, side by side
    extra     (B, E): inputs that have no gradient; None if there are none
    wide      (B, F*D + E): `flat` and `extra` side by side
    """

    embedded: torch.Tensor
    flat: torch.Tensor
    extra: torch.Tensor | None
    wide: torch.Tensor

    @staticmethod
    def of(embedded: torch.Tensor, extra: torch.Tensor | None) -> Inputs:
        flat = embedded.flatten(1)
        return Inputs(embedded, flat, extra, flat if extra is None else torch.cat((flat, extra), 1))


class Part(NamedTuple):
    """One term's part of the logits (B,), in memory of its own, and what its backward pass needs."""

    logits: torch.Tensor
    saved: list[torch.Tensor]


class Graph(Protocol):
    """An ONNX graph that is being built (`model.onnx_export`)."""

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node, and returns the name of its output."""

    def constant(self, value: Any) -> str:
        """Adds an array, and returns its name."""


class GraphInputs(NamedTuple):
    """The names of what an exported graph gives to the terms: as in `Inputs`."""

    embedded: str
    flat: str
    extra: str | None
    wide: str


class Term(ABC):
    """One summand of the logit.

    shapes  the shapes of its parameters by name, in the order in which they lie in the model's flat buffer
    """

    shapes: Mapping[str, tuple[int, ...]] = {}
    reads_extra = False
    """Whether it reads the extra inputs."""

    def bind(self, weights: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]) -> None:
        """Takes the views of the parameters and of their gradients; both mappings have the names of `shapes`, among others."""
        assert not self.shapes, "a term with parameters takes them"

    def initialise(self, generator: torch.Generator) -> None:
        """Draws the first weights."""
        assert not self.shapes, "a term with parameters begins them"

    @abstractmethod
    def forward(self, inputs: Inputs) -> Part:
        """The term's part of the logits."""

    @abstractmethod
    def backward(
        self, inputs: Inputs, saved: list[torch.Tensor], slope: torch.Tensor, gradient: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The summed loss' gradient by the embeddings (B, F*D), added to that of the terms before.

        Writes the gradient of the *mean* loss by the term's parameters.

        inputs, saved  of the forward pass
        slope          (B,): gradient of each example's loss by its logit
        gradient       (B, F*D): of the terms before, which may be changed; None if none of them read the embeddings
        """

    @abstractmethod
    def export(self, graph: Graph, inputs: GraphInputs) -> str:
        """Adds the forward pass to a graph. Returns the name of the term's part of the logits, (B, 1)."""


def uniform(parameter: torch.Tensor, inputs: int, generator: torch.Generator) -> None:
    """Draws a layer's weights or biases uniformly from within 1 / sqrt(inputs), as `torch.nn.Linear` does."""
    bound = 1 / math.sqrt(inputs)
    parameter.copy_(torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1).mul_(bound))
