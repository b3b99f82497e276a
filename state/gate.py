"""The gate of auto-promotion: what a version's metrics must be before it may replace the champion by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from state.settings import SnapshotSettings

__all__ = ["Verdict", "calibration_in_band", "gate"]

# Undefined while a window holds only clicks or only non-clicks, which is no sign of a broken model.
_UNDEFINED_FOR_ONE_CLASS = ("auc", "ne", "normalised_entropy", "calibration")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a version may be promoted, and why, for people."""

    passed: bool
    reason: str


def gate(metrics: Mapping[str, float], champion: Mapping[str, float] | None, settings: SnapshotSettings) -> Verdict:
    """Judge a version against the champion.

    Reads `window_examples`, `window_log_loss` and `window_calibration` (progressive: each example scored before it was
    learned), and `served_examples` and `served_calibration` (of the scores that impressions carried when shown).

    Args:
        metrics: of the version.
        champion: of the champion, as in its own manifest; None when there is no champion.
    """
    broken = _not_finite(metrics)
    if broken:
        return Verdict(False, f"not finite: {', '.join(broken)}")
    in_band, calibration = calibration_in_band(metrics, settings)
    if champion is None:
        # Nothing better is there to serve, and without a champion no score is answered at all.
        return Verdict(True, f"the first version, finite; nothing better to serve ({calibration})")
    if in_band is False:
        return Verdict(False, calibration)
    worse, loss = _loss_is_worse(metrics, champion, settings)
    return Verdict(not worse, loss if worse else f"{calibration}; {loss}")


def calibration_in_band(metrics: Mapping[str, float], settings: SnapshotSettings) -> tuple[bool | None, str]:
    """Judge predicted over actual clicks: in band, out of band, or None with too few examples; and why.

    Served figures lead where there are enough: under a long window progressive ones know part of the label from its
    order of arrival. But served figures are those of the versions that were served, not of this one. When those
    are out of band, keeping them in service can't mend that: then the version is judged by its own window.
    """
    served, served_text = _band("served", metrics, settings)
    window, window_text = _band("window", metrics, settings)
    if served is None:
        return window, window_text
    if served or not window:
        return served, served_text
    return True, f"{served_text}, but that is what is served now; its own {window_text}"


def _band(kind: str, metrics: Mapping[str, float], settings: SnapshotSettings) -> tuple[bool | None, str]:
    examples = int(metrics.get(f"{kind}_examples", 0))
    value = metrics.get(f"{kind}_calibration")
    if value is None or examples < settings.gate_min_examples:
        return None, f"{kind} calibration not judged: {examples} examples, fewer than {settings.gate_min_examples}"
    low, high = settings.gate_calibration
    if not math.isfinite(value):
        return False, f"{kind} calibration undefined: no click in {examples} examples"
    inside = low <= value <= high
    return inside, f"{kind} calibration {value:.3f} {'in' if inside else 'outside'} [{low:g}, {high:g}]"


def _loss_is_worse(metrics: Mapping[str, float], champion: Mapping[str, float], settings: SnapshotSettings) -> tuple[bool, str]:
    fewest = min(int(each.get("window_examples", 0)) for each in (metrics, champion))
    mine, theirs = metrics.get("window_log_loss"), champion.get("window_log_loss")
    if mine is None or theirs is None or not math.isfinite(theirs) or fewest < settings.gate_min_examples:
        return False, f"log loss not compared: {fewest} examples, fewer than {settings.gate_min_examples}"
    worse = mine > theirs * (1 + settings.gate_margin)
    change = f"{(mine / theirs - 1) * 100:+.1f} %" if theirs > 0 else f"{mine - theirs:+.4g}"
    limit = f"allowed +{settings.gate_margin * 100:g} %"
    return worse, f"log loss {mine:.4f} against the champion's {theirs:.4f} ({change}, {limit})"


def _not_finite(metrics: Mapping[str, float]) -> list[str]:
    broken = []
    for name, value in metrics.items():
        if math.isfinite(value) or name.endswith(_UNDEFINED_FOR_ONE_CLASS):
            continue
        kind = name.split("_", 1)[0]
        if metrics.get(f"{kind}_examples") == 0:  # the mean over nothing
            continue
        broken.append(name)
    return sorted(broken)
