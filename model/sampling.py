"""Converts scores that were learned on a stream with sampled negatives into click probabilities.

For a score p and a share w of negatives kept, the probability is q = p / (p + (1 - p) / w) (He et al., "Practical Lessons from
Predicting Clicks on Ads at Facebook", ADKDD 2014, section 6.3). In odds, q / (1 - q) = w * p / (1 - p), so log w is added to
the logit. This keeps the precision of small scores.
"""

from __future__ import annotations

import math

import torch

__all__ = ["probabilities"]


def probabilities(logits: torch.Tensor, negative_rate: float) -> torch.Tensor:
    """Click probabilities (B,) from logits (B,); `negative_rate` is the share of negatives kept, above 0 and at most 1."""
    return torch.sigmoid(logits if negative_rate == 1 else logits + math.log(negative_rate))
