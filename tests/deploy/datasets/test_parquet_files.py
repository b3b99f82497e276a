"""Parquet: types, times, parts, and numbers at the edges."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

from deploy.datasets import Columns, FileDataSet
from tests.deploy.datasets.files import NO_TIME, T, parquet, refused, write_lines


@pytest.mark.parametrize(
    ("column", "sent"),
    [
        (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
        (pa.array([1.5], pa.float16()), 1.5),
        (pa.array([Decimal("1.10")]), 1.1),
        (pa.array([Decimal(2**60)], pa.decimal128(30, 0)), 2**60),
        (pa.array(["a"]).dictionary_encode(), "a"),
        (pa.array(["a"], pa.large_string()), "a"),
        (pa.array([True]), 1),
        (pa.array([[1, 2]]), ["1", "2"]),
        (pa.array([["a"]], pa.list_(pa.string(), 1)), ["a"]),
        (pa.array([["a"]], pa.large_list(pa.string())), ["a"]),
        (pa.array([float("nan")]), None),
        (pa.nulls(1), None),
    ],
)
def test_types_of_parquet_that_are_taken(tmp_path: Path, column: pa.Array, sent: object) -> None:
    (chunk,) = FileDataSet(parquet(tmp_path / "log.parquet", f=column), "parquet").chunks()
    assert json.loads(chunk.features[0]) == {"f": sent}


@pytest.mark.parametrize(
    ("column", "found"),
    [
        (pa.array([b"a"]), "found the type binary. Convert it, make columns of its parts, or leave it out: --drop f."),
        (pa.array([1], pa.date32()), "found the type date32[day]. A time is no feature: map it (--column click_timestamp=f)"),
        (pa.array([1], pa.timestamp("us")), "found the type timestamp[us]. A time is no feature"),
        (pa.array([1], pa.time32("s")), "found the type time32[ms]. A time is no feature"),
        (pa.array([{"a": 1}]), "found the type struct<a: int64>. Convert it, make columns of its parts"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "found the type map<string, int64"),
        (pa.array([[1.5]]), "column f: expected lists of strings or whole numbers, found the type list<"),
        (pa.array([float("-inf")]), "column f, row 1: expected finite numbers, found -inf"),
    ],
)
def test_types_of_parquet_that_are_refused(tmp_path: Path, column: pa.Array, found: str) -> None:
    assert found in refused(parquet(tmp_path / "log.parquet", f=column), "parquet")


def test_times_of_parquet(tmp_path: Path) -> None:
    for column, time_ms in (
        (pa.array([T * 1_000 + 999], pa.timestamp("us", "Asia/Kolkata")), T),
        (pa.array([T * 1_000_000], pa.timestamp("ns")), T),
        (pa.array([T // 1_000], pa.timestamp("s")), T),
    ):
        file = parquet(tmp_path / "log.parquet", timestamp=column, f=pa.array([1]))
        (chunk,) = FileDataSet(file, "parquet").chunks()
        assert chunk.timestamps_ms.tolist() == [time_ms]
    file = parquet(tmp_path / "log.parquet", timestamp=pa.array([19_675], pa.date32()), f=pa.array([1]))
    assert refused(file, "parquet").endswith(f"found the type date32[day]. {NO_TIME}")


def test_parquet_in_parts_is_one_log(tmp_path: Path) -> None:
    for day in (1, 2):
        (tmp_path / "log" / f"day={day}").mkdir(parents=True)
        parquet(tmp_path / "log" / f"day={day}" / "0.parquet", f=pa.array([day * 10]))
    (chunk,) = FileDataSet(tmp_path / "log", "parquet").chunks()
    assert sorted(json.loads(features)["f"] for features in chunk.features) == [10, 20]
    assert "found a folder. Pass one file" in refused(tmp_path / "log", "jsonl")


def test_parts_of_parquet_must_agree(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    parquet(folder / "0.parquet", f=pa.array([1.5], pa.float32()), g=pa.nulls(1))
    parquet(folder / "1.parquet", f=pa.array([2.5], pa.float32()), g=pa.array(["x"]), h=pa.array([7]))
    (chunk,) = FileDataSet(folder, "parquet").chunks()
    assert [json.loads(features) for features in chunk.features] == [
        {"f": 1.5, "g": None, "h": None},
        {"f": 2.5, "g": "x", "h": 7},
    ]
    parquet(folder / "1.parquet", f=pa.array([0.1]))
    message = refused(folder, "parquet")
    assert message.startswith(
        "log, column f: expected one type in all parts, found double in 1.parquet and float in 0.parquet."
    )
    parquet(folder / "1.parquet", f=pa.array([0.5], pa.float32()), clicked=pa.array([True]))
    assert "column clicked: expected one type in all parts, found bool in 1.parquet and int64" in refused(folder, "parquet")


def test_names_of_folders_are_text(tmp_path: Path) -> None:
    for code in ("7", "007"):
        (tmp_path / "log" / f"code={code}").mkdir(parents=True)
        parquet(tmp_path / "log" / f"code={code}" / "0.parquet", f=pa.array([1]))
    (chunk,) = FileDataSet(tmp_path / "log", "parquet").chunks()
    assert sorted(json.loads(features)["code"] for features in chunk.features) == ["007", "7"]


@pytest.mark.parametrize(
    ("column", "time_ms"),
    [
        (pa.array([1_698_539_400_000_000], pa.timestamp("us", "Europe/Berlin")), 1_698_539_400_000),  # an hour that comes twice
        (pa.array([T], pa.timestamp("ms", "PST")), T),
        (pa.array([123_456_789], pa.timestamp("ns")), None),
        (pa.array([-(2**63) + 1], pa.timestamp("ms")), None),
        (pa.array([2**63 - 1], pa.timestamp("us")), None),
        (pa.array([Decimal(10**50)], pa.decimal256(60, 0)), None),
        (pa.array([1e300]), None),
        (pa.array([float("inf")]), None),
        (pa.array([2**64 - 1], pa.uint64()), None),
    ],
)
def test_times_at_the_edges(tmp_path: Path, column: pa.Array, time_ms: int | None) -> None:
    file = parquet(tmp_path / "log.parquet", timestamp=column, f=pa.array([1]))
    if time_ms is None:
        assert "column timestamp, row 1: expected times of the last 40 years" in refused(file, "parquet")
    else:
        (chunk,) = FileDataSet(file, "parquet").chunks()
        assert chunk.timestamps_ms.tolist() == [time_ms]


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        (
            {"clicked": pa.array([2**64 - 1], pa.uint64())},
            "column clicked, row 1: expected 0 or 1 in every row, found 18446744073709551615",
        ),
        (
            {"features": pa.array([{"a": 1}]), "model_version": pa.array([2**64 - 1], pa.uint64())},
            "column model_version, row 1: expected a version number, 0 or more, found 18446744073709551615",
        ),
        ({"f": pa.array([["a"]])}, "column f: expected ids that are strings or whole numbers, found the type list"),
        ({"f": pa.array([0.5])}, "column f, row 1: expected whole numbers below 2^53, where the type is a float, found 0.5"),
    ],
)
def test_numbers_at_the_edges(tmp_path: Path, columns: dict[str, pa.Array], found: str) -> None:
    file = parquet(tmp_path / "log.parquet", **columns)
    assert found in refused(file, "parquet", Columns(user="f") if "f" in columns else None)


def test_whole_numbers_of_both_signs_and_64_bits(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "log.jsonl", [{"timestamp": T, "clicked": 0, "f": value} for value in (-1, 2**64 - 1)])
    data_set = FileDataSet(file, "jsonl")
    (chunk,) = data_set.chunks()
    assert [json.loads(features)["f"] for features in chunk.features] == [-1, 2**64 - 1]
    assert data_set.schema().fields[0].kind == "categorical"
    file = parquet(tmp_path / "log.parquet", f=pa.array([Decimal(7)], pa.decimal32(5, 0)))
    (chunk,) = FileDataSet(file, "parquet").chunks()
    assert chunk.features == [b'{"f":7}']
