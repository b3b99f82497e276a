"""Forward and backward passes of every model against its formula in float64 (`tests.model.dense.reference`)."""

from __future__ import annotations

import pytest
import torch

from model.dense.dense_model import DenseModel
from model.network import dense_model
from model.schema import FeatureSchema, FieldSpec
from tests.model.dense import reference
from tests.model.dense.variants import VARIANTS, every_variant, settings

CPU = torch.device("cpu")
ROWS, FIELDS, DIM = 7, 5, 4
SCHEMA = FeatureSchema(fields=tuple(FieldSpec(name=f"f{i}") for i in range(FIELDS)), embedding_dim=DIM)


def made(variant: str, extra: int, hidden: tuple[int, ...] = (6, 5)) -> DenseModel:
    model = dense_model(SCHEMA, settings(variant, hidden=hidden), CPU, extra=extra)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named.items():
        spread = 0.7 if name != "mlp.0.bias" else 0.2
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


@pytest.mark.parametrize("extra", [0, 3])
@every_variant
def test_a_pass_equals_the_formula(variant: str, extra: int) -> None:
    check(variant, extra, (6, 5))


@pytest.mark.parametrize("hidden", [(), (9,)])
@pytest.mark.parametrize("name", ["deepfm", "pnn"])
def test_any_number_of_hidden_layers(name: str, hidden: tuple[int, ...]) -> None:
    check(name, 2, hidden)


def check(variant: str, extra: int, hidden: tuple[int, ...]) -> None:
    model = made(variant, extra, hidden)
    generator = torch.Generator().manual_seed(1)
    embedded = torch.randn((ROWS, FIELDS, DIM), generator=generator)
    terms = torch.randn((ROWS, FIELDS), generator=generator)
    inputs = torch.randn((ROWS, extra), generator=generator)
    slope = torch.randn(ROWS, generator=generator)
    forward = model.forward(embedded, terms.sum(1), inputs if extra else None)
    gradient = model.backward(forward, slope)

    leaves = {name: parameter.double().clone().requires_grad_() for name, parameter in model.named.items()}
    exact, exact_terms = embedded.double().requires_grad_(), terms.double().requires_grad_()
    layers = int(str(VARIANTS[variant].get("cross_layers", 0)))
    logits = torch.stack(
        [
            reference.logit(str(VARIANTS[variant]["name"]), exact[row], exact_terms[row], inputs[row].double(), leaves, layers)
            for row in range(ROWS)
        ]
    )
    torch.testing.assert_close(forward.logits.double(), logits, rtol=1e-5, atol=1e-5)
    (logits * slope.double()).sum().backward()  # type: ignore[no-untyped-call]
    if gradient is None:
        assert exact.grad is None, "it doesn't read the embeddings"
    else:
        torch.testing.assert_close(gradient.double(), exact.grad.flatten(1), rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]
    by_terms = torch.zeros(ROWS, FIELDS).double() if exact_terms.grad is None else exact_terms.grad
    read = slope.double() if model.reads_first_order else torch.zeros(ROWS).double()
    torch.testing.assert_close(by_terms, read.unsqueeze(1).expand(ROWS, FIELDS))
    named = dict(zip(model.named, gradients_of(model), strict=True))
    for name, leaf in leaves.items():
        if name == "bias":
            assert not named[name].any(), "the bias is learned elsewhere"
        else:
            assert leaf.grad is not None and leaf.grad.any()
            torch.testing.assert_close(
                named[name].double(), leaf.grad / ROWS, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


def gradients_of(model: DenseModel) -> list[torch.Tensor]:
    """The gradients by name: as the parameters lie in their buffer."""
    start = model.parameters.data_ptr()
    return [
        model.gradients[at : at + parameter.numel()].view(parameter.shape)
        for parameter in model.named.values()
        for at in [(parameter.data_ptr() - start) // 4]
    ]


@every_variant
def test_the_part_of_the_cross_layers_is_theirs_alone(variant: str) -> None:
    model = made(variant, 3)
    model.parameters[model.crosses] = 0
    for name, parameter in model.named.items():
        assert parameter.any() != name.startswith("cross."), name


@every_variant
def test_a_row_alone_and_among_others(variant: str) -> None:
    model = made(variant, 2)
    generator = torch.Generator().manual_seed(2)
    embedded = torch.randn((70, FIELDS, DIM), generator=generator)
    terms, inputs = torch.randn(70, generator=generator), torch.randn((70, 2), generator=generator)
    together = model.forward(embedded, terms, inputs).logits
    for row in (0, 33, 69):
        alone = model.forward(embedded[row : row + 1], terms[row : row + 1], inputs[row : row + 1]).logits
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-4)


@every_variant
def test_first_weights_come_from_the_seed_and_leave_the_inputs_alone(variant: str) -> None:
    one, same, other = (dense_model(SCHEMA, settings(variant), CPU, extra=2) for _ in range(3))
    one.initialise(1)
    same.initialise(1)
    other.initialise(2)
    assert torch.equal(one.parameters, same.parameters)
    assert torch.equal(one.parameters, other.parameters) is (variant in ("lr", "fm")), "these begin with zeros"
    embedded, terms, inputs = torch.randn((9, FIELDS, DIM)), torch.randn(9), torch.randn((9, 2))
    kept = [tensor.clone() for tensor in (embedded, terms, inputs)]
    one.backward(one.forward(embedded, terms, inputs), torch.randn(9))
    for tensor, before in zip((embedded, terms, inputs), kept, strict=True):
        assert torch.equal(tensor, before)
