"""The cluster and the topics that a worker works with: checked at its start, kept with its local state, watched while it runs.

Two functions answer questions about topics for the whole project: how many partitions a topic has, and which configuration.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError
from aiokafka.protocol.api import Response

from stream.errors import NoAnswer, TopicError
from stream.kafka.clients import admin_client, answer, unreachable
from stream.kafka.reach import reach
from stream.kafka.requests import TopicIdsRequest
from stream.settings import KafkaSettings

__all__ = ["Cluster", "ClusterWatch", "describe_cluster", "missing_topic", "partition_counts", "topic_configs"]

log = logging.getLogger(__name__)

RETRY_S = 0.5
# How often a running worker checks that its topics are still the same. A check is a new connection and one request.
LOOK_EVERY_S = 10.0
# Kafka's error code for a topic that the broker doesn't know.
UNKNOWN_TOPIC = 3


@dataclass(frozen=True, slots=True)
class Cluster:
    """Cluster id; id and partition count of each topic by name. A topic that is deleted and created again gets another id.

    leaderless  (topic, partition) pairs that no broker leads now: nothing can be read or written there
    """

    cluster_id: str
    topic_ids: dict[str, str]
    partitions: dict[str, int]
    leaderless: frozenset[tuple[str, int]] = field(default=frozenset(), compare=False)

    def changes(self, now: Cluster) -> list[str]:
        """The differences, as sentences, that end a worker which began with this cluster. `now` is the cluster as it is now."""
        if now.cluster_id != self.cluster_id:
            return [f"expected cluster {self.cluster_id}, found {now.cluster_id}: the addresses lead to another cluster"]
        problems = []
        for topic, topic_id in self.topic_ids.items():
            found = now.topic_ids[topic]
            if found != topic_id:
                problems.append(f"{topic}: expected the topic with id {topic_id}, found {found}: it was deleted and made anew")
            elif now.partitions[topic] != self.partitions[topic]:
                problems.append(f"{topic}: expected {self.partitions[topic]} partitions, found {now.partitions[topic]}")
        return problems


async def describe_cluster(kafka: KafkaSettings, topics: Sequence[str], *, retry: bool = True) -> Cluster:
    """Ask the cluster about these topics.

    Args:
        retry: for kafka.connect_timeout_ms, wait until Kafka can be reached and ask again where it answers with an error. Both
            happen while a broker starts.

    Raises:
        TopicError: a topic is missing.
        NoAnswer: Kafka can't be reached.
    """
    deadline = time.monotonic() + (kafka.connect_timeout_ms / 1_000 if retry else 0.0)
    if retry:
        await reach(kafka)
    while True:
        try:
            return _cluster(kafka, topics, await _metadata(kafka, topics))
        except (KafkaError, NoAnswer) as error:
            if time.monotonic() > deadline:
                if isinstance(error, NoAnswer):
                    raise
                raise unreachable(kafka, "an answer about topics", error) from error
        await asyncio.sleep(RETRY_S)


async def partition_counts(kafka: KafkaSettings, topics: Collection[str]) -> dict[str, int]:
    """How many partitions each of these topics has. A topic that doesn't exist is left out, and isn't created.

    Raises:
        NoAnswer: Kafka can't be reached.
        aiokafka.errors.KafkaError: Kafka answers with an error.
    """
    answered = await _metadata(kafka, topics)
    return {topic.name: len(topic.partitions) for topic in map(_Topic.of, answered.topics) if topic.error_code == 0}


def missing_topic(kafka: KafkaSettings, topic: str) -> TopicError:
    """The error for a topic that the cluster doesn't have."""
    return TopicError(
        f"topic {topic}: expected at {kafka.bootstrap_servers}, found none of that name. "
        "`headrace topics create` makes it, with --track for a challenger's; topics.prefix is part of the name."
    )


class _Partition(NamedTuple):
    """A partition in the response to `TopicIdsRequest`."""

    error_code: int
    number: int
    leader: int


class _Topic(NamedTuple):
    """A topic in the response to `TopicIdsRequest`."""

    error_code: int
    name: str
    topic_id: str
    partitions: list[_Partition]

    @classmethod
    def of(cls, row: Any) -> _Topic:
        error_code, name, topic_id, _is_internal, partitions, *_ = row
        return cls(error_code, name, str(topic_id), [_Partition(*partition[:3]) for partition in partitions])


