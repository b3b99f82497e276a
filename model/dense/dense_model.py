"""What all models share: a click's logit as a sum of terms over the same embeddings, with backward passes written by hand.

    logit = the model's terms + first order + bias

The terms lie in files of their own (`model.dense.term`): an MLP, a factorization machine's pairs, cross layers. Their backward
passes make fewer passes over memory than autograd's, and write all gradients into one flat buffer for the optimizer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from model.adam import Adam, Rate
from model.dense.cross import Cross
from model.dense.linear import Linear
from model.dense.term import Graph, GraphInputs, Inputs, Shape, Term
from model.embedding import take
from model.settings import ModelSettings

__all__ = ["DenseModel", "Forward"]

_ALIGNMENT = 16
"""Floats: every parameter starts at a 64-byte boundary, as a separate tensor would. GEMM kernels round by alignment."""


@dataclass(frozen=True, slots=True)
class Forward:
    """What the backward pass needs from a forward pass over B rows.

    logits  (B,)
    inputs  what the terms read
    saved   what each term has saved
    """

    logits: torch.Tensor
    inputs: Inputs
    saved: list[list[torch.Tensor]]


class DenseModel(ABC):
    """The dense part of a model. Parameters are 0 until `initialise`.

    parameters         float32 (P,): all parameters, one after the other
    gradients          float32 (P,): their gradients, as the last `backward` wrote them
    bias               float32 (1,): a view into `parameters`, whose gradient is always 0
    named              the parameters as views into `parameters`, by the names that versions use
    crosses            the part of `parameters` that belongs to cross layers; empty if there are none
    reads_first_order  whether the logit has the sum of the first-order weights

    A model names its terms by `terms`. With `model.cross_layers`, cross layers are one more term of any model. Extra inputs are
    read by MLP and cross layers; a model without either gets a linear term over them.
    """

    reads_first_order: ClassVar[bool] = True

    def __init__(self, shape: Shape, settings: ModelSettings, device: torch.device) -> None:
        self._terms = list(self.terms(shape, settings, device))
        if settings.cross_layers:
            self._terms.append(Cross(shape, settings.cross_layers, settings.cross_rank))
        if shape.extra and not any(term.reads_extra for term in self._terms):
            self._terms.append(Linear(shape))
        shapes = {name: size for term in self._terms for name, size in term.shapes.items()} | {"bias": (1,)}
        room = sum(_aligned(math.prod(size)) for size in shapes.values())
        self.parameters = torch.zeros(room, device=device)
        self.gradients = torch.zeros(room, device=device)
        self.named = _views(self.parameters, shapes)
        gradients = _views(self.gradients, shapes)
        for term in self._terms:
            term.bind(self.named, gradients)
        self.bias = self.named["bias"]
        first = next(iter(self._terms[-1].shapes)) if settings.cross_layers else "bias"  # cross layers are the last term
        self.crosses = slice(self.named[first].storage_offset(), self.bias.storage_offset())

    @staticmethod
    @abstractmethod
    def terms(shape: Shape, settings: ModelSettings, device: torch.device) -> Sequence[Term]:
        """The model's terms, besides first order and bias."""

    def initialise(self, seed: int) -> None:
        """First weights: each term draws its own, in order; the bias is 0."""
        generator = torch.Generator().manual_seed(seed)
        for term in self._terms:
            term.initialise(generator)
        self.bias.zero_()

    def optimizer(self, settings: ModelSettings) -> Adam:
        """What updates the parameters by the gradients of `backward`."""
        crosses = Rate(self.crosses, settings.cross_learning_rate)
        return Adam(self.parameters, self.gradients, settings.dense_learning_rate, crosses)

    def forward(self, embedded: torch.Tensor, first_order: torch.Tensor, extra: torch.Tensor | None = None) -> Forward:
        """Logits of B rows from their embeddings (B, F, D), sums of their first-order weights (B,) and extra inputs (B, E)."""
        inputs = Inputs.of(embedded, extra)
        parts = [term.forward(inputs) for term in self._terms]
        logits = parts[0].logits if parts else torch.zeros_like(first_order)
        for part in parts[1:]:
            logits.add_(part.logits)
        if self.reads_first_order:
            logits.add_(first_order)
        return Forward(logits.add_(self.bias), inputs, [part.saved for part in parts])

    def backward(self, forward: Forward, slope: torch.Tensor) -> torch.Tensor | None:
        """Gradient of the summed loss by the embeddings, (B, F*D), from its gradient by the logits, `slope` (B,).

        None if the logits don't depend on the embeddings. Writes the gradient of the *mean* loss by the parameters into
        `gradients`. The bias is updated separately (`model.intercept`).
        """
        gradient = None
        for term, saved in zip(self._terms, forward.saved, strict=True):
            gradient = term.backward(forward.inputs, saved, slope, gradient)
        return gradient

    def export(self, graph: Graph, inputs: GraphInputs, first_order: str) -> str:
        """Adds the forward pass to an ONNX graph. Returns the name of the logits (B, 1); `first_order` is (B, 1), too."""
        logits = [term.export(graph, inputs) for term in self._terms]
        if self.reads_first_order:
            logits.append(first_order)
        total = logits[0]
        for each in (*logits[1:], graph.constant(self.bias.numpy())):
            total = graph.node("Add", total, each)
        return total

    def serving_state(self) -> dict[str, torch.Tensor]:
        """Copies of the parameters by name, on the CPU."""
        return {name: parameter.to("cpu", copy=True) for name, parameter in self.named.items()}

    def restore(self, serving: Mapping[str, torch.Tensor]) -> None:
        """Replaces the parameters by saved ones. Raises SnapshotMismatch before anything is written."""
        saved = {name: take(serving, name, tuple(parameter.shape)) for name, parameter in self.named.items()}
        for name, parameter in self.named.items():
            parameter.copy_(saved[name])


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _views(flat: torch.Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    views = {}
    start = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        views[name] = flat[start : start + size].view(shape)
        start += _aligned(size)
    return views
