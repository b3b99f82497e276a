"""Files of one's own: the mapping of columns, units of time, and what is said when they don't fit."""

from __future__ import annotations

import gzip
import json
import os
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.datasets import Columns, FileDataSet
from deploy.errors import DataSetError
from deploy.feeding.replay import impressions
from model.schema import FeatureSchema, FieldSpec


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


def refused(file: Path, kind: str = "jsonl", columns: Columns | None = None) -> str:
    """The message with which a file is refused, without its folder."""
    with pytest.raises(DataSetError) as caught:
        list(FileDataSet(file, kind, columns).chunks())
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{file.parent}/", "")


NO_TIME = "Event times decide what is learned when: map a column that has the time of day."
NO_LABEL = "Without a label nobody knows whether it was clicked: fill it, or leave the row out."
NO_COUNT = "Counts and ratings are no labels: make 0 and 1 of them first."
ISO = "a time as 2024-05-01T10:00:00.123Z (the zone may be an offset, or left out for UTC)"
OWN_ID = "map another column (--column id=NAME), or take the rows' numbers (--column id=)."


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [{"ts": T, "f": 1}],
            Columns(),
            ": expected a column 'timestamp' (timestamp), found ts, f. Map another one: --column timestamp=NAME.",
        ),
        (
            [{"timestamp": T, "f": 1}],
            Columns(),
            ": expected a column 'clicked' (clicked), found f. Map another one: --column clicked=NAME.",
        ),
        (
            [{"timestamp": T, "f": 1}],
            Columns(clicked=None),
            ": expected a column of clicks or of click times, found neither. Map one of them: --column clicked=NAME, "
            "--column click_timestamp=NAME.",
        ),
        (
            [{"timestamp": T, "clicked": 0}],
            Columns(),
            ": expected features beside the mapped columns, found none. Map fewer columns, or drop fewer.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1}],
            Columns(item="sku"),
            ": expected a column 'sku' (user, item or candidate feature), found f. Name another one.",
        ),
        (
            [{"timestamp": "noon", "clicked": 0, "f": 1}],
            Columns(),
            f", column timestamp, row 1: expected {ISO}, found 'noon'. Write it so, or as a number (--unit).",
        ),
        (
            [
                {"timestamp": "2023-11-14T22:13:20Z", "clicked": 0, "f": 1},
                {"timestamp": "2023-02-30T00:00:00Z", "clicked": 0, "f": 1},
            ],
            Columns(),
            f", column timestamp, row 2: expected {ISO}, found '2023-02-30T00:00:00Z'. Write it so, or as a number (--unit).",
        ),
        (
            [{"timestamp": "2023-11-14", "clicked": 0, "f": 1}],
            Columns(),
            f", column timestamp, row 1: expected {ISO}, found '2023-11-14'. {NO_TIME}",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1}, {"timestamp": None, "clicked": 0, "f": 1}],
            Columns(),
            ", column timestamp, row 2: expected a time in every row, found null. Fill it, or leave the row out.",
        ),
        (
            [{"timestamp": T + 9, "clicked": 1, "at": T + 5, "f": 1}],
            Columns(click_timestamp="at"),
            ", column at, row 1: expected clicks at or after their impressions, found one 4 ms before. Fix the row, or "
            "check --unit.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "at": T + 5, "f": 1}],
            Columns(click_timestamp="at"),
            ", column at, row 1: expected no click time where the label is 0, found one. Decide for one of them: "
            "--column clicked= takes "
            "the times, --drop at the labels.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": {"a": 1}}],
            Columns(),
            ", column f, row 1: expected a string, a number or a list of strings, found an object. Make columns of its "
            "parts, or leave it "
            "out: --drop f.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": [["a"]]}],
            Columns(),
            ", column f, row 1: expected a string, a number or a list of strings, found a list of lists or objects. "
            "Make columns of its "
            "parts, or leave it out: --drop f.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": [1.5]}],
            Columns(),
            ", column f: expected lists of strings or whole numbers, found the type list<item: double>. Lists hold "
            "strings: make columns "
            "of its parts, or leave it out: --drop f.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": ["a"]}, {"timestamp": T, "clicked": 0, "f": ["a", None]}],
            Columns(),
            ", column f, row 2: expected lists without null, found null. Leave it out of the list.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1}, {"timestamp": T, "clicked": 0, "f": "x"}],
            Columns(),
            ", column f, row 2: expected values of one type, found a string ('x') after a whole number (1). Write them "
            "all as strings, say, "
            "or leave the column out: --drop f.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 2**70}],
            Columns(),
            ", column f, row 1: expected whole numbers of at most 64 bits, found 1180591620717411303424. Write longer "
            "ones as strings, or "
            "leave the column out: --drop f.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 2**53 + 1}, {"timestamp": T, "clicked": 0, "f": 0.5}],
            Columns(),
            ", column f, row 1: expected numbers that a float holds, since the column has fractions, found "
            "9007199254740993. Write the "
            "column as strings.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1, "impression_id": 10**39}],
            Columns(),
            ", column impression_id, row 1: expected whole numbers of at most 38 digits, found one of 40 digits. Write "
            "it as a string.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": "2023-11-14T22:13:20Z"}],
            Columns(),
            ", column f: expected strings, numbers or lists of strings, found a time. A time is no feature: map it (--column "
            "click_timestamp=f), leave it out (--drop f), or convert it.",
        ),
        (
            [{"timestamp": T // 1_000, "clicked": 0, "f": 1}],
            Columns(),
            ", column timestamp, row 1: expected times of the last 40 years in ms, found 1700000000, which looks like "
            "seconds. Pass "
            "--unit s.",
        ),
        (
            [{"timestamp": T * 1_000, "clicked": 0, "f": 1}],
            Columns(),
            ", column timestamp, row 1: expected times of the last 40 years in ms, found 1700000000000000, which looks "
            "like microseconds. "
            "Pass --unit us.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1}],
            Columns(unit="s"),
            ", column timestamp, row 1: expected times of the last 40 years in s, found 1700000000000, which is "
            "plausible in ms. Pass "
            "--unit ms.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1}, {"timestamp": 5, "clicked": 0, "f": 1}],
            Columns(),
            ", column timestamp, row 2: expected times of the last 40 years in ms, found 5. Fix the row, or leave it out.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1, "at": 5}],
            Columns(clicked=None, click_timestamp="at"),
            ", column at, row 1: expected times of the last 40 years in ms, found 5. Fix the row, or leave it out.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1}, {"timestamp": T, "clicked": None, "f": 1}],
            Columns(),
            f", column clicked, row 2: expected 0 or 1 in every row, found null. {NO_LABEL}",
        ),
        (
            [{"timestamp": T, "clicked": 2, "f": 1}],
            Columns(),
            f", column clicked, row 1: expected 0 or 1 in every row, found 2. {NO_COUNT}",
        ),
        (
            [{"timestamp": T, "clicked": -0.5, "f": 1}],
            Columns(),
            f", column clicked, row 1: expected 0 or 1 in every row, found -0.5. {NO_COUNT}",
        ),
        (
            [{"timestamp": T, "clicked": "yes", "f": 1}],
            Columns(),
            ", column clicked, row 1: expected labels that are true and false, or 1 and 0, found the text 'yes'. Convert the "
            "column, or map another one.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1, "impression_id": x} for x in ("a", "b", "a")],
            Columns(),
            ", column impression_id, row 3: expected ids that are unique, found 'a' again, first in row 1. An "
            "impression id is used once: " + OWN_ID,
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1, "impression_id": x} for x in ("a", None)],
            Columns(),
            f", column impression_id, row 2: expected an id in every row, found null. Fill it, {OWN_ID}",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1, "impression_id": x} for x in ("a", "")],
            Columns(),
            ", column impression_id, row 2: expected an id in every row, found an empty string. Fill it, or map "
            "another column.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1, "impression_id": 1.5}],
            Columns(),
            ", column impression_id, row 1: expected whole numbers below 2^53, where the type is a float, found 1.5. "
            "Write ids as integers "
            "or strings.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "features": {"f": 1}, "score": 1.5}],
            Columns(),
            ", column score, row 1: expected a probability, found 1.5. Fix it, or leave it out: --column score=.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "features": {"f": 1}, "model_version": -1}],
            Columns(),
            ", column model_version, row 1: expected a version number, 0 or more, found -1. Fix it, or leave it out: --column "
            "model_version=.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "features": {"f": 1}, "f": 2}],
            Columns(),
            ": expected one feature of the name 'f', found a column and a member of `features`. Leave both out (--drop "
            "f), or rename one.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "features": {"f": 1}}, {"timestamp": T, "clicked": 0, "features": None}],
            Columns(),
            ", column features, row 2: expected an object of features, found null. Fix the line.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": "x" * 2_000_000}],
            Columns(),
            ", row 1: expected events of at most 1048588 bytes (topics.max_message_bytes), found 2000006. Leave "
            "columns out (--drop), or "
            "raise topics.max_message_bytes.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "": 1}],
            Columns(),
            ": expected features with names, found an empty name. Rename the column.",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, rows: list[dict[str, Any]], columns: Columns, message: str) -> None:
    file = write_lines(tmp_path / "log.jsonl", rows)
    assert refused(file, columns=columns) == f"log.jsonl{message}"


