"""Adam (Kingma & Ba, ICLR 2015, algorithm 1) over one flat buffer, by torch's own fused kernel.

`torch.optim.Adam` runs the same kernel, but importing its package's compiler costs 5 s at every start of a trainer.
`tests/model/test_adam.py` holds the two together.
"""

from __future__ import annotations

import torch

__all__ = ["Adam"]

BETAS = (0.9, 0.999)
EPSILON = 1e-8

# A parameter without a gradient (a unit that is off for every example) leaves moments that shrink until they are subnormal, and
# there they stay: 0.9 of the smallest float32 rounds to itself. Arithmetic on such numbers is ten times slower on a CPU.
# Moments below 1e-30 move a parameter by less than 1e-25, so they become zeros, often enough that none gets from there to 1e-38
# in between (0.9^175 is 1e-8).
_TINY = 1e-30
_STEPS_BETWEEN = 128


class Adam:
    """Steps `parameters` (N,) by `gradients` (N,), both float32 and updated in place by their owner."""

    def __init__(self, parameters: torch.Tensor, gradients: torch.Tensor, learning_rate: float) -> None:
        self._parameters, self._gradients, self._learning_rate = parameters, gradients, learning_rate
        self._steps = 0
        self._step = torch.zeros((), device=parameters.device)  # the same, as the kernel wants it
        self._mean, self._square = torch.zeros_like(parameters), torch.zeros_like(parameters)

    def step(self) -> None:
        """One update."""
        self._steps += 1
        self._step.fill_(self._steps)
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
        if self._steps % _STEPS_BETWEEN == 0:
            for moment in (self._mean, self._square):
                moment.masked_fill_(moment.abs() < _TINY, 0.0)

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` takes: the steps so far, a single int64, and both moments, (N,) float32 each, not copied."""
        return {"step": torch.tensor(self._steps), "exp_avg": self._mean, "exp_avg_sq": self._square}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a state; its tensors are copied."""
        self._steps = int(state["step"])
        self._mean.copy_(state["exp_avg"])
        self._square.copy_(state["exp_avg_sq"])
