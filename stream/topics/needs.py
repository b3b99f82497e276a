"""What the join needs from its four topics: equal numbers of partitions, and records that are kept for long enough.

The same checks run in `headrace topics create`, `headrace topics check`, `headrace doctor`, `headrace config check`, and when a
join worker starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from stream.records.times import duration
from stream.settings import JoinSettings
from stream.topics.contract import Difference
from stream.topics.names import TopicNames

__all__ = ["MEND", "RETENTION_FORMULA", "co_partitioned", "retention_shortfalls", "shown", "unequal_partitions"]

# `JoinSettings.reaches_back_ms` in words, for messages and pages.
RETENTION_FORMULA = "window + 2 × dedupe horizon + lateness + skew"
MEND = "headrace topics create --mend"


def co_partitioned(names: TopicNames) -> tuple[str, str, str, str]:
    """The topics that the join reads and writes together: partition N of each."""
    return names.impressions, names.clicks, names.examples, names.dead_letters


def unequal_partitions(names: TopicNames, counts: Mapping[str, int]) -> Difference | None:
    """What is wrong with the numbers of partitions; None when they are equal.

    Args:
        counts: number of partitions by topic. Topics that are missing from it aren't compared.
    """
    four = {topic: counts[topic] for topic in co_partitioned(names) if topic in counts}
    if len(set(four.values())) <= 1:
        return None
    return Difference(
        topic=", ".join(four),
        what="partitions",
        expected="the same number of partitions: equal keys meet only in partitions of equal number",
        found=", ".join(f"{topic} {count}" for topic, count in four.items()),
        cure="begin with new topics: another HEADRACE_TOPICS__PREFIX, `headrace topics create`, then point the producers "
        "there. Adding partitions to a topic moves keys, so that pending impressions no longer find their clicks",
    )


def retention_shortfalls(
    names: TopicNames, join: JoinSettings, configs: Mapping[str, Mapping[str, str]]
) -> Iterator[Difference]:
    """Where retention deletes records that the join may still need, or labels earlier than their impressions.

    Args:
        configs: Kafka's configuration by topic. Topics that are missing from it aren't checked.
    """
    logs = (names.impressions, names.clicks, names.examples)
    kept = {topic: _kept_ms(configs[topic]) for topic in logs if topic in configs}
    needed = join.reaches_back_ms
    for topic, kept_ms in kept.items():
        if kept_ms is not None and kept_ms < needed:
            yield Difference(
                topic,
                "retention.ms",
                expected=f"at least {duration(needed)} ({RETENTION_FORMULA}), and the longest time that the join stands still",
                found=duration(kept_ms),
                cure=f"raise topics.retention_ms, then `{MEND}`; or lower join.window_ms or join.dedupe_horizon_ms",
            )
        size = int(configs[topic].get("retention.bytes", "-1"))
        if size >= 0:
            yield Difference(
                topic,
                "retention.bytes",
                expected="-1: the join needs records for a length of time, which a busy hour must not shorten",
                found=f"{size:,}",
                cure=f"kafka-configs.sh --alter --entity-type topics --entity-name {topic} --delete-config retention.bytes",
            )
    if names.examples in kept and names.impressions in kept:
        impressions, examples = kept[names.impressions], kept[names.examples]
        if examples is not None and (impressions is None or examples < impressions):
            yield Difference(
                names.examples,
                "retention.ms",
                expected=f"at least that of {names.impressions} ({shown(impressions)}): a rebuild knows by an impression's "
                "example that its label was sent",
                found=shown(examples),
                cure=f"set one topics.retention_ms for both, then `{MEND}`",
            )


def shown(kept_ms: int | None) -> str:
    """A retention in words; None is one without end."""
    return "for ever" if kept_ms is None else duration(kept_ms)


def _kept_ms(config: Mapping[str, str]) -> int | None:
    found = int(config.get("retention.ms", "-1"))
    return None if found < 0 else found
