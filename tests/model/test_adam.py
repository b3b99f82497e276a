"""`model.adam` gives the same bits as `torch.optim.Adam`, without its start-up cost."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from model.adam import Adam, Rate


def test_equals_torch_optim_bit_for_bit() -> None:
    torch.manual_seed(0)
    ours = torch.randn(1_000)
    theirs = torch.nn.Parameter(ours.clone())
    gradients = torch.empty(1_000)
    theirs.grad = torch.empty(1_000)
    adam, reference = Adam(ours, gradients, 5e-4), torch.optim.Adam([theirs], lr=5e-4, fused=True)
    for _ in range(20):
        gradients.normal_()
        theirs.grad.copy_(gradients)
        adam.step()
        reference.step()
        assert torch.equal(ours, theirs.detach())


def test_a_part_has_a_step_size_of_its_own() -> None:
    torch.manual_seed(0)
    ours = torch.randn(300)
    theirs = [torch.nn.Parameter(part.clone()) for part in (ours[:100], ours[100:250], ours[250:])]
    gradients = torch.empty(300)
    adam = Adam(ours, gradients, 5e-4, Rate(slice(100, 250), 1e-2))
    groups = [{"params": [theirs[0], theirs[2]], "lr": 5e-4}, {"params": [theirs[1]], "lr": 1e-2}]
    reference = torch.optim.Adam(groups, fused=True)
    for _ in range(20):
        gradients.normal_()
        for each, part in zip(theirs, gradients.split((100, 150, 50)), strict=True):
            each.grad = part.clone()
        adam.step()
        reference.step()
    torch.testing.assert_close(ours, torch.cat(theirs).detach())
    assert adam.state()["exp_avg"].shape == (300,)


@pytest.mark.parametrize("part", [slice(0, 0), slice(0, 9)], ids=["none", "all"])
def test_a_part_may_be_nothing_or_all(part: slice) -> None:
    one, two, gradients = torch.ones(9), torch.ones(9), torch.ones(9)
    Adam(one, gradients, 1e-3, Rate(part, 1e-2)).step()
    Adam(two, gradients, 1e-2 if part.stop else 1e-3).step()
    assert torch.equal(one, two)


def test_state_restores() -> None:
    torch.manual_seed(1)
    one, gradients = torch.randn(50), torch.randn(50)
    first = Adam(one, gradients, 1e-3)
    first.step()
    two = one.clone()
    second = Adam(two, gradients, 1e-3)
    second.restore(first.state())
    first.step()
    second.step()
    assert torch.equal(one, two)


def test_a_unit_that_is_off_leaves_no_subnormal_moments() -> None:
    """Subnormal moments would make every later step ten times slower."""
    parameters, gradients = torch.ones(4), torch.tensor([1e-3, 1e-3, 1e-12, 0.0])
    adam = Adam(parameters, gradients, 1e-3)
    adam.step()
    gradients[1:] = 0.0
    smallest = torch.finfo(torch.float32).tiny
    for _ in range(2_000):
        adam.step()
        for name, moment in adam.state().items():
            assert not ((moment != 0) & (moment.abs() < smallest)).any(), name
    mean = adam.state()["exp_avg"]
    assert mean[0] > 1e-4
    assert mean[1:].tolist() == [0.0, 0.0, 0.0]


def test_a_learner_starts_without_the_compiler() -> None:
    """Importing torch's compiler would cost seconds at every start of a trainer."""
    code = (
        "import sys; from model.learner import Learner; from model.schema import *; from model.settings import ModelSettings\n"
        "Learner(FeatureSchema(fields=(FieldSpec(name='a'),)), ModelSettings(hidden=(4,)), device='cpu')\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