async def _metadata(kafka: KafkaSettings, topics: Collection[str]) -> Response:
    async with admin_client(kafka) as admin:
        return await answer(kafka, admin._send_request(TopicIdsRequest(list(topics))), "topics")


def _cluster(kafka: KafkaSettings, topics: Sequence[str], answered: Response) -> Cluster:
    described = [_Topic.of(row) for row in answered.topics]
    found = {topic.name: topic for topic in described if topic.error_code == 0}
    codes = {topic.name: topic.error_code for topic in described}
    missing = [
        topic if codes.get(topic, UNKNOWN_TOPIC) == UNKNOWN_TOPIC else f"{topic} (error code {codes[topic]})"
        for topic in topics
        if topic not in found
    ]
    if missing:
        raise TopicError(
            f"{kafka.bootstrap_servers}: expected topics {', '.join(topics)}, did not find {', '.join(missing)}. "
            "Run `headrace topics create`, or check `topics.prefix`."
        )
    return Cluster(
        answered.cluster_id,
        {name: topic.topic_id for name, topic in found.items()},
        {name: len(topic.partitions) for name, topic in found.items()},
        frozenset(
            (name, partition.number) for name, topic in found.items() for partition in topic.partitions if partition.leader < 0
        ),
    )


async def topic_configs(
    kafka: KafkaSettings, topics: Collection[str], keys: Collection[str] | None = None
) -> dict[str, dict[str, str]]:
    """Each topic's configuration as the cluster has it, under Kafka's own names. Nothing else reads it.

    Args:
        keys: the configurations wanted; all when None.

    Returns:
        By topic. Nothing for a topic that we may not ask about; a warning is logged. A topic that doesn't exist is left out.

    Raises:
        NoAnswer: Kafka can't be reached.
        aiokafka.errors.KafkaError: Kafka answers with an error.
    """
    wanted = None if keys is None else dict.fromkeys(keys, "")
    asked = [ConfigResource(ConfigResourceType.TOPIC, topic, wanted) for topic in topics]
    async with admin_client(kafka) as admin:
        answers = await answer(kafka, admin.describe_configs(asked), "the configuration of topics")
    found: dict[str, dict[str, str]] = {}
    for answered in answers:
        for code, message, _, topic, entries in answered.resources:
            if code == UNKNOWN_TOPIC:
                continue
            if code:
                log.warning("%s: its configuration can't be read (error code %d: %s)", topic, code, message)
            found[topic] = {name: value for name, value, *_ in entries if value is not None and (keys is None or name in keys)}
    return found


class ClusterWatch:
    """Checks every few seconds that the cluster's topics are still those that a worker began with.

    ```python
    watch = ClusterWatch(settings.kafka, cluster, changed=lambda error: fatal("join", error))
    asyncio.ensure_future(watch.run())
    watch.unanswered_s         # seconds for which Kafka has not answered; 0 when it answered the last time
    watch.leaderless           # {("impressions", 3)}
    ```

    Args:
        changed: called once a topic is gone, was deleted and created again, or has more partitions.
    """

    def __init__(self, kafka: KafkaSettings, cluster: Cluster, *, changed: Callable[[TopicError], object]) -> None:
        self._kafka, self._cluster, self._changed = kafka, cluster, changed
        self._failing_since: float | None = None
        self._missing = 0
        self.leaderless: frozenset[tuple[str, int]] = cluster.leaderless

    @property
    def unanswered_s(self) -> float:
        return 0.0 if self._failing_since is None else time.monotonic() - self._failing_since

    async def run(self) -> None:
        """Check until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.look()

    async def look(self) -> None:
        """Check once. An unreachable Kafka is not a change: Kafka comes back, or other time limits end the worker."""
        began = time.monotonic()
        try:
            now = await describe_cluster(self._kafka, list(self._cluster.topic_ids), retry=False)
        except TopicError as error:
            # A broker that has just started may not know a topic yet, so one check isn't enough.
            self._missing += 1
            if self._missing > 1:
                self._changed(error)
            return
        except NoAnswer as error:
            if self._failing_since is None:
                self._failing_since = began
                log.warning("%s", error)
            return
        self._failing_since, self._missing, self.leaderless = None, 0, now.leaderless
        problems = self._cluster.changes(now)
        if problems:
            self._changed(
                TopicError(
                    f"{'; '.join(problems)}. This worker began with the topics as they were. Stop every worker, see `headrace "
                    "doctor`, and start them again when the topics are as they should be."
                )
            )
