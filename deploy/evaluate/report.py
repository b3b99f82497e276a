"""The results of an evaluation as a document for machines, and as tables for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from deploy.evaluate.figures import FIGURES, Estimate, Figures, difference, mean_figures
from deploy.evaluate.history import HistoryFigures
from deploy.evaluate.runs import Evaluated, Judgement, Line

__all__ = ["document", "tables"]

_DIGITS = 6  # of figures in documents


def document(evaluated: Evaluated) -> dict[str, Any]:
    """The first line's figures at the top; all lines, each with its difference from the first, in `runs`."""
    base = evaluated.lines[0]
    runs = []
    for line in evaluated.lines:
        found = _line(line, evaluated)
        if line is not base:
            found["against_base"] = {
                name: {"difference": _rounded(one.value), "interval": _interval(one)}
                for name, one in difference(line.served, base.served).items()
            }
        runs.append(found)
    return {
        "dataset": evaluated.stream.name,
        "impressions": len(evaluated.stream),
        "judged_impressions": len(evaluated.measured),
        "judged_from_ms": int(evaluated.stream.shown_ms[evaluated.measured[0]]),
        "judged_to_ms": int(evaluated.stream.shown_ms[evaluated.measured[-1]]),
        **{name: value for name, value in runs[0].items() if name != "name"},
        **({"history": [_history(each) for each in evaluated.history]} if evaluated.history else {}),
        "runs": runs,
    }


def _history(each: HistoryFigures) -> dict[str, Any]:
    return {
        "field": each.field,
        **{
            name: {"auc": _rounded(one.value), "interval": _interval(one)}
            for name, one in (("at_impression", each.at_impression), ("at_label", each.at_label), ("leak", each.leak))
        },
    }


def _line(line: Line, evaluated: Evaluated) -> dict[str, Any]:
    served = mean_figures(line.served)
    return {
        "name": line.name,
        "ctr": _rounded(served.ctr),
        **_figures(served),
        "progressive": _figures(mean_figures(line.progressive)),
        "seeds": len(line.served),
        "learned": line.learned,
        "rows_per_s": _rounded(line.rows_per_s, 1),
        "seconds": _rounded(line.seconds, 1),
        "table_rows": line.table_rows,
        "weights_age_s": _rounded(line.weights_age_s, 3),
        "set_aside": line.set_aside,
        "calibration_deciles": [_group(each) for each in line.deciles],
        "by": {field: [_group(each) for each in values] for field, values in line.by.items()},
        "rare": [_group(each) for each in line.rare],
        "groups_off": sum(mean_figures(each.figures).off for groups in (line.deciles, *line.by.values()) for each in groups),
        "over_time": [{"from_ms": int(evaluated.stream.shown_ms[each.group.rows[0]]), **_group(each)} for each in line.pieces],
    }


def _group(judged: Judgement) -> dict[str, Any]:
    mean = mean_figures(judged.figures)
    return {
        "name": judged.group.name,
        "impressions": int(mean.impressions),
        "ctr": _rounded(mean.ctr),
        "score": _rounded(mean.mean_score),
        "off": mean.off,
        **_figures(mean),
    }


def _figures(figures: Figures) -> dict[str, Any]:
    each = {name: figures.estimate(name) for name in FIGURES}
    return {
        **{name: _rounded(one.value) for name, one in each.items()},
        "intervals": {name: _interval(one) for name, one in each.items()},
    }


def _interval(one: Estimate) -> list[float | None]:
    return [_rounded(one.low), _rounded(one.high)]


def _rounded(value: float, digits: int = _DIGITS) -> float | None:
    return None if math.isnan(value) else round(float(value), digits)


class Table(NamedTuple):
    """A table for people."""

    title: str
    header: Sequence[str]
    rows: list[Sequence[str]]


_GROUP = ("impressions", "CTR", "mean score", "calibration", "AUC", "NE")


def tables(evaluated: Evaluated) -> Iterator[Table]:
    """The figures as tables. Groups are those of the first line; a document has those of all."""
    lines = evaluated.lines
    base = lines[0]
    header = ("run", "AUC", "NE", "calibration", "progressive AUC", "NE", "rows/s", "table rows")
    yield Table("as served", header, [_shown_line(line) for line in lines])
    if len(lines) > 1:
        rows: list[Sequence[str]] = []
        for line in lines[1:]:
            found = difference(line.served, base.served)
            rows.append((line.name, *(_shown(found[name], signed=True) for name in FIGURES)))
        yield Table(f"less {base.name}", header[:4], rows)
    about = "" if len(lines) == 1 else f" ({base.name})"
    deciles = [_shown_group(each)[:5] for each in base.deciles]
    yield Table(f"calibration by decile of the score{about}", ("decile", *_GROUP[:4]), deciles)
    for field, values in base.by.items():
        yield Table(f"top values of {field}{about}", (field, *_GROUP), [_shown_group(each) for each in values])
    if evaluated.history:
        shown: list[Sequence[str]] = [
            (each.field, _shown(each.at_impression), _shown(each.at_label), _shown(each.leak, signed=True))
            for each in evaluated.history
        ]
        yield Table(f"AUC of row history alone{about}", ("field", "at impression", "at label", "leak"), shown)
    if base.rare:
        rare = [_shown_group(each) for each in base.rare]
        yield Table(f"values shown under 100 times before{about}", ("field", *_GROUP), rare)


def _shown_line(line: Line) -> Sequence[str]:
    served, progressive = mean_figures(line.served), mean_figures(line.progressive)
    return (
        line.name,
        *(_shown(served.estimate(name)) for name in FIGURES),
        *(f"{progressive.estimate(name).value:.4f}" for name in FIGURES[:2]),
        f"{line.rows_per_s:,.0f}",
        f"{line.table_rows:,}",
    )


def _shown_group(judged: Judgement) -> Sequence[str]:
    mean = mean_figures(judged.figures)
    return (
        judged.group.name,
        f"{int(mean.impressions):,}",
        f"{mean.ctr:.4f}",
        f"{mean.mean_score:.4f}",
        _shown(mean.estimate("calibration"), digits=3) + (" off" if mean.off else ""),
        _shown(mean.estimate("auc")),
        _shown(mean.estimate("ne")),
    )


def _shown(one: Estimate, *, signed: bool = False, digits: int = 4) -> str:
    if math.isnan(one.value):
        return "-"
    value = f"{one.value:{'+' if signed else ''}.{digits}f}"
    return value if math.isnan(one.low) else f"{value} ± {one.error:.{digits}f}"