def test_what_is_dropped_does_no_harm(tmp_path: Path) -> None:
    row = {"timestamp": T, "clicked": 0, "f": 1, "device": {"os": "a"}, "sku": [[1]], "signup": "2023-11-14T22:13:20Z"}
    file = write_lines(tmp_path / "log.jsonl", [row, row | {"sku": 1, "device": None}])
    (chunk,) = FileDataSet(file, "jsonl", Columns(drop=frozenset({"device", "sku", "signup"}))).chunks()
    assert chunk.features == [b'{"f":1}', b'{"f":1}']


def test_a_dump_of_impressions_keeps_its_envelope(tmp_path: Path) -> None:
    row = {"impression_id": "i", "timestamp": T, "features": {"u": "x"}, "score": 0.25, "model_version": 3, "clicked": 0}
    file = write_lines(tmp_path / "log.jsonl", [row, row | {"impression_id": "j", "score": None, "model_version": None}])
    data_set = FileDataSet(file, "jsonl")
    (chunk,) = data_set.chunks()
    with_score, without = (json.loads(value) for value in impressions(chunk, [0, 1], {}))
    assert with_score == {key: value for key, value in row.items() if key != "clicked"}
    assert without == {"impression_id": "j", "timestamp": T, "features": {"u": "x"}}
    assert [field.name for field in data_set.schema().fields] == ["u"]
    (chunk,) = FileDataSet(file, "jsonl", Columns(score=None, model_version=None)).chunks()
    assert (chunk.features[0], chunk.served) == (b'{"u":"x"}', None)


