"""Files for the tests of data sets, and what is said of one that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.datasets import Columns, FileDataSet
from deploy.errors import DataSetError

__all__ = ["NO_TIME", "T", "parquet", "refused", "write_lines"]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


T = 1_700_000_000_000
NO_TIME = "Event times decide what is learned when: map a column that has the time of day."


def refused(file: Path, kind: str = "jsonl", columns: Columns | None = None) -> str:
    """The message with which a file is refused, without its folder."""
    with pytest.raises(DataSetError) as caught:
        list(FileDataSet(file, kind, columns).chunks())
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{file.parent}/", "")


def parquet(path: Path, **columns: Any) -> Path:
    rows = len(next(iter(columns.values())))
    pq.write_table(pa.table({"timestamp": [T] * rows, "clicked": [0] * rows} | columns), path)
    return path
