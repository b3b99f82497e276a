from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import touched
from model.growing import Column, Growing
from model.touched import Touched

CPU = torch.device("cpu")
COLUMNS = {"scratch": Column(dtype=torch.int32), "touched": Column(dtype=torch.uint8)}


def touched_rows(room: int = 64) -> Touched:
    return Touched(Growing(COLUMNS, room, CPU))


steps = st.lists(st.one_of(st.lists(st.integers(1, 60), max_size=12), st.sampled_from(["take", "len"])), max_size=30)


@settings(deadline=None)
@given(steps, st.sampled_from([1, 10, 1_000]), st.sampled_from([1, 64]))
def test_against_a_set(steps: list[list[int] | str], collected: int, pieces: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(touched, "_COLLECTED", collected)
        patch.setattr(touched, "_PIECES", pieces)
        rows, expected = touched_rows(), set[int]()
        for step in [*steps, "take"]:
            if step == "take":
                assert sorted(rows.take().tolist()) == sorted(expected)
                expected = set()
            elif step == "len":
                assert len(rows) == len(expected)
            else:
                rows.add(torch.tensor(step, dtype=torch.int64))
                expected |= set(step)
        assert len(rows) == 0


def test_memory_is_bounded_if_nobody_takes() -> None:
    rows = touched_rows(200_000)
    held = []
    for seed in range(60):
        draws = torch.randint(1, 100_000, (65_536,), generator=torch.Generator().manual_seed(seed))
        rows.add(draws)
        held.append(sum(tensor.nbytes for tensor in [*rows._collected, *rows._listed]))
    assert max(held) <= 100_000 * 8  # each row once
    assert len(rows._listed) <= 65
    assert len(rows.take()) == len(rows._rows["touched"][:100_000]) - 1


def test_forgetting_leaves_none() -> None:
    rows = touched_rows()
    rows.add(torch.tensor([3, 4]))
    rows.forget()
    assert rows.take().tolist() == []
