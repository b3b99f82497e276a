"""A client that is started quickly: what it asks for, what it knows then, and what becomes of its connection."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaConnectionError

from deploy.settings import Settings
from stream.kafka.clients import aiokafka_options
from stream.kafka.quick import started_quickly
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames


@pytest.mark.kafka
def test_two_requests_until_a_topic_is_known_and_one_connection(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    send, connect = AIOKafkaConnection.send, AIOKafkaConnection.connect

    def spied(self: Any, request: Any, *args: Any, **options: Any) -> Any:
        sent.append(type(request).__name__)
        return send(self, request, *args, **options)

    async def spied_connect(self: Any) -> Any:
        sent.append("connect")
        return await connect(self)

    monkeypatch.setattr(AIOKafkaConnection, "send", spied)
    monkeypatch.setattr(AIOKafkaConnection, "connect", spied_connect)
    name = TopicNames.of(topics.topics).snapshots
    partition = TopicPartition(name, 0)

    async def run() -> None:
        usual = AIOKafkaConsumer(name, **aiokafka_options(topics.kafka))
        await usual.start()
        await usual.end_offsets([partition])  # a broker needs a moment for topics that were just created
        await usual.stop()
        sent.clear()
        consumer = AIOKafkaConsumer(**aiokafka_options(topics.kafka), enable_auto_commit=False)
        producer = AIOKafkaProducer(**aiokafka_options(topics.kafka))
        try:
            await started_quickly(consumer, [name])
            assert sent == ["connect", "ApiVersionRequest", "MetadataRequest"]
            assert consumer.partitions_for_topic(name) == {0}
            assert await consumer.end_offsets([partition]) == {partition: 0}
            consumer.assign([partition])
            consumer.seek(partition, 0)
            assert sent[3:] == ["OffsetRequest"], "no other connection, and no other request for metadata"
            await started_quickly(producer, [name])
            assert (await producer.send_and_wait(name, b"x", key=b"k", partition=0)).offset == 0
            record = await asyncio.wait_for(consumer.getone(), 30)
            assert (record.key, record.value) == (b"k", b"x")
        finally:
            for client in (producer, consumer):
                await client.stop()

    asyncio.run(run())


@pytest.mark.kafka
def test_a_topic_that_is_missing_is_not_created(topics: Settings) -> None:
    async def run() -> None:
        consumer = await started_quickly(AIOKafkaConsumer(**aiokafka_options(topics.kafka)), ["no-such"])
        try:
            assert consumer.partitions_for_topic("no-such") is None
            assert "no-such" not in await consumer.topics()
        finally:
            await consumer.stop()

    asyncio.run(run())


def test_without_a_broker_it_fails_as_always() -> None:
    async def run() -> None:
        nowhere = aiokafka_options(KafkaSettings(bootstrap_servers="127.0.0.1:9"))
        consumer = AIOKafkaConsumer(**nowhere)
        with pytest.raises(KafkaConnectionError, match=r"Unable to bootstrap .*127.0.0.1:9: ConnectionRefused"):
            await started_quickly(consumer, ["t"])
        await consumer.stop()

    asyncio.run(run())


def test_aiokafka_connects_where_it_is_replaced() -> None:
    for start in (AIOKafkaConsumer.start, AIOKafkaProducer.start):
        assert "bootstrap()" in inspect.getsource(start)
    names = inspect.getsource(AIOKafkaClient.__init__)
    for name in ("_topics", "_conns", "_sync_task", "_ssl_context", "_connections_max_idle_ms", "_sasl_oauth_token_provider"):
        assert f"self.{name} =" in names
    assert "self._conns[conn_id]" in inspect.getsource(AIOKafkaClient._get_conn)
