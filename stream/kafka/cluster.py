"""Which cluster and which topics a worker talks to: checked at the start, kept with local state, and watched while it runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from stream.errors import NoAnswer, TopicError
from stream.kafka.clients import admin_client, answer, no_answer
from stream.kafka.reach import reach
from stream.kafka.requests import TopicIdsRequest
from stream.settings import KafkaSettings

__all__ = ["Cluster", "ClusterWatch", "describe_cluster", "topic_configs"]

log = logging.getLogger(__name__)

RETRY_S = 0.5
# How often a running worker looks whether its topics are still those that it began with: a new connection and one question.
LOOK_EVERY_S = 10.0
# Kafka's code for a topic that the broker doesn't know.
UNKNOWN_TOPIC = 3


@dataclass(frozen=True, slots=True)
class Cluster:
    """Cluster id; id and partition count of each topic by name. A topic that is made anew has another id.

    leaderless  (topic, partition) pairs that no broker leads now: nothing can be read or written there
    """

    cluster_id: str
    topic_ids: dict[str, str]
    partitions: dict[str, int]
    leaderless: frozenset[tuple[str, int]] = field(default=frozenset(), compare=False)

    def changes(self, now: Cluster) -> list[str]:
        """What a worker that began with this one can't go on with, in the cluster as it is now."""
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
        retry: wait for Kafka, and ask again where it answers with an error, for kafka.connect_timeout_ms. A broker that is just
            starting does both.

    Raises:
        TopicError: a topic is missing.
        NoAnswer: Kafka can't be reached.
    """
    deadline = time.monotonic() + (kafka.connect_timeout_ms / 1_000 if retry else 0.0)
    if retry:
        await reach(kafka)
    while True:
        try:
            async with admin_client(kafka) as admin:
                found = await answer(kafka, admin._send_request(TopicIdsRequest(list(topics))), "topics")
            return _cluster(kafka, topics, found)
        except (KafkaError, NoAnswer) as error:
            if time.monotonic() > deadline:
                if isinstance(error, NoAnswer):
                    raise
                raise no_answer(kafka, "topics", error) from error
        await asyncio.sleep(RETRY_S)


def _cluster(kafka: KafkaSettings, topics: Sequence[str], answered: Any) -> Cluster:
    found = {row[1]: row for row in answered.topics if row[0] == 0}
    codes = {row[1]: row[0] for row in answered.topics}
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
        {name: str(row[2]) for name, row in found.items()},
        {name: len(row[4]) for name, row in found.items()},
        frozenset((name, partition[1]) for name, row in found.items() for partition in row[4] if partition[2] < 0),
    )


async def topic_configs(kafka: KafkaSettings, topics: Sequence[str], keys: Sequence[str]) -> dict[str, dict[str, str]]:
    """These configurations of each topic, as the cluster has them; of a topic that we may not ask about, nothing.

    Raises:
        NoAnswer: Kafka can't be reached.
        aiokafka.errors.KafkaError: it answers with an error.
    """
    asked = [ConfigResource(ConfigResourceType.TOPIC, topic, dict.fromkeys(keys, "")) for topic in topics]
    async with admin_client(kafka) as admin:
        answers = await answer(kafka, admin.describe_configs(asked), "the configuration of topics")
    found: dict[str, dict[str, str]] = {}
    for answered in answers:
        for code, message, _, topic, entries in answered.resources:
            if code:
                log.warning("%s: its configuration can't be read (error code %d: %s)", topic, code, message)
            found[topic] = {entry[0]: entry[1] for entry in entries if entry[0] in keys and entry[1] is not None}
    return found


class ClusterWatch:
    """Looks every few seconds whether the cluster's topics are still those that a worker began with.

    ```python
    watch = ClusterWatch(settings.kafka, cluster, changed=lambda error: fatal("join", error))
    asyncio.ensure_future(watch.run())
    watch.unanswered_s         # how long Kafka has not answered; 0 when it did the last time
    watch.leaderless           # {("impressions", 3)}
    ```

    Args:
        changed: called once a topic has gone, was made anew or has gained partitions.
    """

    def __init__(self, kafka: KafkaSettings, cluster: Cluster, *, changed: Callable[[TopicError], Any]) -> None:
        self._kafka, self._cluster, self._changed = kafka, cluster, changed
        self._failing_since: float | None = None
        self._missing = 0
        self.leaderless: frozenset[tuple[str, int]] = cluster.leaderless

    @property
    def unanswered_s(self) -> float:
        return 0.0 if self._failing_since is None else time.monotonic() - self._failing_since

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.look()

    async def look(self) -> None:
        """Look once. That Kafka can't be reached is no change: it comes back, or other waits end."""
        began = time.monotonic()
        try:
            now = await describe_cluster(self._kafka, list(self._cluster.topic_ids), retry=False)
        except TopicError as error:
            # A broker that has just started may not have heard of a topic yet, so one look isn't enough.
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
