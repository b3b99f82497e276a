"""The second-order part of a factorization machine as a term."""

from __future__ import annotations

import numpy as np
import torch

from model.dense.term import Graph, GraphInputs, Inputs, Part, Shape, Term

__all__ = ["Pairs"]


class Pairs(Term):
    """The sum of <e_i, e_j> over all pairs of fields i < j (Rendle, "Factorization Machines", ICDM 2010, equation 1).

    In linear time by lemma 3.1: the sum equals (|sum e|^2 - sum |e|^2) / 2.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def forward(self, inputs: Inputs) -> Part:
        """Saves the sum of the fields' embeddings, (B, D)."""
        total = inputs.embedded.sum(1)  # (B, D)
        # Norms take a third of the time of dot products, which torch makes of a product (B, F*D) and its sum.
        squares = [torch.linalg.vector_norm(each, dim=1).square_() for each in (total, inputs.flat)]
        return Part(squares[0].sub_(squares[1]).mul_(0.5), [total])

    def backward(
        self, inputs: Inputs, saved: list[torch.Tensor], slope: torch.Tensor, gradient: torch.Tensor | None
    ) -> torch.Tensor:
        """The derivative by e_i is (sum e) - e_i."""
        (total,) = saved
        column = slope.unsqueeze(1)
        shared = total * column
        if gradient is None:
            gradient = shared.repeat(1, self._shape.fields)
        else:
            gradient.view(-1, self._shape.fields, self._shape.dim).add_(shared.unsqueeze(1))
        return gradient.addcmul_(inputs.flat, column, value=-1)

    def export(self, graph: Graph, inputs: GraphInputs) -> str:
        one = graph.constant(np.array([1], np.int64))
        total = graph.node("ReduceSum", inputs.embedded, one, keepdims=0)  # (B, D)
        squares = [graph.node("ReduceSum", graph.node("Mul", x, x), one, keepdims=1) for x in (total, inputs.flat)]
        return graph.node("Mul", graph.node("Sub", *squares), graph.constant(np.float32(0.5)))
