"""The cross layers of DCN-V2 as a term, which any model can have besides its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from model.dense.term import Graph, GraphInputs, Inputs, Part, Shape, Term, uniform

__all__ = ["Cross"]


class Cross(Term):
    """A cross network beside the model (Wang et al., "DCN V2: Improved Deep & Cross Network", WWW 2021, section 3).

    x_0 are the embeddings side by side, with n floats. Layer l gives x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, where * is by
    element (equation 1). With a rank r, W_l is the product of U_l (n, r) and V_l^T (r, n) (equation 3). The last layer's
    output goes to the logit by a weight for each float: the paper's parallel structure, whose final layer over both outputs
    side by side is a sum of two terms.

    layers  number of layers
    rank    r; 0 for a full matrix
    """

    reads_extra = True

    def __init__(self, shape: Shape, layers: int, rank: int) -> None:
        self._embedded = shape.embedded
        self._layers = layers
        wide = shape.inputs
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(layers):
            if rank:
                shapes[f"cross.{layer}.down"] = (rank, wide)  # V^T
                shapes[f"cross.{layer}.up"] = (wide, rank)  # U
            else:
                shapes[f"cross.{layer}.weight"] = (wide, wide)
            shapes[f"cross.{layer}.bias"] = (wide,)
        shapes["cross.out"] = (wide,)
        self.shapes = shapes

    def bind(self, weights: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]) -> None:
        # The matrices of each layer, in the order in which they are applied: W, or V^T and U.
        names = [[f"cross.{layer}.{each}" for each in ("weight", "down", "up")] for layer in range(self._layers)]
        self._matrices = [[weights[name] for name in layer if name in self.shapes] for layer in names]
        self._matrix_gradients = [[gradients[name] for name in layer if name in self.shapes] for layer in names]
        self._biases = [weights[f"cross.{layer}.bias"] for layer in range(self._layers)]
        self._bias_gradients = [gradients[f"cross.{layer}.bias"] for layer in range(self._layers)]
        self._out, self._out_gradient = weights["cross.out"], gradients["cross.out"]

    def initialise(self, generator: torch.Generator) -> None:
        """Draws biases and V. W, or U, and the weights of the output begin at 0, so the term adds nothing at first.

        Random crosses would only be noise to the other terms, which learn sooner.
        """
        for matrices, bias in zip(self._matrices, self._biases, strict=True):
            for matrix in matrices[:-1]:
                uniform(matrix, matrix.shape[1], generator)
            matrices[-1].zero_()
            uniform(bias, len(bias), generator)
        self._out.zero_()

    def forward(self, inputs: Inputs) -> Part:
        """Saves for each layer the inputs of its matrices and W x + b, and the last layer's output."""
        first = x = inputs.wide
        saved = []
        for matrices, bias in zip(self._matrices, self._biases, strict=True):
            read = x
            for matrix in matrices[:-1]:
                saved.append(read)
                read = read @ matrix.t()
            saved.append(read)
            mixed = torch.addmm(bias, read, matrices[-1].t())
            saved.append(mixed)
            x = torch.addcmul(x, first, mixed)
        saved.append(x)
        return Part(x @ self._out, saved)

    def backward(
        self, inputs: Inputs, saved: list[torch.Tensor], slope: torch.Tensor, gradient: torch.Tensor | None
    ) -> torch.Tensor:
        mean = 1 / len(slope)
        saved = list(saved)
        torch.addmv(self._out_gradient, saved.pop().t(), slope, beta=0, alpha=mean, out=self._out_gradient)
        upstream = torch.outer(slope, self._out)  # by the layer's output, (B, n)
        by_first: torch.Tensor | None = None  # by x_0, as the factor of each layer
        for layer in reversed(range(self._layers)):
            mixed = saved.pop()
            by_first = upstream * mixed if by_first is None else by_first.addcmul_(upstream, mixed)
            inner = upstream * inputs.wide  # by the layer's W x + b
            torch.mul(inner.sum(0), mean, out=self._bias_gradients[layer])
            matrices, matrix_gradients = self._matrices[layer], self._matrix_gradients[layer]
            for at in reversed(range(len(matrices))):
                read, into = saved.pop(), matrix_gradients[at]
                torch.addmm(into, inner.t(), read, beta=0, alpha=mean, out=into)
                if at:
                    inner = inner @ matrices[at]
            upstream = upstream.addmm_(inner, matrices[0])
        by_inputs = upstream if by_first is None else upstream.add_(by_first)
        by_embedded = by_inputs[:, : self._embedded]
        return by_embedded.contiguous() if gradient is None else gradient.add_(by_embedded)

    def export(self, graph: Graph, inputs: GraphInputs) -> str:
        x = inputs.wide
        for matrices, bias in zip(self._matrices, self._biases, strict=True):
            read = x
            for matrix in matrices[:-1]:
                read = graph.node("MatMul", read, graph.constant(matrix.t().numpy()))
            mixed = graph.node("Gemm", read, graph.constant(matrices[-1].numpy()), graph.constant(bias.numpy()), transB=1)
            x = graph.node("Add", graph.node("Mul", inputs.wide, mixed), x)
        return graph.node("MatMul", x, graph.constant(np.ascontiguousarray(self._out.unsqueeze(1).numpy())))
