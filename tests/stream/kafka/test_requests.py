"""The requests of our own, against a real broker."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import AIOKafkaConsumer

from stream.kafka.clients import admin_client, aiokafka_options
from stream.kafka.requests import GroupMembersRequest, TopicIdsRequest
from stream.topics.names import TopicNames

pytestmark = pytest.mark.kafka


def test_topics_with_their_ids_as_kafkas_own_client_reads_them(topics):
    from kafka.admin import KafkaAdminClient

    from stream.kafka.clients import kafka_python_options

    names = [TopicNames.of(topics.topics).impressions, f"{topics.topics.prefix}nowhere"]

    async def ask() -> list[tuple[int, str, str, int]]:
        async with admin_client(topics.kafka) as admin:
            answer = await admin._send_request(TopicIdsRequest(names))
            return [(code, name, str(topic_id), len(numbers)) for code, name, topic_id, _, numbers, *_ in answer.topics]

    there, missing = sorted(asyncio.run(ask()))
    admin = KafkaAdminClient(**kafka_python_options(topics.kafka))
    try:
        [described] = admin.describe_topics(names[:1])
    finally:
        admin.close()
    assert there == (0, names[0], str(described["topic_id"]), 2)
    assert missing[:2] == (3, names[1])


def test_members_with_their_instance_ids(topics):
    async def check() -> None:
        group, names = f"{topics.topics.prefix}g", TopicNames.of(topics.topics)
        options = aiokafka_options(topics.kafka)
        async with (
            AIOKafkaConsumer(names.clicks, **options, group_id=group, group_instance_id="one"),
            admin_client(topics.kafka) as admin,
        ):
            node = await admin.find_coordinator(group)
            [described] = (await admin._send_request(GroupMembersRequest(group), node)).groups
            code, name, _, _, _, members, _ = described
            assert (code, name, [member[1:3] for member in members]) == (0, group, [("one", topics.kafka.client_id)])
            assert members[0][0].startswith("one-")

    asyncio.run(check())
