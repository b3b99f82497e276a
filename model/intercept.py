"""The steps of the model's bias: the base rate is one number that every example tells of, so it needn't wait for the rest.

With Adam's steps the bias needs some 10,000 examples for a logit of 0.5. Meanwhile the rows of what was shown make up for it:
at a start all of them sink, and each new value (an item, an hour) begins at 0, above the others. So the bias takes Newton's
step for the loss of its batch, over a curvature that forgets:

    H <- H exp(-h / HORIZON) + h        h = sum of f (1 - f) over the batch's first labels
    bias <- bias + step                 step = -g / H, g = sum of the slopes by the logits (`model.slopes`)
    H <- H exp(s step)                  s = mean of 1 - 2 f, by f (1 - f)

At small click rates h is the number of clicks, so the bias follows the last HORIZON clicks, whatever the click rate and the
batch are: a standard error of sqrt(1 / (2 HORIZON)) of a logit. A correction adds its slope to g and nothing to h, since its
impression was counted with the first label. The last line moves what is remembered to where the bias is now, since the
curvature f (1 - f) of an example changes by the share 1 - 2 f of a step: what was seen at scores of 0.5 says little at 0.01.
Where a batch wants a step longer than half a logit, the bias isn't where what is remembered was seen, and H begins anew.
"""

from __future__ import annotations

import torch

from model.embedding import take

__all__ = ["Intercept"]

# Clicks over which the base rate is averaged: known to 1 % of the click rate. Shorter ones follow the sessions of single users
# (docs/experiments.md); a sudden change is followed by the rows and the MLP before.
HORIZON = 10_000.0
# Curvature at the start, so that the first steps aren't those of a few examples alone.
START = 5.0
# A step in logits at most: where all scores are near 0 or 1, the curvature says that the bias could go anywhere.
LONGEST_STEP = 0.5
_TINY = 1e-30


class Intercept:
    """Steps a bias (1,) that its owner holds.

    intercept.step(bias, scores, slope, weights, corrects)
    """

    def __init__(self, device: torch.device) -> None:
        self._curvature = torch.full((), START, device=device)

    def step(
        self,
        bias: torch.Tensor,
        scores: torch.Tensor,
        slope: torch.Tensor,
        weights: torch.Tensor | None,
        corrects: torch.Tensor | None,
        charge: torch.Tensor | None = None,
    ) -> None:
        """One update, in place.

        scores    (B,), before the update, of the stream as sampled
        slope     (B,), of the loss by the logits, weighted
        weights   (B,), None: all 1
        corrects  (B,) bool, None where none does
        charge    (), added to the sum of slopes (`model.deferred`); None: nothing
        """
        curvature = scores * (1 - scores)
        if weights is not None:
            curvature.mul_(weights)
        if corrects is not None:
            curvature.masked_fill_(corrects, 0)
        fresh = curvature.sum()
        self._curvature.mul_(torch.exp(fresh / -HORIZON)).add_(fresh)
        gradient = slope.sum() if charge is None else slope.sum() + charge
        wanted = gradient / -self._curvature
        step = wanted.clamp(-LONGEST_STEP, LONGEST_STEP)
        bias.add_(step)
        tilt = (curvature * (1 - 2 * scores)).sum() / fresh.clamp_min(_TINY)
        self._curvature.mul_(torch.exp(tilt * step))
        self._curvature.copy_(torch.where(step == wanted, self._curvature, fresh.clamp_min(START)))

    def state(self) -> dict[str, torch.Tensor]:
        """A copy on the CPU."""
        return {"curvature": self._curvature.to("cpu", copy=True)}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Takes over a saved state; in a version from before there was any, the bias is known from many clicks already."""
        self._curvature.fill_(HORIZON)
        if state:
            self._curvature.copy_(take(state, "curvature", ()))
