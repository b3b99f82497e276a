"""JSON lines: the type of a column holds every value exactly."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from deploy.datasets.json_lines import read_json_lines


def test_whole_numbers_beyond_2_53_that_are_doubles_fit_into_a_column_of_floats(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"f":9007199254740994,"l":[9007199254740994]}\n{"f":0.5,"l":[0.5]}\n')
    table, _ = read_json_lines(file)
    assert table["f"].type == pa.float64()
    assert table.to_pylist() == [{"f": 9007199254740994.0, "l": [9007199254740994.0]}, {"f": 0.5, "l": [0.5]}]
