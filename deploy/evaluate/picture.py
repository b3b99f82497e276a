"""The results of an evaluation as a picture: figures over event time, calibration by decile, and AUC by the age of versions."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import numpy as np

from deploy.errors import EvaluationError
from deploy.evaluate.figures import FIGURES, Estimate, difference, mean_figures
from deploy.evaluate.runs import Evaluated, Judgement, Line

__all__ = ["check", "draw"]

MOST_LINES = 8
"""Lines in one chart: with more, their colours can't be told apart."""

_NAMES = {"auc": "AUC", "ne": "normalised entropy", "calibration": "calibration"}
_INCHES = 5.0  # width of one chart


def check(file: Path) -> None:
    """Check that `draw` can draw into this file, before anything is computed for it.

    Raises:
        EvaluationError: the package matplotlib isn't there, the file's name doesn't end with a known format, or its folder
            can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError(
            "--picture: expected the Python package matplotlib, found none. Install it beside Headrace: "
            "`uv pip install matplotlib` (`make setup` in a checkout does), or leave --picture out."
        ) from error
    if file.suffix.removeprefix(".").lower() not in Figure().canvas.get_supported_filetypes():
        raise EvaluationError(
            f"--picture: expected a file that ends with .png, .svg or .pdf, found {file.name}. Change the name."
        )
    folder = file.absolute().parent
    if not os.access(folder, os.W_OK) or not folder.is_dir():
        found = "one that can't be written" if folder.is_dir() else "no folder"
        raise EvaluationError(
            f"--picture: expected {folder} to be a folder that can be written, found {found}. Choose another."
        )


def draw(evaluated: Evaluated, file: Path) -> None:
    """Write the picture, in the format that the file's name ends with."""
    from matplotlib.figure import Figure

    lines = evaluated.lines[:MOST_LINES]
    versions = [line for line in evaluated.lines if line.serving.every_ms]
    by_version = len({line.serving.every_ms for line in versions}) > 1
    charts = 3 + by_version
    figure = Figure(figsize=(_INCHES * charts, 4.2), layout="constrained")
    axes = figure.subplots(1, charts)
    figure.suptitle(f"{evaluated.stream.name}: {len(evaluated.measured):,} impressions, as served, with 95 % intervals")
    for axis, name in zip(axes, ("auc", "ne"), strict=False):
        _over_time(axis, evaluated, lines, name)
    _by_decile(axes[2], lines)
    if by_version:
        _by_version(axes[3], versions)
    handles, labels = axes[0].get_legend_handles_labels()
    if len(lines) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(lines), 4), frameon=False)
    figure.savefig(file, dpi=120)


def _over_time(axis: Any, evaluated: Evaluated, lines: list[Line], name: str) -> None:
    shown_ms = evaluated.stream.shown_ms
    for line in lines:
        when = [_time(float(shown_ms[judged.group.rows].mean())) for judged in line.pieces]
        _errors(axis, when, [_estimate(judged, name) for judged in line.pieces], line.name)
    axis.set_ylabel(_NAMES[name])
    axis.set_xlabel("event time (UTC)")
    axis.tick_params(axis="x", labelrotation=30)
    axis.grid(alpha=0.3)


def _by_decile(axis: Any, lines: list[Line]) -> None:
    largest = 0.0
    for line in lines:
        means = [mean_figures(judged.figures) for judged in line.deciles]
        scores = np.array([each.mean_score for each in means])
        rates = np.array([each.ctr for each in means])
        # The interval of score by CTR, as one of the CTR.
        relative = np.nan_to_num([each.estimate("calibration").error / each.estimate("calibration").value for each in means])
        axis.errorbar(scores, rates, yerr=rates * relative, fmt="o-", ms=3, lw=1, capsize=2, label=line.name)
        largest = max(largest, float(np.nanmax(scores)), float(np.nanmax(rates)))
    axis.plot([0, largest], [0, largest], color="grey", lw=1, ls="--")
    axis.set_xlabel("mean score of a decile")
    axis.set_ylabel("CTR of the decile")
    axis.grid(alpha=0.3)


def _by_version(axis: Any, versions: list[Line]) -> None:
    """How much better the AUC is than with the first interval: a difference, from which the luck of the impressions is gone."""
    base = versions[0]
    seconds = [line.serving.every_ms / 1_000 for line in versions]
    _errors(axis, seconds, [difference(line.served, base.served)["auc"] for line in versions], "")
    axis.axhline(0, color="grey", lw=1, ls="--")
    axis.set_xscale("log")
    axis.set_xlabel("time between versions (s)")
    axis.set_ylabel(f"AUC less that of {base.serving.name}")
    axis.grid(alpha=0.3)


def _errors(axis: Any, at: list[Any], estimates: list[Estimate], label: str) -> None:
    values = np.array([each.value for each in estimates])
    errors = np.nan_to_num([each.error for each in estimates])
    axis.errorbar(at, values, yerr=errors, fmt="o-", ms=3, lw=1, capsize=2, label=label)


def _estimate(judged: Judgement, name: str) -> Estimate:
    assert name in FIGURES
    return mean_figures(judged.figures).estimate(name)


def _time(at_ms: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at_ms / 1_000, datetime.UTC)
