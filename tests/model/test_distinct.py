"""Distinct keys and rows of a batch, and sums over the elements that read each of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.distinct import _MULTIPLIER, Groups, bags, distinct_rows, group, put_rows

VALUES = st.lists(st.integers(0, 40) | st.integers(-(2**63), 2**63 - 1), max_size=200)
devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
)


def check(groups: Groups, numbers: list[int]) -> None:
    values = torch.tensor(numbers, dtype=torch.int64)
    assert sorted(groups.distinct.tolist()) == sorted(set(numbers))
    assert torch.equal(groups.distinct[groups.inverse], values)
    parts = pairwise([*groups.starts.tolist(), len(numbers)])
    for value, (start, end) in zip(groups.distinct.tolist(), parts, strict=True):
        assert groups.order[start:end].tolist() == [at for at, number in enumerate(numbers) if number == value]


@given(VALUES)
def test_groups(numbers: list[int]) -> None:
    check(group(torch.tensor(numbers, dtype=torch.int64)), numbers)


def test_groups_of_values_whose_hashes_agree_in_all_sorted_bits() -> None:
    inverse = pow(int(_MULTIPLIER), -1, 2**64)
    near = [hashed * inverse % 2**64 for hashed in (1 << 40, (1 << 40) + 1, (1 << 40) + 2)]
    numbers = [number - 2**64 if number >= 2**63 else number for number in near] * 5
    check(group(torch.tensor(numbers)), numbers)


@given(VALUES, st.sets(st.integers(0, 40)))
def test_members_of_some_groups(numbers: list[int], some: set[int]) -> None:
    groups = group(torch.tensor(numbers, dtype=torch.int64))
    chosen = [at for at in some if at < len(groups.distinct)]
    elements, which = groups.members(torch.tensor(chosen, dtype=torch.int64))
    wanted = {groups.distinct.tolist()[at]: place for place, at in enumerate(chosen)}
    assert elements.tolist() == [at for at, number in enumerate(numbers) if number in wanted]
    assert which.tolist() == [wanted[numbers[at]] for at in elements.tolist()]


@given(st.lists(st.integers(0, 40), max_size=200))
def test_distinct_rows_without_sorting(rows: list[int]) -> None:
    scratch = torch.full((41,), 7, dtype=torch.int32)
    assert sorted(distinct_rows(torch.tensor(rows, dtype=torch.int64), scratch).tolist()) == sorted(set(rows))


@devices
@pytest.mark.parametrize("width", [1, 2, 10, 16, 33])
def test_bags_are_sums_and_means(device: str, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(50, width, generator=generator), torch.rand(300, generator=generator)
    index, starts = torch.randint(50, (300,), generator=generator), torch.tensor([0, 1, 100, 299])
    found = bags(*(each.to(device) for each in (values, index, starts, weights))).cpu()
    weighted = (values[index] * weights.unsqueeze(1)).double()
    parts = list(zip(starts.tolist(), [1, 100, 299, 300], strict=True))
    torch.testing.assert_close(found.double(), torch.stack([weighted[a:b].sum(0) for a, b in parts]), rtol=1e-5, atol=1e-5)
    mean = bags(*(each.to(device) for each in (values, index, starts)), mean=True).cpu()
    torch.testing.assert_close(mean, torch.stack([values[index[a:b]].mean(0) for a, b in parts]), rtol=1e-5, atol=1e-5)


@devices
def test_rows_are_put_in_place_and_no_others(device: str) -> None:
    target = torch.arange(40.0, device=device).view(10, 4)
    rows, values = torch.tensor([0, 3, 9], device=device), -torch.ones(3, 4, device=device)
    wanted = target.clone().index_copy_(0, rows, values)
    put_rows(target, rows, values)
    assert torch.equal(target, wanted)
