"""A first start is told from one whose committed offsets are gone."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import AIOKafkaProducer

from deploy.settings import Settings
from state.join_state import StateOptions
from stream.errors import PositionError
from stream.join.takeover import Takeover
from stream.topics import TopicNames

pytestmark = pytest.mark.kafka


def takeover(settings: Settings) -> Takeover:
    names = TopicNames.of(settings.topics)
    return Takeover(
        kafka=settings.kafka,
        settings=settings.join,
        names=names,
        group=f"{names.prefix}{settings.join.group}",
        identity="test",
        state_dir=settings.state_dir,
        options=StateOptions(8),
    )


async def send_example(settings: Settings, *, commit: bool) -> None:
    async with AIOKafkaProducer(
        bootstrap_servers=settings.kafka.bootstrap_servers, transactional_id=f"{settings.topics.prefix}other"
    ) as producer:
        await producer.begin_transaction()
        await producer.send_and_wait(TopicNames.of(settings.topics).examples, b"{}", key=b"i", partition=0)
        await (producer.commit_transaction() if commit else producer.abort_transaction())


def test_labels_without_committed_offsets_are_refused(topics: Settings) -> None:
    async def run() -> None:
        await send_example(topics, commit=True)
        with pytest.raises(PositionError, match=r"expected committed offsets, since .* holds labels, found none"):
            await takeover(topics).take(0, lambda: True)

    asyncio.run(run())


def test_an_aborted_first_transaction_is_still_a_first_start(topics: Settings) -> None:
    async def run() -> None:
        await send_example(topics, commit=False)
        taken = await takeover(topics).take(0, lambda: True)
        assert taken.positions.impressions == 0
        await taken.producer.stop()
        taken.state.close()

    asyncio.run(run())
