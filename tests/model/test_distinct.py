"""Distinct rows of a batch, and sums over the elements that read each of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.distinct import bags, distinct_rows, group, put_rows

ROWS = st.lists(st.integers(0, 40) | st.sampled_from([2**31 - 1, 2**31 - 2]), max_size=200)
devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]
)


@given(ROWS)
def test_groups(numbers: list[int]) -> None:
    rows = torch.tensor(numbers, dtype=torch.int64)
    groups = group(rows)
    assert groups.distinct.tolist() == sorted(set(numbers))
    assert torch.equal(groups.distinct[groups.inverse], rows)
    assert torch.equal(rows[groups.order], rows.sort().values)
    assert groups.order.tolist() == sorted(range(len(numbers)), key=lambda at: (numbers[at], at))
    assert rows[groups.order][groups.starts].tolist() == groups.distinct.tolist()


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
