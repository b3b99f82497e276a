from __future__ import annotations

from prometheus_client import CollectorRegistry

from model.census import FieldCounts, TableStats
from stream.trainer.table_metrics import TableMetrics, table_figures

BEFORE = TableStats(10, 2_000, (FieldCounts("user", 7, 9, 4, 2), FieldCounts("item", 2, 2, 0, 0)))
AFTER = TableStats(12, 2_400, (FieldCounts("user", 8, 12, 4, 4), FieldCounts("item", 4, 4, 1, 0)))


def test_rows_are_shown_as_they_are_and_counters_count_from_the_first_look() -> None:
    prometheus = CollectorRegistry()
    metrics = TableMetrics(prometheus)

    def value(name: str, field: str | None = None) -> float | None:
        return prometheus.get_sample_value(f"headrace_trainer_table_{name}", {} if field is None else {"field": field})

    metrics.show(BEFORE)
    assert (value("rows", "user"), value("rows", "item"), value("rows", ""), value("bytes")) == (7, 2, 1, 2_000)
    assert value("admitted_total", "user") == 0  # what the model had before is no news
    metrics.show(AFTER)
    assert (value("rows", "user"), value("rows", ""), value("bytes")) == (8, 0, 2_400)
    names = ("admitted_total", "refused_total", "evicted_total")
    assert [value(name, "user") for name in names] == [3, 0, 2]
    assert [value(name, "item") for name in names] == [2, 1, 0]
    metrics.show(BEFORE)  # the trainer went back to an older version
    metrics.show(AFTER)
    assert [value(name, "user") for name in names] == [6, 0, 4]


def test_a_manifest_has_the_totals() -> None:
    figures = {"rows": 12, "bytes": 2_400, "admitted": 16, "refused": 5, "evicted": 4}
    assert table_figures(AFTER) == {f"table_{name}": value for name, value in figures.items()}
