"""A label that the broker refuses as too large, on the real Kafka: nothing of its step is committed, and nothing is lost."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import MessageSizeTooLargeError
from aiokafka.structs import TopicPartition

from deploy.settings import Settings
from stream.kafka.clients import aiokafka_options
from stream.kafka.offsets import committed_offsets
from stream.records.watermark import WATERMARK_HEADER
from stream.topics.names import TopicNames
from tests.stream.join.one_partition import GROUP, Fatal, read, runs, take

pytestmark = pytest.mark.kafka

LARGE = b'{"impression_id":"large","timestamp":1700000001000,"features":{"text":"%s"}}' % (b"x" * 8_000)
SMALL = b'{"impression_id":"small","timestamp":1700000001000,"features":{}}'


async def limit_examples(settings: Settings, max_bytes: int) -> None:
    admin = AIOKafkaAdminClient(**aiokafka_options(settings.kafka))
    await admin.start()
    topic = TopicNames.of(settings.topics).examples
    await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": str(max_bytes)})])
    await admin.close()


def test_a_label_larger_than_examples_takes_commits_nothing(topics):
    names = TopicNames.of(topics.topics)
    mark = [(WATERMARK_HEADER, b"1700010000000")]

    async def check() -> None:
        async with AIOKafkaProducer(**aiokafka_options(topics.kafka)) as producer:
            for key, value in ((b"small", SMALL), (b"large", LARGE)):
                await producer.send_and_wait(names.impressions, value, key=key, partition=0)
            for topic in (names.impressions, names.clicks):
                await producer.send_and_wait(topic, b"", headers=mark, partition=0)
        sources = (names.impressions, names.clicks)
        arrived = await runs(topics, sources)
        await limit_examples(topics, 2_000)
        partition = await take(topics)
        with pytest.raises(Fatal) as ended:
            await partition._step(arrived)
        assert isinstance(ended.value.__cause__, MessageSizeTooLargeError)
        # As after the process' end: the state is what it was, the transaction stays open and the next owner's start ends it.
        partition._state.close()
        places = [TopicPartition(topic, 0) for topic in sources]
        assert await committed_offsets(topics.kafka, GROUP, places) == {}
        await limit_examples(topics, 100_000)
        again = await take(topics)
        assert (again.positions.impressions, again.positions.clicks, again.pending) == (0, 0, 0)
        assert await read(topics, names.examples) == []
        await again._step(arrived)
        # The two labels and the transaction's marker: what comes next comes there.
        async with AIOKafkaConsumer(**aiokafka_options(topics.kafka)) as consumer:
            examples = TopicPartition(names.examples, 0)
            assert again.positions.examples == (await consumer.end_offsets([examples]))[examples]
        await again.close()
        assert [(record.key, dict(record.headers)["label"]) for record in await read(topics, names.examples)] == [
            *((b"small", b"0"), (b"large", b"0")),
        ]
        await partition._producer.stop()

    asyncio.run(check())
