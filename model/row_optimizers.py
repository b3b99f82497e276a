"""Per-coordinate optimizers of the table's rows. A row's weights and their state lie side by side, and change together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

__all__ = ["Adagrad", "Ftrl", "RowOptimizer"]


@dataclass(frozen=True, slots=True)
class Adagrad:
    """Adagrad (Duchi et al., JMLR 2011): a step of rate * g / sqrt(s), where s is the sum of g^2 from `start` on.

    It needs no epsilon, since s starts above zero.
    """

    STATE: ClassVar[tuple[str, ...]] = ("adagrad",)
    """Names of the state beside the weights."""

    rate: float
    start: float

    def begin(self, weights: torch.Tensor) -> torch.Tensor:
        """Values (N, 2D) of new rows with these weights (N, D)."""
        return torch.cat((weights, torch.full_like(weights, self.start)), 1)

    def step(self, values: torch.Tensor, gradient: torch.Tensor) -> None:
        """One update of values (U, 2D) in place, from the gradient by the weights (U, D)."""
        weights, sums = values.chunk(2, dim=1)
        sums.addcmul_(gradient, gradient)
        roots = sums.clone(memory_format=torch.contiguous_format).sqrt_()  # of strided memory it is slow
        weights.addcdiv_(gradient, roots, value=-self.rate)


@dataclass(frozen=True, slots=True)
class Ftrl:
    """FTRL-Proximal with learning rates by coordinate (McMahan et al., KDD 2013, algorithm 1).

    With n the sum of g^2, and z the sum of g - sigma w, where sigma = (sqrt(n + g^2) - sqrt(n)) / alpha:

        w = 0                                                        if |z| <= l1
        w = -(z - sign(z) l1) / ((beta + sqrt(n)) / alpha + l2)      else

    In the paper each weight begins at 0. Here a new row begins at the average of its field (`model.typical`), so z begins
    at the value that gives this weight. Where the average is 0, it is the paper's algorithm.
    """

    STATE: ClassVar[tuple[str, ...]] = ("ftrl_z", "ftrl_n")
    """Names of the state beside the weights."""

    alpha: float
    beta: float
    l1: float
    l2: float

    def begin(self, weights: torch.Tensor) -> torch.Tensor:
        """Values (N, 3D) of new rows with these weights (N, D)."""
        z = weights.mul(-(self.beta / self.alpha + self.l2)).sub_(weights.sign(), alpha=self.l1)
        n = torch.zeros_like(z)
        return torch.cat((self._weights(z, n), z, n), 1)

    def step(self, values: torch.Tensor, gradient: torch.Tensor) -> None:
        """One update of values (U, 3D) in place, from the gradient by the weights (U, D)."""
        weights, z, n = values.chunk(3, dim=1)
        root = n.sqrt()
        n.addcmul_(gradient, gradient)
        sigma = n.sqrt().sub_(root).div_(self.alpha)
        z.add_(gradient).addcmul_(sigma, weights, value=-1)
        weights.copy_(self._weights(z, n))

    def _weights(self, z: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        divisor = n.sqrt().add_(self.beta).div_(self.alpha).add_(self.l2)
        # softshrink(z) is z - sign(z) l1 beyond l1, else 0.
        return torch.nn.functional.softshrink(z, self.l1).div_(divisor).neg_()


RowOptimizer = Adagrad | Ftrl
