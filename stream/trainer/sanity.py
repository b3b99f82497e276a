"""Checks of weights alone, whatever they score."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from model.rows import ModelDelta

__all__ = ["LARGEST_WEIGHT", "delta_problems", "weight_problems"]

# Weights of a healthy model lie below 10, and a logit of 30 is a certainty in float32. Products of larger weights than this
# leave float32's range within a few layers.
LARGEST_WEIGHT = 1e6


def weight_problems(serving: Mapping[str, torch.Tensor]) -> list[str]:
    """What is wrong: tensors, by name, that aren't finite or hold a weight beyond `LARGEST_WEIGHT`. Empty when nothing is."""
    problems = []
    for name, tensor in sorted(serving.items()):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = torch.aminmax(tensor)
        largest = max(abs(float(low)), abs(float(high)))
        if not bool(torch.isfinite(low + high)):
            problems.append(f"weights not finite: {name}")
        elif largest > LARGEST_WEIGHT:
            problems.append(f"weights too large: {name} holds {largest:.3g}, expected at most {LARGEST_WEIGHT:g}")
    return problems


def delta_problems(delta: ModelDelta) -> list[str]:
    """What is wrong with the weights of a delta, as `weight_problems` says it."""
    return weight_problems({**(delta.dense or {}), "embedding": delta.rows.embedding, "first_order": delta.rows.first_order})
