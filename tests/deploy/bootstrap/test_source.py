"""Which impressions are learned from a data set, and when a request is the same as another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.bootstrap.source import Source, fingerprint, history
from deploy.datasets import Columns
from deploy.errors import DataSetError
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from model.table_settings import TableSettings
from tests.deploy.made_up import MadeUp

SCHEMA = FeatureSchema(fields=(FieldSpec(name="u"), FieldSpec(name="item")))
MODEL = ModelSettings(hidden=(4,), batch_rows=16, row_history=False, cross_layers=0)
TIMES = (10, 20, 20, 20, 30, 40)


def rows_of(first_row: int = 0, **part: int) -> list[int]:
    source = Source("made-up", SCHEMA, 100, **part)  # type: ignore[arg-type]
    data_set = MadeUp([(time, -1) for time in TIMES[:3]], [(time, 5) for time in TIMES[3:]])
    return [int(name) for chunk in history(source, data_set, first_row) for name in chunk.ids]


def test_everything_is_learned_from_any_row_on() -> None:
    assert rows_of() == [0, 1, 2, 3, 4, 5]
    for first in range(7):
        assert rows_of(first) == list(range(first, 6))


def test_it_ends_before_the_time_that_was_asked_for() -> None:
    assert rows_of(until_ms=30) == [0, 1, 2, 3]
    assert rows_of(until_ms=31) == [0, 1, 2, 3, 4]
    assert rows_of(until_ms=20) == [0]
    assert rows_of(until_ms=5) == []


@pytest.mark.parametrize(("limit", "rows"), [(1, 1), (2, 4), (3, 4), (4, 4), (5, 5), (6, 6), (9, 6)])
def test_a_limit_keeps_the_impressions_of_a_millisecond_together(limit: int, rows: int) -> None:
    """The cut-off is a time. Half of a millisecond's impressions could be neither learned nor skipped."""
    assert rows_of(limit=limit) == list(range(rows))
    assert rows_of(2, limit=limit) == list(range(2, rows))


def test_times_that_fall_are_rejected() -> None:
    with pytest.raises(DataSetError, match="expected event times that never fall"):
        list(history(Source("made-up", SCHEMA, 100), MadeUp([(5, -1)], [(4, -1)])))


def test_a_request_is_the_same_while_nothing_that_matters_has_changed(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"timestamp":1,"clicked":0,"u":"a"}\n')

    def of(model: ModelSettings = MODEL, table: TableSettings | None = None, **changed: object) -> str:
        source = Source(**{"name": "jsonl", "schema": SCHEMA, "window_ms": 100, "path": file, **changed})  # type: ignore[arg-type]
        return fingerprint(source, model, table)

    found = of()
    assert of() == found == of(table=TableSettings())
    others = {
        of(window_ms=101),
        of(seed=1),
        of(until_ms=9),
        of(limit=3),
        of(columns=Columns(drop=frozenset(("u",)))),
        of(schema=FeatureSchema(fields=(FieldSpec(name="u"),))),
        of(model=MODEL.model_copy(update={"batch_rows": 32})),
        of(table=TableSettings(admit_after=2)),
        of(table=TableSettings(max_rows=2)),
    }
    os.utime(file, ns=(1, 1))
    others.add(of())
    assert len(others) == 10 and found not in others
