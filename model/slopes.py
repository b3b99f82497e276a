"""The slope of the loss by the logit, for first labels and for corrections, which take an earlier label back.

The stream keeps a share w of its negatives; f is the model's score on this stream, y the label. The slope of the log loss is
f - y. A *correction* replaces the earlier, opposite label of its impression, so its loss is the loss of the new label less the
loss of the old label. A negative label counts w times, since a negative was sent with probability w:

    first label            f - y
    correction to 1        (f - 1) - w f      (-1 where all negatives are kept)
    correction to 0        w f - (f - 1)      (+1 where all negatives are kept)

Let p be the probability of a click, p1 the part of it that comes before the first label is sent, and p2 = p - p1 the part that
comes after it. The expected slope of an impression is

    p1 (f - 1) + (1 - p1) w f + p2 [(f - 1) - w f] = p (f - 1) + (1 - p) w f

This equals the expected slope of labels that are known at once (f - p at w = 1), whatever p1 and p2 are. It is 0 only where the
model is right, at f = p / (p + (1 - p) w), which `model.sampling` converts into p. Nothing has to be estimated, and no state is
kept between labels. The importance weights of Ktena et al. (RecSys 2019) have the same mean where the model is right, but a
second fixed point at f = 1, where they give all negatives the weight 0.
"""

from __future__ import annotations

import torch

__all__ = ["slopes"]


def slopes(scores: torch.Tensor, labels: torch.Tensor, corrects: torch.Tensor | None, negative_rate: float) -> torch.Tensor:
    """Slopes (B,) of the loss by the logits.

    scores         (B,): scores on the sampled stream, before the update
    labels         (B,): 0 to 1
    corrects       (B,) bool: which labels are corrections; None if none is
    negative_rate  share w of negatives that the stream keeps
    """
    first = scores - labels
    if corrects is None:
        return first
    back = (scores * (1 - negative_rate) - 1) * (2 * labels - 1)  # exactly -1 and 1 at a rate of 1
    return torch.where(corrects, back, first)
