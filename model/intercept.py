"""Newton steps for the model's bias, which reach the base rate faster than Adam's steps.

With Adam's steps the bias needs some 10,000 examples to move by a logit of 0.5. Meanwhile the embedding rows compensate for it:
after an empty start the rows that are shown sink, and each new value (an item, an hour) begins at 0, above the others. So the
bias takes the Newton step for the loss of each batch, over a curvature H that decays:

    H <- H exp(-h / HORIZON) + h        h = sum of f (1 - f) over the batch's first labels
    bias <- bias + step                 step = -g / H, g = sum of the slopes by the logits (`model.slopes`)
    H <- H exp(s step)                  s = mean of 1 - 2 f, by f (1 - f)

At small click rates h is about the number of clicks, so the bias follows the last HORIZON clicks, whatever the click rate and
the batch size: its standard error is sqrt(1 / (2 HORIZON)) of a logit. A correction adds its slope to g and nothing to h, since
its impression was counted with the first label.

The third line adapts H to the new bias: to first order, a step changes the curvature f (1 - f) of an example by the factor
exp((1 - 2 f) step). Without it, curvature from scores of 0.5 would be used at scores of 0.01, where it is 25 times too large.
If a batch asks for a step longer than half a logit, H says nothing about the curvature at the new bias, and starts again from
this batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from model.embedding import take

__all__ = ["Intercept"]

# Clicks over which the base rate is averaged; it is known to 1 % of itself then. Shorter horizons follow the sessions of single
# users (docs/experiments.md). The rows and the MLP follow a sudden change of the base rate before the bias does.
HORIZON = 10_000.0
# Curvature at the start, so that a few examples alone don't decide the first steps.
START = 5.0
# Longest step in logits: where all scores are near 0 or 1 the curvature is near 0, and a Newton step has no bound.
LONGEST_STEP = 0.5
_TINY = 1e-30


class Intercept:
    """Updates a bias (1,), which its owner holds.

    intercept.step(bias, scores, slope, weights, corrects)
    """

    def __init__(self) -> None:
        self._curvature = START

    def step(
        self,
        bias: torch.Tensor,
        scores: torch.Tensor,
        slope: torch.Tensor,
        weights: torch.Tensor | None,
        corrects: torch.Tensor | None,
        charge: torch.Tensor | None = None,
    ) -> None:
        """Updates `bias` in place.

        scores    (B,): before the update, and before the correction for sampled negatives (`model.sampling`)
        slope     (B,): of the loss by the logits, weighted
        weights   (B,): of the examples; all 1 when None
        corrects  (B,) bool: which labels are corrections; None if none is
        charge    (): added to the sum of slopes (`model.deferred`); 0 when None
        """
        # On the host: these few numbers take a fraction of the time of as many operations of torch.
        score = scores.cpu().numpy()
        curvature = score * (1 - score)
        if weights is not None:
            curvature *= weights.cpu().numpy()
        if corrects is not None:
            curvature[corrects.cpu().numpy()] = 0
        fresh, tilted = float(curvature.sum()), float((curvature * score).sum())
        gradient = float(slope.cpu().numpy().sum()) + (0.0 if charge is None else float(charge))
        decayed = self._curvature * math.exp(-fresh / HORIZON) + fresh
        wanted = -gradient / max(decayed, _TINY)
        step = min(max(wanted, -LONGEST_STEP), LONGEST_STEP)
        bias.add_(step)
        tilt = (fresh - 2 * tilted) / max(fresh, _TINY)
        self._curvature = _rounded(decayed * math.exp(tilt * step) if step == wanted else max(fresh, START))

    def state(self) -> dict[str, torch.Tensor]:
        """The state for `restore`: copies on the CPU."""
        return {"curvature": torch.tensor(self._curvature)}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continues from a saved state. Versions without one have a bias that was learned from many clicks: H is HORIZON then.

        Raises:
            SnapshotMismatch: the state has another shape.
        """
        self._curvature = float(take(state, "curvature", ())) if state else HORIZON


def _rounded(number: float) -> float:
    """The nearest number of 32 bits, as versions hold it."""
    return float(np.float32(number))
