"""A multilayer perceptron as a term: ReLU layers over the embeddings side by side, with one output."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch

from model.dense.term import Graph, GraphInputs, Inputs, Part, Shape, Term, uniform

__all__ = ["Mlp"]


class Mlp(Term):
    """The deep part of DeepFM (Guo et al. 2017, section 2.1, equations 3 and 4), and of most other models.

    a_0 = the inputs, a_{l+1} = relu(W_l a_l + b_l), and the last layer has one output without ReLU.

    shape   of the inputs
    hidden  number of units of each hidden layer
    more    number of inputs besides these, for a subclass that appends some
    """

    reads_extra = True

    def __init__(self, shape: Shape, hidden: tuple[int, ...], more: int = 0) -> None:
        self._embedded = shape.embedded
        widths = [shape.inputs + more, *hidden, 1]
        self._layers = len(widths) - 1
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (inputs, outputs) in enumerate(pairwise(widths)):
            shapes[f"mlp.{layer}.weight"] = (outputs, inputs)
            shapes[f"mlp.{layer}.bias"] = (outputs,)
        self.shapes = shapes

    def bind(self, weights: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]) -> None:
        names = range(self._layers)
        self._weights = [weights[f"mlp.{layer}.weight"] for layer in names]
        self._biases = [weights[f"mlp.{layer}.bias"] for layer in names]
        self._weight_gradients = [gradients[f"mlp.{layer}.weight"] for layer in names]
        self._bias_gradients = [gradients[f"mlp.{layer}.bias"] for layer in names]
        self._transposed = [weight.t() for weight in self._weights]
        self._of_embedded = self._weights[0][:, : self._embedded]

    def initialise(self, generator: torch.Generator) -> None:
        for weight, bias in zip(self._weights, self._biases, strict=True):
            uniform(weight, weight.shape[1], generator)
            uniform(bias, weight.shape[1], generator)

    def forward(self, inputs: Inputs) -> Part:
        """Saves the activations: the input of each layer (B, ·)."""
        return self._forward(inputs.wide)

    def _forward(self, read: torch.Tensor) -> Part:
        activations = [read]
        for weight, bias in zip(self._transposed[:-1], self._biases[:-1], strict=True):
            activations.append(torch.addmm(bias, activations[-1], weight).relu_())
        return Part(torch.addmm(self._biases[-1], activations[-1], self._transposed[-1]).squeeze(1), activations)

    def backward(
        self, inputs: Inputs, saved: list[torch.Tensor], slope: torch.Tensor, gradient: torch.Tensor | None
    ) -> torch.Tensor:
        upstream = self._backward(saved, slope) @ self._of_embedded
        return upstream if gradient is None else gradient.add_(upstream)

    def _backward(self, activations: list[torch.Tensor], slope: torch.Tensor) -> torch.Tensor:
        """Writes the parameters' gradients. Returns the gradient (B, ·) by what the first layer adds up."""
        mean = 1 / len(slope)
        upstream = slope.unsqueeze(1)  # (B, outputs of the layer)
        for layer in reversed(range(self._layers)):
            inputs = activations[layer]
            gradient = self._weight_gradients[layer]
            torch.mul(upstream.sum(0), mean, out=self._bias_gradients[layer])  # while `upstream` is still in the cache
            torch.addmm(gradient, upstream.t(), inputs, beta=0, alpha=mean, out=gradient)
            if layer:
                upstream = upstream @ self._weights[layer]
                torch.ops.aten.threshold_backward.grad_input(upstream, inputs, 0, grad_input=upstream)
        return upstream

    def export(self, graph: Graph, inputs: GraphInputs) -> str:
        return self._export(graph, inputs.wide)

    def _export(self, graph: Graph, read: str) -> str:
        for layer, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            read = graph.node("Gemm", read, graph.constant(weight.numpy()), graph.constant(bias.numpy()), transB=1)
            if layer < self._layers - 1:
                read = graph.node("Relu", read)
        return read