def test_features_called_like_the_envelope_stay_features(tmp_path: Path) -> None:
    row = {"impression_id": "i", "timestamp": T, "features": {"timestamp": "x", "score": 7}, "clicked": 0}
    (chunk,) = FileDataSet(write_lines(tmp_path / "log.jsonl", [row]), "jsonl").chunks()
    assert json.loads(chunk.features[0]) == {"timestamp": "x", "score": 7}
    flat = {"timestamp": T, "clicked": 0, "score": 7}  # without `features` a column of that name is one of them
    (chunk,) = FileDataSet(write_lines(tmp_path / "flat.jsonl", [flat]), "jsonl").chunks()
    assert (json.loads(chunk.features[0]), chunk.served) == ({"score": 7}, None)


@pytest.mark.parametrize(
    ("value", "time_ms"),
    [
        ("2023-11-14T22:13:20Z", T),
        ("2023-11-14 22:13:20", T),
        ("2023-11-15T03:43:20+05:30", T),
        ("2023-11-15T03:43:20.123456789+0530", T + 123),
        ("2023-11-14T22:13:20.5", T + 500),
        ("2023-11-14T22:13Z", T - 20_000),
        ("1700000000000", T),
        (float(T), T),
        ("1969-12-31T23:59:59.9999Z", None),
    ],
)
def test_times_are_read_in_every_usual_way(tmp_path: Path, value: object, time_ms: int | None) -> None:
    file = write_lines(tmp_path / "log.jsonl", [{"timestamp": value, "clicked": 0, "f": 1}])
    if time_ms is None:
        assert "expected times of the last 40 years" in refused(file)
        return
    (chunk,) = FileDataSet(file, "jsonl").chunks()
    assert chunk.timestamps_ms.tolist() == [time_ms]


def test_ids_are_taken_digit_by_digit(tmp_path: Path) -> None:
    names = [10000169349117863715, 10000169349117863722, -3, 10**30]
    file = write_lines(tmp_path / "log.jsonl", [{"id": name, "timestamp": T, "clicked": 0, "f": 1} for name in names])
    (chunk,) = FileDataSet(file, "jsonl", Columns(id="id")).chunks()
    assert chunk.ids == [str(name) for name in names]


