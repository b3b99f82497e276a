"""Which cluster and which topics a worker talks to: checked at the start, and kept with local state."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from stream.clients import kafka_python_options
from stream.errors import TopicError
from stream.settings import KafkaSettings

__all__ = ["Cluster", "describe_cluster"]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Cluster id; id and partition count of each topic by name. A topic that is made anew has another id."""

    cluster_id: str
    topic_ids: dict[str, str]
    partitions: dict[str, int]


def _describe(kafka: KafkaSettings, topics: Sequence[str]) -> Cluster:
    from kafka.admin import KafkaAdminClient

    admin = KafkaAdminClient(**kafka_python_options(kafka))
    try:
        cluster_id = str(admin.describe_cluster()["cluster_id"])
        found = {topic["name"]: topic for topic in admin.describe_topics(list(topics)) if not topic["error_code"]}
    finally:
        admin.close()
    missing = [topic for topic in topics if topic not in found]
    if missing:
        raise TopicError(
            f"{kafka.bootstrap_servers}: expected topics {', '.join(topics)}, did not find {', '.join(missing)}. "
            "Run `headrace topics create`, or check `topics.prefix`."
        )
    return Cluster(
        cluster_id,
        {name: str(topic["topic_id"]) for name, topic in found.items()},
        {name: len(topic["partitions"]) for name, topic in found.items()},
    )


async def describe_cluster(kafka: KafkaSettings, topics: Sequence[str]) -> Cluster:
    """Ask the cluster (kafka-python, in a thread: aiokafka's admin client doesn't know topic ids).

    Raises:
        TopicError: a topic is missing.
    """
    return await asyncio.to_thread(_describe, kafka, topics)
