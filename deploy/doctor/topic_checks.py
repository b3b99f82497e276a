"""Checks of how topics are made: the contract, equal partitions, and retention that covers what the join may still need."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.cli.times import duration
from deploy.doctor.finding import Finding
from deploy.doctor.readings import Readings

__all__ = ["co_partitioning", "retention", "topics"]

# The join writes to all of these by the number of the partition that it reads.
CO_PARTITIONED = ("impressions", "clicks", "examples", "dead-letters")
MEND = "headrace topics create --mend"


def topics(readings: Readings) -> Iterator[Finding]:
    """A topic is missing, or not as the contract says."""
    for each in readings.differences:
        yield Finding(
            check="topics", what=f"{each.topic}: {each.what}", expected=each.expected, found=each.found, cure=each.cure
        )


def co_partitioning(readings: Readings) -> Iterator[Finding]:
    """Topics whose partitions belong together by number differ in how many they have."""
    counts = {name: readings.partitions[name] for name in CO_PARTITIONED if name in readings.partitions}
    if len(set(counts.values())) > 1:
        yield Finding(
            check="co_partitioning",
            what=", ".join(readings.topic(name) for name in counts),
            expected="the same number of partitions: equal keys meet only in equal numbers",
            found=", ".join(f"{readings.topic(name)} {count}" for name, count in counts.items()),
            cure="begin with new topics: another HEADRACE_TOPICS__PREFIX, `headrace topics create`, then point the producers "
            "there. Adding partitions to a topic moves keys, and what is pending finds its clicks no more",
        )


def retention(readings: Readings) -> Iterator[Finding]:
    """Records are deleted while the join may need them, or labels before the impressions that they stand for."""
    kept = {name: _kept_ms(readings, name) for name in ("impressions", "clicks", "examples") if name in readings.configs}
    needed = readings.join_settings.reaches_back_ms
    for name, kept_ms in kept.items():
        if kept_ms is not None and kept_ms < needed:
            yield Finding(
                check="retention",
                what=f"{readings.topic(name)}: retention.ms",
                expected=f"more than {duration(needed)} (window + 2 × dedupe horizon + lateness + skew), and the longest time "
                "that the join may stand still",
                found=duration(kept_ms),
                cure=f"raise topics.retention_ms, then `{MEND}`; or lower join.window_ms or join.dedupe_horizon_ms",
            )
        size = int(readings.configs[name].get("retention.bytes", "-1"))
        if size >= 0:
            yield Finding(
                check="retention",
                what=f"{readings.topic(name)}: retention.bytes",
                expected="-1: what the join needs is a time, and a busy hour must not shorten it",
                found=f"{size:,}",
                cure=f"kafka-configs.sh --alter --entity-type topics --entity-name {readings.topic(name)} "
                "--delete-config retention.bytes",
            )
    impressions, examples = kept.get("impressions"), kept.get("examples", 0)
    if (
        "examples" in kept
        and "impressions" in kept
        and examples is not None
        and (impressions is None or examples < impressions)
    ):
        yield Finding(
            check="retention",
            what=f"{readings.topic('examples')}: retention.ms",
            expected=f"at least that of {readings.topic('impressions')} ({_shown(impressions)}): a rebuild tells by an "
            "impression's example that its label went out",
            found=_shown(examples),
            cure=f"set one topics.retention_ms for both, then `{MEND}`",
        )
    remembered = readings.offsets_retention_ms
    if remembered is not None and "impressions" in kept and (impressions is None or impressions > remembered):
        yield Finding(
            check="retention",
            what="brokers: offsets.retention.minutes",
            expected=f"at least the retention of {readings.topic('impressions')} ({_shown(impressions)}): where no join worker "
            "runs for longer, its offsets are forgotten, and the next one stops when it takes over: it can't tell which "
            "impressions have their label",
            found=duration(remembered),
            cure="raise offsets.retention.minutes in the brokers' server.properties, or lower topics.retention_ms and "
            f"`{MEND}`",
        )


def _kept_ms(readings: Readings, name: str) -> int | None:
    """How long a topic's records are kept; None for ever."""
    found = int(readings.configs[name].get("retention.ms", "-1"))
    return None if found < 0 else found


def _shown(kept_ms: int | None) -> str:
    return "for ever" if kept_ms is None else duration(kept_ms)
