"""What the trainer reports about the table of rows."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from model.census import TableStats

__all__ = ["TableMetrics", "table_figures"]


class TableMetrics:
    """Registered once in a trainer."""

    def __init__(self, prometheus: CollectorRegistry) -> None:
        self._rows = Gauge(
            "headrace_trainer_table_rows",
            "Rows of a field's values. Rows whose field isn't known yet are counted under the empty name.",
            ["field"],
            registry=prometheus,
        )
        self._bytes = Gauge(
            "headrace_trainer_table_bytes", "Memory of the table: keys, weights and what training keeps.", registry=prometheus
        )
        self._counters = {
            name: Counter(f"headrace_trainer_table_{name}", meaning, ["field"], registry=prometheus)
            for name, meaning in (
                ("admitted", "Times that a value got a row."),
                ("refused", "Impressions of values that had no row and got none (table.admit_after, table.max_rows)."),
                ("evicted", "Rows that were evicted (table.evict_after_ms, table.evict_below, table.max_rows)."),
            )
        }
        self._before: TableStats | None = None

    def show(self, stats: TableStats) -> None:
        """Show the table as it is now. Counters count from the first call on."""
        self._bytes.set(stats.size)
        self._rows.labels("").set(stats.unknown)
        before = {each.field: each for each in (stats if self._before is None else self._before).fields}
        for each in stats.fields:
            self._rows.labels(each.field).set(each.rows)
            for name, counter in self._counters.items():
                more = getattr(each, name) - getattr(before.get(each.field, each), name)
                counter.labels(each.field).inc(max(more, 0))  # fewer than before: the trainer went back to an older version
        self._before = stats


def table_figures(stats: TableStats) -> dict[str, float]:
    """What a version's manifest says of the table."""
    totals = {name: sum(getattr(each, name) for each in stats.fields) for name in ("admitted", "refused", "evicted")}
    return {"table_rows": stats.rows, "table_bytes": stats.size, **{f"table_{name}": count for name, count in totals.items()}}