def test_text_stays_as_it_was_written(tmp_path: Path) -> None:
    rows = [{"timestamp": T, "clicked": 0, "day": day, "zip": zip_} for day, zip_ in (("2021-01-01", "007"), ("x", "1e5"))]
    (chunk,) = FileDataSet(write_lines(tmp_path / "log.jsonl", rows), "jsonl").chunks()
    assert [json.loads(features) for features in chunk.features] == [{"day": row["day"], "zip": row["zip"]} for row in rows]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "expected at least one row, found none. Check the file."),
        (b'[{"timestamp": 1}]', "found '[{\"timestamp\": 1}]' (Expected `object`, got `array`). Write one object a line"),
        (
            b'{\n"timestamp": 1}\n',
            "row 1: expected one JSON object a line, in UTF-8, found '{' (Input data was truncated). Write one object",
        ),
        (b'{"a": 1} {"a": 2}\n', "row 1: expected one JSON object a line, in UTF-8, found"),
        (b'{"a": "\xff"}\n', "row 1: expected one JSON object a line, in UTF-8, found"),
        (b"[" * 100_000, "row 1: expected one JSON object a line, in UTF-8, found"),
        ('{"a": 1}'.encode("utf-16"), "expected text in UTF-8, found UTF-16 or UTF-32. Convert it: iconv"),
        (b"\x1f\x8bgarbage", "expected a readable file in the format jsonl, found"),
    ],
)
def test_files_that_are_not_json_lines(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "log.jsonl").write_bytes(content)
    assert found in refused(tmp_path / "log.jsonl")


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda text: pa.compress(text, "zstd", asbytes=True)])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_break", [b"\n", b"\r\n"])
def test_files_as_people_have_them(tmp_path: Path, pack: Any, mark: bytes, line_break: bytes) -> None:
    rows = [json.dumps({"timestamp": T + n, "clicked": n % 2, "f": n}).encode() for n in range(3)]
    (tmp_path / "no suffix").write_bytes(pack(mark + line_break.join([rows[0], b"  ", *rows[1:]])))
    (chunk,) = FileDataSet(tmp_path / "no suffix", "jsonl").chunks()
    assert [json.loads(features) for features in chunk.features] == [{"f": n} for n in range(3)]


def test_columns_that_change_between_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.datasets.text_files._BLOCK_BYTES", 64)
    rows: list[dict[str, Any]] = [{"timestamp": T, "clicked": 0, "a": 1}] * 5 + [
        {"timestamp": T, "clicked": 0, "a": 0.5, "b": "x"}
    ] * 5
    (chunk,) = FileDataSet(write_lines(tmp_path / "log.jsonl", rows), "jsonl").chunks()
    assert [json.loads(features) for features in chunk.features] == [{"a": 1, "b": None}] * 5 + [{"a": 0.5, "b": "x"}] * 5
    rows[7] = {"timestamp": T, "clicked": 0, "a": "x"}
    assert "column a, row 8: expected values of one type" in refused(write_lines(tmp_path / "log.jsonl", rows))


def test_csv_and_tsv(tmp_path: Path) -> None:
    header = ["impression_id", "timestamp", "clicked", "user", "price", "zip", "long", "seen", "none", "note"]
    lines = [
        ["1.0", str(T), "1", "7", "9.5", "007", "10000169349117863715000", "true", "", '"a\nb"'],
        ["01", str(T + 1), "0", "", "nan", "12", "1", "FALSE", "", '"NA"'],
    ]
    expected = [
        {"user": 7, "price": 9.5, "zip": "007", "long": "10000169349117863715000", "seen": 1, "none": None, "note": "a\nb"},
        {"user": None, "price": None, "zip": "12", "long": "1", "seen": 0, "none": None, "note": "NA"},
    ]
    for kind, delimiter in (("csv", ","), ("tsv", "\t")):
        if kind == "tsv":  # which has no quotes
            lines = [[cell.replace('"', "").replace("\n", " ") for cell in row] for row in lines]
            expected = [expected[0] | {"note": "a b"}, expected[1] | {"note": None}]
        file = tmp_path / f"log.{kind}"
        file.write_text("\ufeff" + "\r\n".join(delimiter.join(row) for row in [header, *lines]) + "\r\n")
        data_set = FileDataSet(file, kind)
        (chunk,) = data_set.chunks()
        assert [json.loads(features) for features in chunk.features] == expected
        assert (chunk.ids, chunk.clicked.tolist()) == (["1.0", "01"], [True, False])
        assert [field.kind for field in data_set.schema().fields][:3] == ["categorical", "numeric", "categorical"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("timestamp,clicked\n1,2,3\n", "expected comma-separated values in UTF-8, with a header line, found"),
        ("timestamp,,f\n1,0,1\n", "expected a header line with a name for each column, found none for column 2"),
        ("timestamp,f,f\n1,0,1\n", "expected columns of different names, found 'f' twice"),
        ("", "expected comma-separated values in UTF-8, with a header line, found"),
        (f"timestamp,clicked,f\n{T},0,inf\n", "column f, row 1: expected finite numbers, found inf"),
        (f"timestamp,clicked,f\n{T},0,9007199254740993\n{T},0,0.5\n", "column f, row 1: expected numbers that a float holds"),
    ],
)
def test_csv_that_does_not_fit(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "log.csv").write_text(text)
    assert found in refused(tmp_path / "log.csv", "csv")


