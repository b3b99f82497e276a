"""Adam (Kingma & Ba, ICLR 2015, algorithm 1) over one flat buffer, by torch's own fused kernel.

`torch.optim.Adam` runs the same kernel, but it imports torch's compiler, which costs 5 s at every start of a trainer.
`tests/model/test_adam.py` checks that both give the same bits.
"""

from __future__ import annotations

import torch

__all__ = ["Adam"]

BETAS = (0.9, 0.999)
EPSILON = 1e-8

# The moments of a parameter without a gradient (of a unit that is off for every example) shrink until they are subnormal. They
# never reach 0, since 0.9 of the smallest float32 rounds to itself, and arithmetic on subnormal numbers is ten times slower on
# a CPU. So moments below _TINY are set to 0: they would move a parameter by less than 1e-25. This is done every _STEPS_BETWEEN
# steps, in which no moment shrinks from 1e-30 to 1e-38, where subnormal numbers begin (0.9^175 is 1e-8).
_TINY = 1e-30
_STEPS_BETWEEN = 128


class Adam:
    """Updates `parameters` (N,) in place by `gradients` (N,), both float32; the owner writes the gradients before each step."""

    def __init__(self, parameters: torch.Tensor, gradients: torch.Tensor, learning_rate: float) -> None:
        self._parameters, self._gradients, self._learning_rate = parameters, gradients, learning_rate
        self._steps = 0
        self._step = torch.zeros((), device=parameters.device)  # the same number as the tensor that the kernel takes
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
        """The state for `restore`: `step` (), int64, and both moments (N,), float32. The moments are not copied."""
        return {"step": torch.tensor(self._steps), "exp_avg": self._mean, "exp_avg_sq": self._square}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from a state that `state` returned; its tensors are copied."""
        self._steps = int(state["step"])
        self._mean.copy_(state["exp_avg"])
        self._square.copy_(state["exp_avg_sq"])
