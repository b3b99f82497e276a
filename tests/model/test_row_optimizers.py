"""The optimizers of rows against their algorithms, written with Python's floats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from model.row_optimizers import Adagrad, Ftrl


def sign(value: float) -> float:
    return math.copysign(1.0, value) if value else 0.0


class ReferenceFtrl:
    """McMahan et al. 2013, algorithm 1, for one coordinate."""

    def __init__(self, settings: Ftrl) -> None:
        self.settings = settings
        self.z = self.n = 0.0

    @property
    def weight(self) -> float:
        alpha, beta, l1, l2 = (getattr(self.settings, name) for name in ("alpha", "beta", "l1", "l2"))
        if abs(self.z) <= l1:
            return 0.0
        return -1 / ((beta + math.sqrt(self.n)) / alpha + l2) * (self.z - sign(self.z) * l1)

    def update(self, gradient: float) -> None:
        sigma = (math.sqrt(self.n + gradient**2) - math.sqrt(self.n)) / self.settings.alpha
        self.z += gradient - sigma * self.weight
        self.n += gradient**2


@pytest.mark.parametrize(
    "ftrl", [Ftrl(0.1, 1.0, 0.0, 0.0), Ftrl(0.05, 1.0, 0.5, 0.0), Ftrl(0.5, 0.1, 0.0, 2.0), Ftrl(1.0, 2.0, 0.3, 0.7)]
)
def test_ftrl_is_algorithm_1(ftrl: Ftrl) -> None:
    rng = np.random.default_rng(0)
    references = [ReferenceFtrl(ftrl) for _ in range(20)]
    values = ftrl.begin(torch.zeros(20, 1))
    assert not values.any()
    zeros = 0
    for step in range(200):
        gradient = rng.normal(0.05, 1, 20) * (rng.random(20) < 0.7)
        for reference, each in zip(references, gradient.tolist(), strict=True):
            reference.update(each)
        ftrl.step(values, torch.from_numpy(gradient).float().unsqueeze(1))
        expected = [(each.weight, each.z, each.n) for each in references]
        np.testing.assert_allclose(values, expected, rtol=2e-3, atol=1e-4)
        if step >= 20:  # all have had a slope by then
            zeros += sum(each.weight == 0 for each in references)
    assert (zeros > 0) is (ftrl.l1 > 0)


def test_a_zero_slope_changes_nothing() -> None:
    for optimizer in (Ftrl(0.1, 1.0, 0.01, 0.1), Adagrad(0.1, 0.01)):
        values = optimizer.begin(torch.linspace(-1, 1, 9).unsqueeze(1))
        for slope in (0.3, -0.2):
            optimizer.step(values, torch.full((9, 1), slope))
        before = values.clone()
        optimizer.step(values, torch.zeros(9, 1))
        assert torch.equal(values, before)


@pytest.mark.parametrize("l1", [0.0, 0.4])
def test_a_new_weight_begins_at_what_it_is_given(l1: float) -> None:
    given = torch.tensor([[-2.0], [-1e-3], [0.0], [1e-6], [0.7]])
    values = Ftrl(0.05, 1.0, l1, 3.0).begin(given)
    torch.testing.assert_close(values[:, :1], given, rtol=1e-5, atol=1e-7)
    assert not values[:, 2].any()


def test_adagrad() -> None:
    adagrad = Adagrad(rate=0.1, start=0.5)
    values = adagrad.begin(torch.tensor([[1.0, 2.0]]))
    adagrad.step(values, torch.tensor([[3.0, -1.0]]))
    assert values.tolist() == [pytest.approx([1 - 0.1 * 3 / math.sqrt(9.5), 2 + 0.1 / math.sqrt(1.5), 9.5, 1.5])]
