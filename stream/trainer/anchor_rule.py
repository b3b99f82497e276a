"""Which version the gate compares the live weights with."""

from __future__ import annotations

from collections.abc import Collection

from state.gate_report import GateReport
from state.registry import RegistryState, VersionRecord
from state.settings import SnapshotSettings

__all__ = ["choose_anchor", "clicks_of"]


def choose_anchor(
    registry: RegistryState,
    report: GateReport,
    *,
    watermark_ms: int,
    settings: SnapshotSettings,
    broken: Collection[int] = (),
    kept: Collection[int] | None = None,
) -> int | None:
    """Which version to compare with: the one in use, or a newer one when it is time; None when none qualifies.

    - An anchor is good (tagged, not rolled back), and at least `anchor_age_ms` (event time) and `anchor_clicks` older than what
      is trained.
    - It is replaced by a version that is newer by the same age and clicks, so that one candidate at a time is enough.
    - It is never replaced while versions are withheld: the newest good versions may be those that went wrong.
    - When the champion is of another line, the anchor is the newest good version of that line, or the champion itself.

    Args:
        report: the gate's present report.
        watermark_ms: event time up to which is trained.
        broken: versions that couldn't be read.
        kept: versions that may become the anchor; None: any may. The present one may stay in either case.
    """
    champion_line = registry.champion_line
    if champion_line is None:
        return None
    is_new_line = champion_line not in (report.line, *report.passed)
    line = champion_line if is_new_line else report.line
    usable = {
        number: record
        for number, record in registry.versions.items()
        if record.line == line
        and record.kind == "full"
        and number not in broken
        and not registry.champion.was_rolled_back(number)
    }
    current = None if report.anchor is None else usable.get(report.anchor)
    good = [record for record in usable.values() if record.good_at_ms is not None]
    if is_new_line:
        if current is None and not good:
            return None if registry.champion.version in broken else registry.champion.version
        return current.version if current is not None else max(record.version for record in good)
    if current is not None and report.flow == "withheld":
        return current.version
    old = [
        record
        for record in good
        if watermark_ms - record.watermark_ms >= settings.anchor_age_ms
        and report.clicks - clicks_of(record) >= settings.anchor_clicks
        and (kept is None or record.version in kept)
    ]
    newest = max(old, key=lambda record: record.version, default=None)
    if newest is None or current is None:
        chosen = current or newest
        return None if chosen is None else chosen.version
    is_time = newest.watermark_ms - current.watermark_ms >= settings.anchor_age_ms
    is_time = is_time and clicks_of(newest) - clicks_of(current) >= settings.anchor_clicks
    return newest.version if is_time else current.version


def clicks_of(record: VersionRecord) -> int:
    """Clicks that the version's line had seen."""
    return 0 if record.verdict is None else record.verdict.clicks
