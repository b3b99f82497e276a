from __future__ import annotations

import sys

import psutil
import pytest
import torch

from model import reserve
from model.growing import Column, Growing

CPU = torch.device("cpu")
COLUMNS = {
    "weights": Column((4,), parts={"weight": slice(0, 3), "sum": 3}),
    "key": Column(dtype=torch.int64, parts={"key": slice(None)}, optional=True),
    "flag": Column(dtype=torch.uint8),
}


@pytest.fixture(params=["reserved", "copied"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "copied":
        monkeypatch.setattr(reserve, "_NO_RESERVE", None)
    return str(request.param)


def test_columns_grow_together_and_keep_what_they_hold(how: str) -> None:
    rows = Growing(COLUMNS, 2, CPU)
    rows["weights"][1] = torch.arange(4.0)
    rows["key"][1] = -7
    before = rows["weights"]
    rows.make_room(1000)
    assert len(rows) >= 1000
    assert {len(rows[name]) for name in COLUMNS} == {len(rows)}
    assert rows["weights"][:3].tolist() == [[0] * 4, [0, 1, 2, 3], [0] * 4]
    assert rows["key"][:3].tolist() == [0, -7, 0]
    assert not rows["weights"][999].any()
    assert (rows["weights"] is before) == (how == "reserved")


def test_parts_are_views(how: str) -> None:
    rows = Growing(COLUMNS, 2, CPU)
    assert rows.parts == ("weight", "sum", "key")
    assert [rows.optional(part) for part in rows.parts] == [False, False, True]
    rows.make_room(50)
    rows.part("weight")[40] = torch.ones(3)
    rows.part("sum")[40] = 2
    rows.part("key")[40] = 5
    assert rows["weights"][40].tolist() == [1, 1, 1, 2]
    assert rows["key"][40] == 5


def test_cleared_rows_are_zeros(how: str) -> None:
    rows = Growing(COLUMNS, 2, CPU)
    rows.make_room(10)
    for name in COLUMNS:
        rows[name][:10] = 1
    rows.clear(20)
    assert len(rows) >= 20
    assert not any(rows[name][:20].any() for name in COLUMNS)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is reserved on Linux only")
def test_room_takes_memory_only_where_it_is_written() -> None:
    before = psutil.Process().memory_info().rss
    rows = Growing(COLUMNS, 2, CPU)
    rows.make_room(20_000_000)
    assert psutil.Process().memory_info().rss - before < 8 << 20
    rows["weights"][: 4 << 20] = 1  # 64 MiB; meanwhile the process may give some memory back
    assert psutil.Process().memory_info().rss - before >= 32 << 20
