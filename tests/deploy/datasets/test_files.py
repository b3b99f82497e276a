"""Files of one's own: the mapping of columns, units of time, and what is said when they don't fit."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.datasets import Columns, FileDataSet
from deploy.errors import DataSetError


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_events_of_the_contract_need_no_mapping(tmp_path: Path) -> None:
    rows = [
        {
            "impression_id": "b",
            "timestamp": 1_700_000_002_000,
            "features": {"u": "x", "n": 1.5, "tags": ["p"]},
            "clicked": True,
        },
        {"impression_id": "a", "timestamp": 1_700_000_001_000, "features": {"u": None, "n": 2, "tags": []}, "clicked": False},
    ]
    data_set = FileDataSet(write_lines(tmp_path / "log.jsonl", rows), "jsonl")
    (chunk,) = data_set.chunks()
    assert (chunk.ids, chunk.timestamps_ms.tolist(), chunk.clicked.tolist()) == (
        ["a", "b"],
        [1_700_000_001_000, 1_700_000_002_000],
        [False, True],
    )
    assert [json.loads(features) for features in chunk.features] == [rows[1]["features"], rows[0]["features"]]
    assert {field.name: field.kind for field in data_set.schema().fields} == {
        "u": "categorical",
        "n": "numeric",
        "tags": "list",
    }


def test_columns_are_mapped_and_the_candidates_own_are_split_off(tmp_path: Path) -> None:
    file = tmp_path / "log.parquet"
    table = {
        "when": [datetime(2024, 1, 1, tzinfo=UTC), datetime(2023, 1, 1, tzinfo=UTC)],
        "clicked_at": [None, datetime(2023, 1, 1, 0, 0, 9, tzinfo=UTC)],
        "who": ["u1", "u2"],
        "sku": [7, 8],
        "price": [1.0, 2.5],
    }
    pq.write_table(pa.table(table), file)
    columns = Columns(
        timestamp="when", clicked=None, click_timestamp="clicked_at", user="who", item="sku", candidate=("price",)
    )
    (chunk,) = FileDataSet(file, "parquet", columns).chunks()
    assert chunk.ids == ["1", "0"]  # row numbers in the file
    assert chunk.clicked.tolist() == [True, False]
    assert chunk.click_timestamps_ms.tolist() == [1_672_531_209_000, -1]
    assert (chunk.users, chunk.items) == (["u2", "u1"], ["8", "7"])
    assert json.loads(chunk.contexts[0]) == {"who": "u2"}
    assert json.loads(chunk.candidates[0]) == {"sku": 8, "price": 2.5}


T = 1_700_000_000_000


@pytest.mark.parametrize(
    ("unit", "value"),
    [("s", 1_650_812_741.436), ("ms", 1_650_812_741_436), ("us", 1_650_812_741_436_000), ("ns", 1_650_812_741_436 * 10**6)],
)
def test_units_of_time(tmp_path: Path, unit: str, value: float) -> None:
    file = write_lines(tmp_path / "log.jsonl", [{"timestamp": value, "clicked": 0, "f": 1}])
    (chunk,) = FileDataSet(file, "jsonl", Columns(unit=unit)).chunks()
    assert chunk.timestamps_ms.tolist() == [1_650_812_741_436]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [{"ts": 1, "f": 1}],
            Columns(),
            r"expected a column 'timestamp' \(one of the mapped columns\), found ts, f\. .*--column",
        ),
        ([{"timestamp": 1, "f": 1}], Columns(), r"expected a column 'clicked'"),
        ([{"timestamp": T, "clicked": 0}], Columns(), r"expected features beside clicked, timestamp, found none"),
        ([{"timestamp": T, "clicked": 0, "f": 1}], Columns(item="sku"), r"expected a column 'sku' \(item or candidate\)"),
        (
            [{"timestamp": "noon", "clicked": 0, "f": 1}],
            Columns(),
            r"column timestamp: expected a timestamp or a number, found string",
        ),
        (
            [{"timestamp": None, "clicked": 0, "f": 1}, {"timestamp": 1, "clicked": 0, "f": 1}],
            Columns(),
            r"expected a time in every row",
        ),
        ([{"timestamp": 1, "clicked": 0, "f": 1}], Columns(unit="h"), r"unit: expected one of s, ms, us, ns, found 'h'"),
        (
            [{"timestamp": 1_700_000_000_009, "clicked": 1, "at": 1_700_000_000_005, "f": 1}],
            Columns(click_timestamp="at"),
            r"column at: expected clicks at or after their impressions, found one before.*--unit",
        ),
        ([{"timestamp": T, "clicked": 0, "f": {"a": 1}}], Columns(), r"column of type struct"),
        (
            [{"timestamp": 1_700_000_000, "clicked": 0, "f": 1}],
            Columns(),
            r"column timestamp: expected event times of the last 40 years in ms, found 1700000000, which looks like seconds\. "
            r"Pass --unit s\.",
        ),
        (
            [{"timestamp": T * 1_000, "clicked": 0, "f": 1}],
            Columns(),
            r"in ms, found 1700000000000000, which looks like microseconds\. Pass --unit us\.",
        ),
        ([{"timestamp": T, "clicked": 0, "f": 1}], Columns(unit="s"), r"in s, found 1700000000000, .* Pass --unit ms\."),
        (
            [{"timestamp": T, "clicked": 0, "f": 1}, {"timestamp": 5, "clicked": 0, "f": 1}],
            Columns(),
            r"found 5\. Fix the file",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, rows: list[dict[str, Any]], columns: Columns, message: str) -> None:
    file = write_lines(tmp_path / "log.jsonl", rows)
    with pytest.raises(DataSetError, match=message):
        list(FileDataSet(file, "jsonl", columns).chunks())


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("hello")
    with pytest.raises(DataSetError, match=r"x\.parquet: expected parquet, found: "):
        FileDataSet(tmp_path / "x.parquet", "parquet").size()
