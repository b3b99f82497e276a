"""From scores learned on a stream that keeps only a share of its negatives to probabilities.

With p the score and w the share kept, q = p / (p + (1 - p) / w) (He et al., "Practical Lessons from Predicting Clicks on Ads at
Facebook", ADKDD 2014, section 6.3). In odds that is q / (1 - q) = w * p / (1 - p): on logits one addition, which keeps the
digits that small scores have.
"""

from __future__ import annotations

import math

import torch

__all__ = ["probabilities"]


def probabilities(logits: torch.Tensor, negative_rate: float) -> torch.Tensor:
    """Click probabilities (B,) from logits (B,) learned at a share `negative_rate` of negatives, above 0 and at most 1."""
    return torch.sigmoid(logits if negative_rate == 1 else logits + math.log(negative_rate))
