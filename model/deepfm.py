"""DeepFM (Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", IJCAI 2017).

logit = bias + first order + FM + MLP, all over the same embeddings (section 2.1, equations 1 to 4). The backward pass is
written by hand: it makes fewer passes over memory than autograd, and writes all gradients into one flat buffer for the
optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from model.embedding import take

__all__ = ["DeepFM", "Forward"]

_ALIGNMENT = 16
"""Floats: every parameter starts at a 64-byte boundary, as a separate tensor would. GEMM kernels round by alignment."""


@dataclass(frozen=True, slots=True)
class Forward:
    """What the backward pass needs from a forward pass over B rows.

    logits       (B,)
    field_sum    (B, D)  sum of the fields' embeddings
    activations  the input (B, F*D + E), then each hidden layer's output (B, H)
    """

    logits: torch.Tensor
    field_sum: torch.Tensor
    activations: list[torch.Tensor]


class DeepFM:
    """The dense part: the bias and an MLP of ReLU layers over F embeddings of D floats. Parameters are 0 until `initialise`.

    The MLP may have `extra` further inputs (E), after the embeddings, which have no gradient.

    parameters  float32 (P,): all parameters, one after the other
    gradients   float32 (P,): their gradients, as the last `backward` wrote them
    bias        float32 (1,): a view into `parameters`, whose gradient is always 0
    named       the parameters as views into `parameters`, by the names that snapshots use
    """

    def __init__(self, fields: int, dim: int, hidden: tuple[int, ...], device: torch.device, extra: int = 0) -> None:
        self.fields = fields
        self.dim = dim
        widths = [fields * dim + extra, *hidden, 1]
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (inputs, outputs) in enumerate(pairwise(widths)):
            shapes[f"mlp.{layer}.weight"] = (outputs, inputs)
            shapes[f"mlp.{layer}.bias"] = (outputs,)
        shapes["bias"] = (1,)
        room = sum(_aligned(math.prod(shape)) for shape in shapes.values())
        self.parameters = torch.zeros(room, device=device)
        self.gradients = torch.zeros(room, device=device)
        self.named = _views(self.parameters, shapes)
        named_gradients = _views(self.gradients, shapes)
        self._layers = len(widths) - 1
        self._weights = [self.named[f"mlp.{layer}.weight"] for layer in range(self._layers)]
        self._biases = [self.named[f"mlp.{layer}.bias"] for layer in range(self._layers)]
        self._weight_gradients = [named_gradients[f"mlp.{layer}.weight"] for layer in range(self._layers)]
        self._bias_gradients = [named_gradients[f"mlp.{layer}.bias"] for layer in range(self._layers)]
        self.bias = self.named["bias"]

    def initialise(self, seed: int) -> None:
        """First weights: uniform within 1/sqrt(inputs) for weights and biases of the MLP, zero for the bias."""
        generator = torch.Generator().manual_seed(seed)
        for weight, bias in zip(self._weights, self._biases, strict=True):
            bound = 1 / math.sqrt(weight.shape[1])
            for parameter in (weight, bias):
                parameter.copy_(torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1).mul_(bound))
        self.bias.zero_()

    def forward(self, embedded: torch.Tensor, first_order: torch.Tensor, extra: torch.Tensor | None = None) -> Forward:
        """Logits of B rows, from embeddings (B, F, D), the sum of the first-order terms (B,), and further inputs (B, E)."""
        flat = embedded.flatten(1)  # (B, F*D)
        activations = [flat if extra is None else torch.cat((flat, extra), 1)]
        for weight, bias in zip(self._weights[:-1], self._biases[:-1], strict=True):
            activations.append(torch.addmm(bias, activations[-1], weight.t()).relu_())
        deep = torch.addmm(self._biases[-1], activations[-1], self._weights[-1].t()).squeeze(1)
        field_sum = embedded.sum(1)  # (B, D)
        squares = torch.linalg.vecdot(field_sum, field_sum) - torch.linalg.vecdot(flat, flat)
        logits = deep.add_(squares, alpha=0.5).add_(first_order).add_(self.bias)
        return Forward(logits, field_sum, activations)

    def backward(self, forward: Forward, slope: torch.Tensor) -> torch.Tensor:
        """Gradient of the summed loss by the embeddings, (B, F*D), from its gradient by the logits, `slope` (B,).

        Writes the gradient of the *mean* loss by the MLP's parameters into `gradients`. The bias is updated separately
        (`model.intercept`).
        """
        mean = 1 / len(slope)
        width = self.fields * self.dim
        flat = forward.activations[0][:, :width]
        upstream = slope.unsqueeze(1)  # (B, outputs of the layer)
        for layer in reversed(range(self._layers)):
            inputs = forward.activations[layer]
            gradient = self._weight_gradients[layer]
            torch.addmm(gradient, upstream.t(), inputs, beta=0, alpha=mean, out=gradient)
            torch.mul(upstream.sum(0), mean, out=self._bias_gradients[layer])
            upstream = upstream @ (self._weights[layer] if layer else self._weights[0][:, :width])
            if layer:
                upstream = torch.ops.aten.threshold_backward(upstream, inputs, 0)
        # FM: d/de_f of (|sum e|^2 - sum |e|^2) / 2 is (sum e) - e_f.
        shared = forward.field_sum * slope.unsqueeze(1)
        upstream.view(-1, self.fields, self.dim).add_(shared.unsqueeze(1))
        return upstream.addcmul_(flat, slope.unsqueeze(1), value=-1)

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
