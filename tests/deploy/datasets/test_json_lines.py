"""JSON lines as people have them: envelopes, times, ids, compressions, and files that are not JSON lines."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from deploy.datasets import Columns, FileDataSet
from deploy.datasets.json_lines import read_json_lines
from deploy.feeding.replay import impressions
from tests.deploy.datasets.files import T, refused, write_lines


def test_a_dump_of_impressions_keeps_its_envelope(tmp_path: Path) -> None:
    row = {"impression_id": "i", "timestamp": T, "features": {"u": "x"}, "score": 0.25, "model_version": 3, "delta": 17}
    row["clicked"] = 0
    file = write_lines(
        tmp_path / "log.jsonl", [row, row | {"impression_id": "j", "score": None, "model_version": None, "delta": None}]
    )
    data_set = FileDataSet(file, "jsonl")
    (chunk,) = data_set.chunks()
    with_score, without = (json.loads(value) for value in impressions(chunk, [0, 1], {}))
    assert with_score == {key: value for key, value in row.items() if key != "clicked"}
    assert without == {"impression_id": "j", "timestamp": T, "features": {"u": "x"}}
    assert [field.name for field in data_set.schema().fields] == ["u"]
    (chunk,) = FileDataSet(file, "jsonl", Columns(score=None, model_version=None, delta=None)).chunks()
    assert (chunk.features[0], chunk.served) == (b'{"u":"x"}', None)


def test_features_called_like_the_envelope_stay_features(tmp_path: Path) -> None:
    row = {"impression_id": "i", "timestamp": T, "features": {"timestamp": "x", "score": 7, "delta": 0.5}, "clicked": 0}
    (chunk,) = FileDataSet(write_lines(tmp_path / "log.jsonl", [row]), "jsonl").chunks()
    assert json.loads(chunk.features[0]) == {"timestamp": "x", "score": 7, "delta": 0.5}
    flat = {"timestamp": T, "clicked": 0, "score": 7, "delta": 0.5}  # without `features` a column of that name is one of them
    (chunk,) = FileDataSet(write_lines(tmp_path / "flat.jsonl", [flat]), "jsonl").chunks()
    assert (json.loads(chunk.features[0]), chunk.served) == ({"score": 7, "delta": 0.5}, None)


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


def test_whole_numbers_beyond_2_53_that_are_doubles_fit_into_a_column_of_floats(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"f":9007199254740994,"l":[9007199254740994]}\n{"f":0.5,"l":[0.5]}\n')
    table, _ = read_json_lines(file)
    assert table["f"].type == pa.float64()
    assert table.to_pylist() == [{"f": 9007199254740994.0, "l": [9007199254740994.0]}, {"f": 0.5, "l": [0.5]}]
