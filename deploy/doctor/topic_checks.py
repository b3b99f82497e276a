"""Checks of how topics are configured: the contract, equal numbers of partitions, and retention that is long enough."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.doctor.finding import Finding
from deploy.doctor.readings import Readings
from stream.records.times import duration
from stream.topics.contract import Difference
from stream.topics.needs import MEND, retention_shortfalls, shown, unequal_partitions

__all__ = ["co_partitioning", "retention", "topics"]


def topics(readings: Readings) -> Iterator[Finding]:
    """A topic is missing, or differs from the contract."""
    for each in readings.differences:
        yield Finding(
            check="topics", what=f"{each.topic}: {each.what}", expected=each.expected, found=each.found, cure=each.cure
        )


def co_partitioning(readings: Readings) -> Iterator[Finding]:
    """Topics whose partitions are joined by number have different numbers of partitions."""
    counts = {readings.topic(name): count for name, count in readings.partitions.items()}
    problem = unequal_partitions(readings.names, counts)
    if problem is not None:
        yield _finding("co_partitioning", problem.topic, problem)


def retention(readings: Readings) -> Iterator[Finding]:
    """Records are deleted while the join may still need them, or labels are deleted before their impressions."""
    configs = {readings.topic(name): config for name, config in readings.configs.items()}
    for short in retention_shortfalls(readings.names, readings.join_settings, configs):
        yield _finding("retention", f"{short.topic}: {short.what}", short)
    remembered, impressions = readings.offsets_retention_ms, readings.configs.get("impressions")
    if remembered is None or impressions is None:
        return
    kept_ms = int(impressions.get("retention.ms", "-1"))
    if kept_ms < 0 or kept_ms > remembered:
        yield Finding(
            check="retention",
            what="brokers: offsets.retention.minutes",
            expected=f"at least the retention of {readings.topic('impressions')} ({shown(None if kept_ms < 0 else kept_ms)}): "
            "if no join worker runs for longer, its offsets are forgotten, and the next one stops when it takes over, because "
            "it doesn't know which impressions have their label",
            found=duration(remembered),
            cure="raise offsets.retention.minutes in the brokers' server.properties, or lower topics.retention_ms and "
            f"`{MEND}`",
        )


def _finding(check: str, what: str, problem: Difference) -> Finding:
    return Finding(check=check, what=what, expected=problem.expected, found=problem.found, cure=problem.cure)