def parquet(path: Path, **columns: Any) -> Path:
    rows = len(next(iter(columns.values())))
    pq.write_table(pa.table({"timestamp": [T] * rows, "clicked": [0] * rows} | columns), path)
    return path


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


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("hello")
    assert refused(tmp_path / "x.parquet", "parquet").startswith("x.parquet: expected Parquet, found ")
    assert (
        refused(tmp_path / "nowhere", "csv") == "nowhere: expected a file in the format csv, found nothing there. Check --path."
    )
    with pytest.raises(DataSetError, match=r"unit: expected one of s, ms, us, ns, found 'h'\. Change --unit\."):
        FileDataSet(parquet(tmp_path / "y.parquet", f=pa.array([1])), "parquet", Columns(unit="h")).size()


@pytest.mark.parametrize(
    ("field", "found"),
    [
        (
            {"name": "text", "kind": "numeric"},
            "column text: expected a numeric field, as the settings' features say, found the type string.",
        ),
        ({"name": "text", "kind": "list"}, "column text: expected a list field"),
        (
            {"name": "part"},
            "column part, row 2: expected a categorical field, as the settings' features say, found 0.5, which is no category.",
        ),
        ({"name": "tags"}, "column tags: expected a categorical field"),
        ({"name": "tags", "kind": "numeric"}, "column tags: expected a numeric field"),
        ({"name": "typo"}, "expected some of the settings' features (typo, …), found text, part, tags, whole."),
        ({"name": "text"}, None),
        ({"name": "whole", "kind": "numeric"}, None),
        ({"name": "whole"}, None),
        ({"name": "part", "kind": "numeric"}, None),
        ({"name": "tags", "kind": "list"}, None),
    ],
)
def test_a_model_that_could_not_read_it_is_named(tmp_path: Path, field: dict[str, Any], found: str | None) -> None:
    columns = {"text": ["a", "b"], "part": [1.0, 0.5], "tags": [["a"], []], "whole": [1.0, 2.0]}
    data_set = FileDataSet(parquet(tmp_path / "log.parquet", **columns), "parquet")
    schema = FeatureSchema(fields=(FieldSpec.model_validate(field),))
    if found is None:
        data_set.check(schema)
        return
    with pytest.raises(DataSetError) as caught:
        data_set.check(schema)
    assert found in str(caught.value)


@pytest.mark.parametrize("role", ["clicked", "id", "score", "model_version", "click_timestamp"])
def test_a_role_that_is_said_to_have_no_column_leaves_the_contracts_column_out(tmp_path: Path, role: str) -> None:
    row = {"timestamp": T, "clicked": 1, "click_timestamp": T, "impression_id": "a", "score": 0.5, "model_version": 1, "f": 1}
    file = write_lines(tmp_path / "log.jsonl", [row])
    roles: dict[str, Any] = {"score": None, "model_version": None, role: None}
    (chunk,) = FileDataSet(file, "jsonl", Columns(**roles)).chunks()
    assert (chunk.features, chunk.clicked.tolist()) == ([b'{"f":1}'], [True])


def test_a_column_has_one_role(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "log.jsonl", [{"timestamp": T, "clicked": 1, "f": 1}])
    assert refused(file, columns=Columns(id="timestamp")) == (
        "log.jsonl: expected one role for the column 'timestamp', found timestamp and id. Copy the column in the file, "
        "or leave one "
        "role out."
    )


def test_an_option_for_a_column_that_is_not_there(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "log.jsonl", [{"timestamp": T, "clicked": 1, "f": 1}])
    told = "found timestamp, clicked, f. Correct the name, or leave the option out."
    message = refused(file, columns=Columns(drop=frozenset({"typo"})))
    assert message.startswith("log.jsonl: expected a column 'typo' (--drop), found ")
    assert {*message.partition("found ")[2].partition(". ")[0].split(", ")} == {"timestamp", "clicked", "f"}, told
    (tmp_path / "log.csv").write_text(f"timestamp,clicked,f\n{T},1,1\n")
    message = refused(tmp_path / "log.csv", "csv", Columns(text=frozenset({"typo"})))
    assert message == f"log.csv: expected a column 'typo' (--text), {told}"


