"""What the commands share."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka.errors import KafkaError
from kafka.errors import KafkaError as AdminError

from deploy.cli.common import ask_kafka
from deploy.settings import Settings
from stream.errors import StreamError, TopicError
from stream.settings import KafkaSettings


@pytest.fixture(autouse=True)
def _reached(monkeypatch: pytest.MonkeyPatch) -> None:
    async def reach(kafka: KafkaSettings) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr("stream.kafka.reach.reach", reach)


@pytest.mark.parametrize("error", [KafkaError("no"), AdminError("no"), ConnectionRefusedError("no"), TopicError("no")])
def test_an_error_of_kafka_becomes_one_message(error: Exception) -> None:
    async def ask() -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(StreamError) as told:
        ask_kafka(Settings(), ask(), "the weather")
    shown = f"{type(error).__name__}: no"
    if isinstance(error, StreamError):
        assert told.value is error
    else:
        assert str(told.value).startswith(
            f"Kafka at 127.0.0.1:9092 (PLAINTEXT): expected an answer about the weather, found {shown}. "
        )


def test_an_answer() -> None:
    async def answer() -> int:
        return 7

    assert ask_kafka(Settings(), answer(), "the weather") == 7
