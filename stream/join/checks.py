"""Checks of a join worker's topics before it joins the group."""

from __future__ import annotations

import logging

from stream.errors import TopicError
from stream.kafka.cluster import Cluster, topic_configs
from stream.settings import JoinSettings, KafkaSettings
from stream.topics.contract import OUTPUT_MARGIN_BYTES
from stream.topics.names import TopicNames
from stream.topics.needs import retention_shortfalls, unequal_partitions

__all__ = ["check_topics"]

log = logging.getLogger(__name__)

STAMPED, LARGEST = "message.timestamp.type", "max.message.bytes"
KEPT = ("retention.ms", "retention.bytes")


async def check_topics(kafka: KafkaSettings, settings: JoinSettings, names: TopicNames, cluster: Cluster) -> None:
    """Check the four topics of the join, and warn where they may lose something.

    Configurations that we lack the permission to read are not checked.

    Raises:
        TopicError: the partition counts of the topics differ, or producers' clocks stamp a source's records.
    """
    sources, outputs = (names.impressions, names.clicks), (names.examples, names.dead_letters)
    if problem := unequal_partitions(names, cluster.partitions):
        raise TopicError(f"{problem.topic}: expected {problem.expected}, found {problem.found}. To go on, {problem.cure}.")
    configs = await topic_configs(kafka, (*sources, *outputs), (STAMPED, LARGEST, *KEPT))
    for short in retention_shortfalls(names, settings, {topic: found for topic, found in configs.items() if KEPT[0] in found}):
        log.warning(
            "%s: %s: expected %s, found %s. To fix it, %s.",
            *(short.topic, short.what, short.expected, short.found, short.cure),
        )
    for topic in sources:
        if (found := configs.get(topic, {}).get(STAMPED, "LogAppendTime")) != "LogAppendTime":
            raise TopicError(
                f"{topic}: expected {STAMPED}=LogAppendTime, found {found}: its records carry the time of their producers' "
                "clocks, and one that is ahead would be believed. Run `headrace topics create --mend`, or: kafka-configs.sh "
                f"--bootstrap-server {kafka.bootstrap_servers} --entity-type topics --entity-name {topic} --alter "
                f"--add-config {STAMPED}=LogAppendTime"
            )
    largest = {topic: int(found[LARGEST]) for topic, found in configs.items() if LARGEST in found}
    wanted = max((largest[topic] for topic in sources if topic in largest), default=0) + OUTPUT_MARGIN_BYTES
    for topic in outputs:
        if topic in largest and largest[topic] < wanted:
            log.warning(
                "%s: expected %s of at least %d, 64 KiB more than the sources have, found %d: a record at the limit of its "
                "source may not fit. Run `headrace topics create --mend`.",
                *(topic, LARGEST, wanted, largest[topic]),
            )
