"""Learning before the label is known: every impression is a negative at first, and a clicked one once more a positive.

Ktena et al., "Addressing Delayed Feedback for Continuous Training with Neural Networks in CTR prediction" (RecSys 2019), the
loss "fake negative weighted". In such a stream a share b(y=1|x) = p / (1 + p) is positive, p being the true probability, and
importance sampling by p(y|x) / b(y|x) leads back to p:

    L = -sum [ y (1 + p) log f + (1 - y) (1 - p) (1 + p) log(1 - f) ]

with p the model's own f, taken as a constant: no gradient flows through the weights.

Where only a share r of negatives is kept, the stream has p positives for r negatives, and the one to learn, that of known
labels at the same share, p for (1 - p) r. The ratio of the two, normalised, gives the weights (1 + r f) and (1 - p) (1 + r f),
with f = p / (p + (1 - p) r) the score that is learned. At r = 1 these are the paper's.
"""

from __future__ import annotations

import torch

__all__ = ["fake_negative_weights"]


def fake_negative_weights(
    labels: torch.Tensor, scores: torch.Tensor, probabilities: torch.Tensor, negative_rate: float
) -> torch.Tensor:
    """Importance weights (B,) of such examples.

    labels         (B,), 0 or 1
    scores         (B,), what the model says of the stream it learns, before the step
    probabilities  (B,), the same corrected for `negative_rate`
    """
    return (1 + negative_rate * scores) * (1 - (1 - labels) * probabilities)
