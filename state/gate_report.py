"""What the gate reports on a version, and whether a version may be promoted by itself. Pure: no Kafka, no torch, no clock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import msgspec

from state.settings import SnapshotSettings

__all__ = ["Flow", "GateReport", "Verdict", "judge_version", "not_finite"]

Flow = Literal["flowing", "withheld"]

# Metrics that are undefined while a window holds only clicks or only non-clicks, which is no sign of a broken model.
_UNDEFINED_FOR_ONE_CLASS = ("auc", "ne", "normalised_entropy", "calibration")


class GateReport(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the gate when a version was captured. The manifest and the registry's record carry it.

    line             the epoch in which this line of weights began from nothing; 0 for lines older than reports
    flow             flowing or withheld
    reason, since_ms why, and since when (wall clock, ms since epoch)
    anchor           the version compared with; None when there is none, or when served scores take its place
    loss_change, loss_error  of the newest stretch judged, as in `Comparison`; None when none was judged
    compared_clicks  clicks in the blocks judged since the flow last changed
    clicks, negatives  impressions seen since the line began, by the labels that they have now
    passed           other lines that this one was compared with and not found worse than
    spread           standard deviation of the logits of the newest 1,000 scores or so; None with fewer
    problems         what is wrong with the version itself; empty when it is sane
    score_shift      mean absolute change of recent requests' logits, lately; None while it isn't measured
    """

    line: int = 0
    flow: Flow = "flowing"
    reason: str = ""
    since_ms: int = 0
    anchor: int | None = None
    loss_change: float | None = None
    loss_error: float | None = None
    compared_clicks: int = 0
    clicks: int = 0
    negatives: int = 0
    passed: tuple[int, ...] = ()
    spread: float | None = None
    problems: tuple[str, ...] = ()
    score_shift: float | None = None


class Verdict(msgspec.Struct, frozen=True):
    """Whether a version may be promoted without an operator, and why."""

    passed: bool
    reason: str


def judge_version(
    report: GateReport | None,
    metrics: Mapping[str, float],
    examples_seen: int,
    *,
    champion_line: int | None,
    settings: SnapshotSettings,
) -> Verdict:
    """Whether a version may become champion without an operator.

    Args:
        report: the version's report; None for a version that no gate has looked at, which may never become champion by itself.
        champion_line: the line of the champion; None when there is no champion.
    """
    if report is None:
        return Verdict(False, "no gate has looked at it")
    problems = [*report.problems, *(f"not finite: {name}" for name in not_finite(metrics))]
    if problems:
        return Verdict(False, "; ".join(problems))
    seen = f"{report.clicks} clicks and {report.negatives} non-clicks seen"
    if not (report.clicks > 0 and report.negatives > 0):
        return Verdict(False, f"one class only: {seen}")
    if champion_line is None:
        enough = min(report.clicks, report.negatives) >= settings.first_clicks and examples_seen >= settings.first_examples
        wanted = f"a first champion needs {settings.first_clicks} of each and {settings.first_examples} examples"
        return Verdict(enough, f"the first champion, {seen}" if enough else f"{seen} in {examples_seen} examples; {wanted}")
    if champion_line not in (report.line, *report.passed):
        return Verdict(False, f"of another line than the champion: {report.reason}")
    return Verdict(report.flow == "flowing", f"{report.flow}: {report.reason}")


def not_finite(metrics: Mapping[str, float]) -> list[str]:
    """Names of the metrics whose values show a broken version. Metrics that one class alone leaves undefined are left out."""
    broken = []
    for name, value in metrics.items():
        if math.isfinite(value) or name.endswith(_UNDEFINED_FOR_ONE_CLASS):
            continue
        kind = name.split("_", 1)[0]
        if metrics.get(f"{kind}_examples") == 0:  # the mean over nothing
            continue
        broken.append(name)
    return sorted(broken)