def test_text_of_csv_stays_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(f"timestamp,clicked,version,sku,price\n{T},1,1.10,10e4,2.50\n{T},0,1.1,1e5,3\n")
    columns = Columns(item="sku", text=frozenset({"version"}))
    (chunk,) = FileDataSet(tmp_path / "log.csv", "csv", columns).chunks()
    assert [json.loads(features) | json.loads(own) for features, own in zip(chunk.features, chunk.candidates, strict=True)] == [
        {"version": "1.10", "price": 2.5, "sku": "10e4"},
        {"version": "1.1", "price": 3, "sku": "1e5"},
    ]
    assert chunk.items == ["10e4", "1e5"]


@pytest.mark.parametrize(
    ("kind", "line", "found"),
    [
        (
            "csv",
            f'{T},0,"abc',
            "log.csv, row 1: expected values in quotes as RFC 4180 has them, found",
        ),
        (
            "csv",
            f'{T},0,"say \\"hi\\""',
            "log.csv, row 1: expected values in quotes as RFC 4180 has them, found ',' expected after",
        ),
        ("csv", f'{T},0,"abc" def', "log.csv, row 1: expected values in quotes as RFC 4180 has them"),
        ("tsv", f'{T}\t0\t"abc"', "log.tsv, column f, row 1: expected TSV, which has no quotes, found '\"abc\"'."),
    ],
)
def test_quotes_that_could_mean_two_things(tmp_path: Path, kind: str, line: str, found: str) -> None:
    header = ("," if kind == "csv" else "\t").join(["timestamp", "clicked", "f"])
    (tmp_path / f"log.{kind}").write_text(f"{header}\n{line}\n{line.replace('abc', 'x')}\n")
    assert refused(tmp_path / f"log.{kind}", kind).startswith(found)


def test_quotes_in_tsv_are_characters(tmp_path: Path) -> None:
    (tmp_path / "log.tsv").write_text(
        "timestamp\tclicked\tf\n" + "".join(f"{T}\t0\t{cell}\n" for cell in ('"foo', 'b"', '"a" b'))
    )
    (chunk,) = FileDataSet(tmp_path / "log.tsv", "tsv").chunks()
    assert [json.loads(features)["f"] for features in chunk.features] == ['"foo', 'b"', '"a" b']


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


def test_everything_inside_features(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "log.jsonl", [{"features": {"timestamp": T, "clicked": 1, "f": 1}}])
    (chunk,) = FileDataSet(file, "jsonl").chunks()
    assert (chunk.timestamps_ms.tolist(), chunk.features) == ([T], [b'{"f":1}'])


def test_a_file_that_grows_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_lines(tmp_path / "log.jsonl", [{"timestamp": T, "clicked": 1, "f": 1}])
    from deploy.datasets import json_lines

    decide = json_lines._Columns.decide

    def grow(columns: json_lines._Columns) -> None:
        decide(columns)
        with file.open("a") as out:
            out.write(json.dumps({"timestamp": T, "clicked": 1, "f": 2.5, "g": "x"}) + "\n")

    monkeypatch.setattr(json_lines._Columns, "decide", grow)
    (chunk,) = FileDataSet(file, "jsonl").chunks()
    assert chunk.features == [b'{"f":1}']


def test_a_name_that_no_file_can_hold(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"\\ud800": 1}\n')
    assert "expected names that UTF-8 can hold, found half of a surrogate pair in '\\ud800'" in refused(tmp_path / "log.jsonl")


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for kind in ("jsonl", "csv", "parquet"):
        assert refused(tmp_path / "pipe", kind) == (
            f"pipe: expected a file in the format {kind}, found a pipe or a device. It is read twice: write it to a file first."
        )


def test_a_header_alone_and_a_header_in_latin_1(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("timestamp,clicked,f\n")
    assert refused(tmp_path / "log.csv", "csv") == "log.csv: expected at least one row, found none. Check the file."
    (tmp_path / "log.csv").write_bytes(f"timestamp,clicked,\xe9\n{T},1,1\n".encode("latin-1"))
    assert refused(tmp_path / "log.csv", "csv").startswith(
        "log.csv: expected comma-separated values in UTF-8, with a header line"
    )
