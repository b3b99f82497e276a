"""Adam (Kingma & Ba, ICLR 2015, algorithm 1) over one flat buffer, by torch's own fused kernel.

`torch.optim.Adam` runs the same kernel, but it imports torch's compiler, which costs 5 s at every start of a trainer.
`tests/model/test_adam.py` checks that both give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Adam", "Rate"]

BETAS = (0.9, 0.999)
EPSILON = 1e-8

# The moments of a parameter without a gradient (of a unit that is off for every example) shrink until they are subnormal. They
# never reach 0, since 0.9 of the smallest float32 rounds to itself, and arithmetic on subnormal numbers is ten times slower on
# a CPU. So moments below _TINY are set to 0: they would move a parameter by less than 1e-25. This is done every _STEPS_BETWEEN
# steps, in which no moment shrinks from 1e-30 to 1e-38, where subnormal numbers begin (0.9^175 is 1e-8).
_TINY = 1e-30
_STEPS_BETWEEN = 128


class Rate(NamedTuple):
    """The step size of a part of the parameters, which begins and ends at given numbers."""

    part: slice
    learning_rate: float


class Adam:
    """Updates `parameters` (N,) in place by `gradients` (N,), both float32; the owner writes the gradients before each step.

    other  a part that has another step size; None if all have the same
    """

    def __init__(
        self, parameters: torch.Tensor, gradients: torch.Tensor, learning_rate: float, other: Rate | None = None
    ) -> None:
        self._steps = 0
        self._step = torch.zeros((), device=parameters.device)  # the same number as the tensor that the kernel takes
        self._mean, self._square = torch.zeros_like(parameters), torch.zeros_like(parameters)
        parts = {learning_rate: [slice(None)]}
        start, stop, _ = (slice(0) if other is None else other.part).indices(len(parameters))
        if other is not None and start < stop:
            others = slice(0, start), slice(stop, len(parameters))
            parts = {learning_rate: [part for part in others if part.start < part.stop]}
            parts.setdefault(other.learning_rate, []).append(slice(start, stop))
        each = (parameters, gradients, self._mean, self._square)
        # By step size, views into the four tensors.
        self._views = {rate: [[tensor[part] for part in own] for tensor in each] for rate, own in parts.items() if own}

    def step(self) -> None:
        """One update."""
        self._steps += 1
        self._step.fill_(self._steps)
        for learning_rate, (parameters, gradients, means, squares) in self._views.items():
            torch._fused_adam_(
                parameters,
                gradients,
                means,
                squares,
                [],
                [self._step] * len(parameters),
                lr=learning_rate,
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
