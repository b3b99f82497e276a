from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from model import reserve
from model.reserve import reservable_rows, reserved

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is reserved on Linux only")


def memory() -> int:
    return psutil.Process().memory_info().rss


def test_it_is_zeros_of_its_own() -> None:
    one, other = reserved((1000, 3), torch.float32), reserved((1000, 3), torch.float32)
    assert one.shape == (1000, 3)
    assert one.dtype == torch.float32
    assert one.is_contiguous()
    assert not one.any()
    one[7] = 2
    assert one.sum() == 6
    assert not other.any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    tensor = reserved((5000,), dtype)
    tensor[4999] = 1
    assert tensor.dtype == dtype
    assert tensor.nonzero().tolist() == [[4999]]


@pytest.mark.parametrize("shape", [(0,), (0, 16), (4, 0)])
def test_no_elements(shape: tuple[int, ...]) -> None:
    assert reserved(shape, torch.float32).shape == shape


@linux
def test_memory_is_taken_as_it_is_written_to() -> None:
    before = memory()
    tensor = reserved((reservable_rows(1, row_bytes=64), 16), torch.float32)
    assert len(tensor) * 64 > 0.99 * psutil.virtual_memory().total
    assert memory() - before < 4 * MIB
    tensor[: 64 * MIB // 64] = 1
    assert 64 * MIB <= memory() - before < 72 * MIB
    assert tensor[len(tensor) // 2].tolist() == [0] * 16  # reading takes none


@linux
def test_memory_goes_back_with_the_last_tensor() -> None:
    tensor = reserved((64 * MIB,), torch.uint8)
    tensor.fill_(1)
    full = memory()
    part = tensor[5:9]
    del tensor
    gc.collect()
    assert memory() > full - 8 * MIB
    assert part.tolist() == [1] * 4
    del part
    gc.collect()
    assert memory() < full - 56 * MIB


def test_without_reservation_it_is_plain_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserve, "_NO_RESERVE", None)
    assert reservable_rows(100, row_bytes=8) == 100
    tensor = reserved((100, 2), torch.int32)
    assert tensor.shape == (100, 2)
    assert not tensor.any()


def test_at_least_the_rows_that_are_needed_now() -> None:
    needed = 1 << 40
    assert reservable_rows(needed, row_bytes=64) == needed


@linux
def test_a_limit_on_address_space_leaves_growth_by_copying() -> None:
    # The limit holds for a whole process, so another one has it: 32 GiB would never do for this machine's whole memory twice.
    code = """if True:
        import resource, psutil, torch
        from model.reserve import reservable_rows, reserved
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
        assert reservable_rows(1000, row_bytes=64) == 1000
        assert reserved((1000, 16), torch.float32).sum() == 0
        try:
            reserved((1 << 26, 16), torch.float32)
        except RuntimeError as error:
            print("refused:", error)
    """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout
