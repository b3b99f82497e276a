"""Files of one's own: the mapping of columns, units of time, and roles that a column can have."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.datasets import Columns, FileDataSet
from deploy.errors import DataSetError
from model.schema import FeatureSchema, FieldSpec
from tests.deploy.datasets.files import T, parquet, refused, write_lines


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


@pytest.mark.parametrize(
    ("unit", "value"),
    [("s", 1_650_812_741.436), ("ms", 1_650_812_741_436), ("us", 1_650_812_741_436_000), ("ns", 1_650_812_741_436 * 10**6)],
)
def test_units_of_time(tmp_path: Path, unit: str, value: float) -> None:
    file = write_lines(tmp_path / "log.jsonl", [{"timestamp": value, "clicked": 0, "f": 1}])
    (chunk,) = FileDataSet(file, "jsonl", Columns(unit=unit)).chunks()
    assert chunk.timestamps_ms.tolist() == [1_650_812_741_436]


def test_what_is_dropped_does_no_harm(tmp_path: Path) -> None:
    row = {"timestamp": T, "clicked": 0, "f": 1, "device": {"os": "a"}, "sku": [[1]], "signup": "2023-11-14T22:13:20Z"}
    file = write_lines(tmp_path / "log.jsonl", [row, row | {"sku": 1, "device": None}])
    (chunk,) = FileDataSet(file, "jsonl", Columns(drop=frozenset({"device", "sku", "signup"}))).chunks()
    assert chunk.features == [b'{"f":1}', b'{"f":1}']


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


def test_fields_that_a_file_lacks_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data_set = FileDataSet(parquet(tmp_path / "log.parquet", text=["a", "b"]), "parquet")
    one, more = ({"name": name} for name in ("text", "typo"))
    data_set.check(FeatureSchema(fields=(FieldSpec.model_validate(one),)))
    assert caplog.messages == []
    for _ in range(2):
        data_set.check(FeatureSchema(fields=(FieldSpec.model_validate(one), FieldSpec.model_validate(more))))
    (said,) = caplog.messages
    assert "log.parquet has no column for typo of the settings' features.fields" in said


@pytest.mark.parametrize("role", ["clicked", "id", "score", "model_version", "delta", "click_timestamp"])
def test_a_role_that_is_said_to_have_no_column_leaves_the_contracts_column_out(tmp_path: Path, role: str) -> None:
    row = {"timestamp": T, "clicked": 1, "click_timestamp": T, "impression_id": "a", "score": 0.5, "f": 1}
    row |= {"model_version": 1, "delta": 0}
    file = write_lines(tmp_path / "log.jsonl", [row])
    roles: dict[str, Any] = {"score": None, "model_version": None, "delta": None, role: None}
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
    found = "found timestamp, clicked, f. Correct the name, or leave the option out."
    message = refused(file, columns=Columns(drop=frozenset({"typo"})))
    assert message.startswith("log.jsonl: expected a column 'typo' (--drop), found ")
    assert {*message.partition("found ")[2].partition(". ")[0].split(", ")} == {"timestamp", "clicked", "f"}, found
    (tmp_path / "log.csv").write_text(f"timestamp,clicked,f\n{T},1,1\n")
    message = refused(tmp_path / "log.csv", "csv", Columns(text=frozenset({"typo"})))
    assert message == f"log.csv: expected a column 'typo' (--text), {found}"


def test_a_name_that_no_file_can_hold(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"\\ud800": 1}\n')
    assert "expected names that UTF-8 can hold, found half of a surrogate pair in '\\ud800'" in refused(tmp_path / "log.jsonl")


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for kind in ("jsonl", "csv", "parquet"):
        assert refused(tmp_path / "pipe", kind) == (
            f"pipe: expected a file in the format {kind}, found a pipe or a device. It is read twice: write it to a file first."
        )
