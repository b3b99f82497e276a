"""Adam (Kingma & Ba, ICLR 2015, algorithm 1) over one flat buffer, by torch's own fused kernel.

`torch.optim.Adam` runs the same kernel, but importing its package's compiler costs 5 s at every start of a trainer.
`tests/model/test_adam.py` holds the two together.
"""

from __future__ import annotations

import torch

__all__ = ["Adam"]

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Adam:
    """Steps `parameters` (N,) by `gradients` (N,), both float32 and updated in place by their owner."""

    def __init__(self, parameters: torch.Tensor, gradients: torch.Tensor, learning_rate: float) -> None:
        self._parameters, self._gradients, self._learning_rate = parameters, gradients, learning_rate
        self._step = torch.zeros((), device=parameters.device)
        self._mean, self._square = torch.zeros_like(parameters), torch.zeros_like(parameters)

    def step(self) -> None:
        """One update."""
        self._step += 1
        torch._fused_adam_(
            [self._parameters],
            [self._gradients],
            [self._mean],
            [self._square],
            [],
            [self._step],
            lr=self._learning_rate,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=0.0,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors themselves: copying into them restores."""
        return {"step": self._step, "exp_avg": self._mean, "exp_avg_sq": self._square}
