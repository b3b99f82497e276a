"""The models' formulas as their papers print them: one example at a time, in float64, with loops. Slow, and easy to compare."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["logit"]

Weights = Mapping[str, torch.Tensor]


def logit(
    model: str, embeddings: torch.Tensor, first_order: torch.Tensor, extra: torch.Tensor, weights: Weights, cross_layers: int
) -> torch.Tensor:
    """The logit () of one example from its embeddings (F, D), first-order terms (F,) and extra inputs (E,)."""
    side_by_side = torch.cat([*embeddings, extra])
    bias = weights["bias"][0]
    wide = bias + sum(first_order)
    linear = weights["extra.weight"] @ extra if "extra.weight" in weights else torch.zeros((), dtype=torch.float64)
    beside = cross(side_by_side, weights, cross_layers) if cross_layers else torch.zeros((), dtype=torch.float64)
    match model:
        case "lr":
            own = wide
        case "fm":
            own = wide + pairs(embeddings)
        case "fnn":
            own = bias + mlp(side_by_side, weights)
        case "wide_deep":
            own = wide + mlp(side_by_side, weights)
        case "deepfm":
            own = wide + pairs(embeddings) + mlp(side_by_side, weights)
        case "ipnn":
            own = bias + mlp(torch.cat([side_by_side, inner(embeddings)]), weights)
        case "opnn":
            own = bias + mlp(torch.cat([side_by_side, outer(embeddings)]), weights)
        case "pnn":
            own = bias + mlp(torch.cat([side_by_side, inner(embeddings), outer(embeddings)]), weights)
        case _:
            raise AssertionError(model)
    return own + linear + beside


def pairs(embeddings: torch.Tensor) -> torch.Tensor:
    """Rendle 2010, equation 1: the sum over i < j of <v_i, v_j>; each x_i is 1, or in the embedding already."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(embeddings)):
        for j in range(i + 1, len(embeddings)):
            total = total + embeddings[i] @ embeddings[j]
    return total


def mlp(inputs: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Guo et al. 2017, equations 3 and 4 of the deep component."""
    layers = sum(name.startswith("mlp.") for name in weights) // 2
    a = inputs
    for layer in range(layers):
        a = weights[f"mlp.{layer}.weight"] @ a + weights[f"mlp.{layer}.bias"]
        if layer < layers - 1:
            a = a.clamp_min(0)
    return a[0]


def inner(embeddings: torch.Tensor) -> torch.Tensor:
    """Qu et al. 2016, section III.B: p_ij = <f_i, f_j>. Entries j < i equal p_ji."""
    count = len(embeddings)
    return torch.stack([embeddings[i] @ embeddings[j] for i in range(count) for j in range(i, count)])


def outer(embeddings: torch.Tensor) -> torch.Tensor:
    """Qu et al. 2016, section III.C: p is the sum over all i and j of f_i f_j^T. It is symmetric."""
    dim = embeddings.shape[1]
    total = torch.zeros((dim, dim), dtype=torch.float64)
    for one in embeddings:
        for other in embeddings:
            total = total + torch.outer(one, other)
    return torch.stack([total[a, b] for a in range(dim) for b in range(a, dim)])


def cross(first: torch.Tensor, weights: Weights, layers: int) -> torch.Tensor:
    """Wang et al. 2021, equation 1, or 3 with a low rank; the output goes to the logit with a weight for each entry."""
    x = first
    for layer in range(layers):
        if f"cross.{layer}.weight" in weights:
            matrix = weights[f"cross.{layer}.weight"]
        else:
            matrix = weights[f"cross.{layer}.up"] @ weights[f"cross.{layer}.down"]
        x = first * (matrix @ x + weights[f"cross.{layer}.bias"]) + x
    return weights["cross.out"] @ x
