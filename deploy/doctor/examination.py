"""Running all checks over one reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from deploy.doctor import event_checks, model_checks, progress_checks, topic_checks
from deploy.doctor.finding import Finding
from deploy.doctor.readings import Readings

__all__ = ["CHECKS", "examine"]

# In the order in which findings are reported: an earlier one is often the cause of later ones. docs/operations.md lists them.
CHECKS: dict[str, Callable[[Readings], Iterator[Finding]]] = {
    "topics": topic_checks.topics,
    "co_partitioning": topic_checks.co_partitioning,
    "retention": topic_checks.retention,
    "partitioner": event_checks.partitioner,
    "time_units": event_checks.time_units,
    "clocks": event_checks.clocks,
    "dead_letters": event_checks.dead_letters,
    "lag": progress_checks.lag,
    "deleted": progress_checks.deleted,
    "low_water": progress_checks.low_water,
    "watermark": progress_checks.watermark,
    "open_transactions": progress_checks.open_transactions,
    "publishing": model_checks.publishing,
    "scorers": model_checks.scorers,
    "challengers": model_checks.challengers,
    "skew": model_checks.skew,
    "calibration": model_checks.calibration,
    "served": model_checks.served,
    "rewind": model_checks.rewind,
    "versions": model_checks.versions,
    "gate": model_checks.gate,
    "champion": model_checks.champion,
    "hold": model_checks.hold,
}


def examine(readings: Readings) -> list[Finding]:
    """Every finding of every check, in the order of `CHECKS`."""
    return [finding for check in CHECKS.values() for finding in check(readings)]
