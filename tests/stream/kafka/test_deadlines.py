"""Every wait on Kafka has an end: a broker that takes connections and never answers, futures that nobody completes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from aiokafka.structs import TopicPartition

from stream.errors import NoAnswer, StreamError
from stream.kafka import clients
from stream.kafka.clients import answer, quietly_stopped, started, written
from stream.kafka.cluster import describe_cluster, topic_configs
from stream.kafka.offsets import committed_offsets
from stream.kafka.read_log import high_watermarks
from stream.registry.heartbeat import HeartbeatSender
from stream.scorer.outbox import Outbox
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.names import TopicNames

NAMES = TopicNames.of(TopicSettings())
PLACE = TopicPartition("impressions", 0)


@pytest.fixture
def mute() -> Iterator[KafkaSettings]:
    """A broker that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield KafkaSettings(bootstrap_servers=f"127.0.0.1:{server.getsockname()[1]}", request_timeout_ms=1_000)


@pytest.mark.parametrize(
    "ask",
    [
        lambda kafka: describe_cluster(kafka, ["impressions"], retry=False),
        lambda kafka: topic_configs(kafka, ["impressions"], ["retention.ms"]),
        lambda kafka: committed_offsets(kafka, "g", [PLACE]),
        lambda kafka: high_watermarks(kafka, [PLACE]),
        lambda kafka: HeartbeatSender(kafka, NAMES, worker="w").start(),
        lambda kafka: Outbox(kafka, {}, scores="s", dead_letters="d").start(),
    ],
)
def test_a_mute_broker_is_a_clear_error(mute: KafkaSettings, ask: Callable[[KafkaSettings], Awaitable[Any]]) -> None:
    async def check() -> None:
        with pytest.raises(StreamError, match=r"Kafka at 127.0.0.1:\d+.*: expected an answer about"):
            await asyncio.wait_for(ask(mute), 60.0)

    asyncio.run(check())


class Client:
    """Hangs in what is named."""

    def __init__(self, *hangs: str) -> None:
        self.hangs, self.calls = hangs, list[str]()

    async def _call(self, what: str) -> None:
        self.calls.append(what)
        if what in self.hangs:
            await asyncio.Event().wait()

    async def start(self) -> None:
        await self._call("start")

    async def stop(self) -> None:
        await self._call("stop")


def test_a_client_that_does_not_start_is_stopped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transactional producer asks for its coordinator for ever."""
    monkeypatch.setattr(clients, "STOP_S", 0.05)

    async def check() -> None:
        client = Client("start", "stop")
        with pytest.raises(NoAnswer, match=r"Kafka at here:1: .*an answer about the producer of partition 3 within 0.05 s"):
            await started(KafkaSettings(bootstrap_servers="here:1"), client, "the producer of partition 3", within_s=0.05)
        assert client.calls == ["start", "stop"]
        client = Client()
        assert await started(KafkaSettings(), client, "it") is client
        await quietly_stopped(client.stop)
        assert client.calls == ["start", "stop"]

    asyncio.run(check())


def test_what_is_never_written_is_an_error_and_stays_the_producers_own() -> None:
    async def check() -> None:
        loop = asyncio.get_running_loop()
        done, never, refused = loop.create_future(), loop.create_future(), loop.create_future()
        done.set_result(1)
        assert await written(KafkaSettings(), [done], "letters") == [1]
        assert await written(KafkaSettings(), [], "letters") == []
        with pytest.raises(NoAnswer, match="what was sent: letters"):
            await written(KafkaSettings(), [done, never], "letters", within_s=0.05)
        assert not never.cancelled()
        refused.set_exception(ValueError("too large"))
        never.set_result(2)
        with pytest.raises(ValueError, match="too large"):
            await written(KafkaSettings(), [never, refused], "letters")

    asyncio.run(check())


def test_a_timeout_of_what_was_asked_is_its_own() -> None:
    async def fails() -> None:
        raise TimeoutError("its own")

    async def check() -> None:
        with pytest.raises(TimeoutError, match="its own"):
            await answer(KafkaSettings(), fails(), "it")

    asyncio.run(check())
