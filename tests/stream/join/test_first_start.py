"""A first start is told from one whose committed offsets are gone."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from deploy.settings import Settings
from state.join_state import StateOptions
from stream.errors import PositionError
from stream.join.commit_metadata import Progress, encode_progress
from stream.join.takeover import Takeover
from stream.topics.names import TopicNames

pytestmark = pytest.mark.kafka


def takeover(settings: Settings, identity: str = "test") -> Takeover:
    names = TopicNames.of(settings.topics)
    return Takeover(
        kafka=settings.kafka,
        settings=settings.join,
        names=names,
        group=f"{names.prefix}{settings.join.group}",
        identity=identity,
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


@pytest.mark.parametrize(
    ("now", "said"), [("c/i/k/E/0", r"examples was made anew \(id E, before e\)"), ("c/I/k/e/0", "impressions was made anew")]
)
def test_progress_of_topics_that_were_made_anew_is_refused(topics: Settings, now: str, said: str) -> None:
    """Labels of before are gone with their topic: going on would give impressions that are still remembered a second one."""
    names = TopicNames.of(topics.topics)
    group = f"{names.prefix}{topics.join.group}"
    progress = Progress(
        watermark_ms=0,
        impressions_seen_ms=0,
        clicks_seen_ms=0,
        impressions_low=0,
        clicks_low=0,
        examples_low=0,
        identity="c/i/k/e/0",
    )
    committed = OffsetAndMetadata(0, encode_progress(progress))

    async def run() -> None:
        async with AIOKafkaProducer(
            bootstrap_servers=topics.kafka.bootstrap_servers, transactional_id=f"{names.prefix}other"
        ) as producer:
            await producer.begin_transaction()
            offsets = {TopicPartition(topic, 0): committed for topic in (names.impressions, names.clicks)}
            await producer.send_offsets_to_transaction(offsets, group)
            await producer.commit_transaction()
        with pytest.raises(PositionError, match=said):
            await takeover(topics, now).take(0, lambda: True)
        taken = await takeover(topics, "c/i/k/e/0").take(0, lambda: True)
        await taken.producer.stop()
        taken.state.close()

    asyncio.run(run())
