"""What a label does to the model: the slope of the loss by the logit, where a correction takes a label back.

f is the model's score of the stream that it learns, in which a share w of the negatives is kept, y the label. The log loss has
the slope f - y. A *correction* says that the label that went out before was another one, so its loss is that of the new label
less that of the old one, which stood for w negatives on average where it was a negative:

    first label            f - y
    correction to 1        (f - 1) - w f      (-1 where all negatives are kept)
    correction to 0        w f - (f - 1)      (+1 where all negatives are kept)

Be p the probability of a click, of which the part p1 comes before the first label leaves and p2 = p - p1 after it. The expected
slope of an impression is

    p1 (f - 1) + (1 - p1) w f + p2 [(f - 1) - w f] = p (f - 1) + (1 - p) w f

which is that of a label known at once, whatever p1 and p2 are: f - p at w = 1. It is 0 only where the model is right (there
f = p / (p + (1 - p) w), which `model.sampling` turns into p). Nothing is estimated and nothing is carried from one label to the
next. The importance weights of Ktena et al. (RecSys 2019) have the same mean where the model is right, but a second point of
rest at f = 1, where they weigh all negatives 0.
"""

from __future__ import annotations

import torch

__all__ = ["slopes"]


def slopes(scores: torch.Tensor, labels: torch.Tensor, corrects: torch.Tensor | None, negative_rate: float) -> torch.Tensor:
    """Slopes (B,) of the loss by the logits.

    scores         (B,), what the model says of the stream it learns, before the update
    labels         (B,), 0 to 1
    corrects       (B,) bool: labels that take back an earlier one, which was the other; None where none does
    negative_rate  share of negatives in the stream that the model learns
    """
    first = scores - labels
    if corrects is None:
        return first
    back = (scores * (1 - negative_rate) - 1) * (2 * labels - 1)  # exactly -1 and 1 at a share of 1
    return torch.where(corrects, back, first)
