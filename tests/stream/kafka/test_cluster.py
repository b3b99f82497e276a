"""Topics that change under a worker: made anew, gone, with more partitions; and what their configuration must be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiokafka.admin import NewPartitions, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from stream.errors import NoAnswer, TopicError
from stream.join.checks import check_topics
from stream.kafka import cluster as module
from stream.kafka.clients import admin_client
from stream.kafka.cluster import Cluster, ClusterWatch, describe_cluster, topic_configs
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames
from tests.stream.join.made_up import join_settings, join_worker, until

BEFORE = Cluster("c", {"a": "1", "b": "2"}, {"a": 4, "b": 4})


@pytest.mark.parametrize(
    ("now", "problem"),
    [
        (BEFORE, None),
        (Cluster("c", {"a": "1", "b": "3"}, {"a": 4, "b": 4}), "b: expected the topic with id 2, found 3: it was deleted"),
        (Cluster("c", {"a": "1", "b": "2"}, {"a": 8, "b": 4}), "a: expected 4 partitions, found 8"),
        (Cluster("d", {"a": "1", "b": "2"}, {"a": 4, "b": 4}), "expected cluster c, found d"),
        (Cluster("c", {"a": "1", "b": "2"}, {"a": 4, "b": 4}, frozenset({("a", 1)})), None),
    ],
)
def test_what_counts_as_a_change(now: Cluster, problem: str | None) -> None:
    changes = BEFORE.changes(now)
    assert (changes == []) if problem is None else changes[0].startswith(problem)


def test_a_topic_must_be_missing_twice_and_an_outage_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = []

    async def describe(kafka: KafkaSettings, topics: Any, *, retry: bool) -> Cluster:
        if isinstance(answers[0], Exception):
            raise answers.pop(0)
        return answers.pop(0)

    monkeypatch.setattr(module, "describe_cluster", describe)
    told: list[TopicError] = []
    watch = ClusterWatch(KafkaSettings(), BEFORE, changed=told.append)

    async def look(answer: Any) -> None:
        answers.append(answer)
        await watch.look()

    async def check() -> None:
        away, missing = NoAnswer("away"), TopicError("missing")
        led = Cluster("c", BEFORE.topic_ids, BEFORE.partitions, frozenset({("a", 1)}))
        await look(led)
        assert (watch.leaderless, watch.unanswered_s, told) == ({("a", 1)}, 0.0, [])
        await look(away)
        assert watch.unanswered_s > 0
        await look(missing)
        await look(BEFORE)
        assert (watch.leaderless, watch.unanswered_s) == (frozenset(), 0.0)
        await look(missing)
        assert told == []
        await look(missing)
        assert told == [missing]

    asyncio.run(check())


@pytest.mark.kafka
def test_a_topic_made_anew_or_grown_is_noticed(topics):
    names = TopicNames.of(topics.topics)
    told: list[str] = []

    async def check() -> None:
        cluster = await describe_cluster(topics.kafka, [names.impressions, names.clicks])
        watch = ClusterWatch(topics.kafka, cluster, changed=lambda error: told.append(str(error)))
        await watch.look()
        assert told == []
        async with admin_client(topics.kafka) as admin:
            await admin.create_partitions({names.clicks: NewPartitions(3)})
            await _until_told(watch)
            assert f"{names.clicks}: expected 2 partitions, found 3" in told.pop()
            await admin.delete_topics([names.impressions])
            while names.impressions in await admin.list_topics():
                await asyncio.sleep(0.1)
            await admin.create_topics([NewTopic(names.impressions, 2, 1)])
        told.clear()
        await _until_told(watch)
        assert f"{names.impressions}: expected the topic with id {cluster.topic_ids[names.impressions]}" in told[-1]

    async def _until_told(watch: ClusterWatch) -> None:
        async with asyncio.timeout(30.0):
            while not told or "did not find" in told[-1]:
                await asyncio.sleep(0.1)
                await watch.look()

    asyncio.run(check())


async def _set(settings: Any, topic: str, key: str, value: str) -> None:
    async with admin_client(settings.kafka) as admin:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {key: value})])
    async with asyncio.timeout(30.0):
        while (await topic_configs(settings.kafka, [topic], [key]))[topic].get(key) != value:
            await asyncio.sleep(0.1)


@pytest.mark.kafka
def test_a_topic_that_does_not_exist_has_no_configuration(topics, caplog):
    names = TopicNames.of(topics.topics)
    found = asyncio.run(topic_configs(topics.kafka, [names.clicks, f"{names.clicks}-not-made"]))
    assert found.keys() == {names.clicks} and found[names.clicks]
    assert caplog.messages == []


@pytest.mark.kafka
def test_topics_that_the_join_can_not_rely_on(topics, caplog):
    names = TopicNames.of(topics.topics)
    four = (names.impressions, names.clicks, names.examples, names.dead_letters)

    async def check() -> None:
        cluster = await describe_cluster(topics.kafka, four)
        await check_topics(topics.kafka, topics.join, names, cluster)
        assert caplog.messages == []
        counts = {**cluster.partitions, names.dead_letters: 1}
        with pytest.raises(TopicError, match=rf"same number of partitions: .*, found .*{names.dead_letters} 1\. To go on, "):
            await check_topics(topics.kafka, topics.join, names, Cluster(cluster.cluster_id, cluster.topic_ids, counts))
        await _set(topics, names.examples, "retention.ms", "1200000")
        await check_topics(topics.kafka, topics.join, names, cluster)
        assert (
            f"{names.examples}: retention.ms: expected at least 21.1 m (window + 2 × dedupe horizon + lateness" in caplog.text
        )
        await _set(topics, names.examples, "max.message.bytes", "1048588")
        await check_topics(topics.kafka, topics.join, names, cluster)
        assert f"{names.examples}: expected max.message.bytes of at least 1114124, " in caplog.text
        await _set(topics, names.clicks, "message.timestamp.type", "CreateTime")
        wanted = rf"{names.clicks}: expected message.timestamp.type=LogAppendTime, found CreateTime.*kafka-configs.sh .*--alter"
        with pytest.raises(TopicError, match=wanted):
            await check_topics(topics.kafka, topics.join, names, cluster)

    asyncio.run(check())


@pytest.mark.kafka
def test_a_running_join_ends_when_a_topic_of_its_own_grows(topics, tmp_path):
    settings, names = join_settings(topics), TopicNames.of(topics.topics)
    worker = join_worker(settings, tmp_path)

    async def check() -> None:
        worker.start()
        await asyncio.to_thread(worker.wait_ready)
        async with admin_client(topics.kafka) as admin:
            await admin.create_partitions({names.examples: NewPartitions(3)})
        await until(lambda: worker.returncode is not None, "the end of the worker")

    try:
        asyncio.run(check())
    finally:
        worker.kill()
        worker.wait_stopped()
    assert worker.returncode == 1
    assert f"{names.examples}: expected 2 partitions, found 3. This worker began with" in worker.log.read_text()
