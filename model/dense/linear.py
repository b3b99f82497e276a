"""A linear term over the extra inputs, for models of which no other term reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from model.dense.term import Graph, GraphInputs, Inputs, Part, Shape, Term

__all__ = ["Linear"]


class Linear(Term):
    """<w, x> with one weight for each extra input; the weights begin at 0."""

    reads_extra = True

    def __init__(self, shape: Shape) -> None:
        self.shapes = {"extra.weight": (shape.extra,)}

    def bind(self, weights: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]) -> None:
        self._weight, self._gradient = weights["extra.weight"], gradients["extra.weight"]

    def initialise(self, generator: torch.Generator) -> None:
        self._weight.zero_()

    def forward(self, inputs: Inputs) -> Part:
        assert inputs.extra is not None
        return Part(inputs.extra @ self._weight, [])

    def backward(
        self, inputs: Inputs, saved: list[torch.Tensor], slope: torch.Tensor, gradient: torch.Tensor | None
    ) -> torch.Tensor | None:
        assert inputs.extra is not None
        torch.addmv(self._gradient, inputs.extra.t(), slope, beta=0, alpha=1 / len(slope), out=self._gradient)
        return gradient

    def export(self, graph: Graph, inputs: GraphInputs) -> str:
        assert inputs.extra is not None
        return graph.node("MatMul", inputs.extra, graph.constant(self._weight.unsqueeze(1).numpy()))
