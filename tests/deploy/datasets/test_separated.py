"""CSV and TSV: quotes, encodings, headers, and text that stays as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.datasets import Columns, FileDataSet
from tests.deploy.datasets.files import T, refused


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


def test_a_header_alone_and_a_header_in_latin_1(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("timestamp,clicked,f\n")
    assert refused(tmp_path / "log.csv", "csv") == "log.csv: expected at least one row, found none. Check the file."
    (tmp_path / "log.csv").write_bytes(f"timestamp,clicked,\xe9\n{T},1,1\n".encode("latin-1"))
    assert refused(tmp_path / "log.csv", "csv").startswith(
        "log.csv: expected comma-separated values in UTF-8, with a header line"
    )
