"""Partition 0 of the join over the real Kafka, taken over and moved step by step by a test, without a worker around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition
from prometheus_client import CollectorRegistry

from deploy.settings import Settings
from state.join_state import StateOptions
from stream.join.metrics import JoinMetrics
from stream.join.partition import PartitionJoin
from stream.join.takeover import Takeover
from stream.kafka.clients import aiokafka_options
from stream.kafka.transport import Run
from stream.topics.names import TopicNames
from tests.stream.join.owner import Owner

__all__ = ["GROUP", "Fatal", "read", "runs", "take"]

GROUP = "one-partition"


class Fatal(BaseException):
    """In the place of the process' end."""


async def read(settings: Settings, topic: str) -> list[Any]:
    """All committed records of partition 0."""
    tp = TopicPartition(topic, 0)
    options = aiokafka_options(settings.kafka)
    async with AIOKafkaConsumer(**options, isolation_level="read_committed", auto_offset_reset="none") as consumer:
        consumer.assign([tp])
        end = (await consumer.end_offsets([tp]))[tp]
        consumer.seek(tp, 0)
        records: list[Any] = []
        while await consumer.position(tp) < end:
            records += (await consumer.getmany(tp, timeout_ms=200)).get(tp, [])
        return records


async def take(settings: Settings) -> PartitionJoin:
    names = TopicNames.of(settings.topics)
    taken = await Takeover(
        kafka=settings.kafka,
        settings=settings.join,
        names=names,
        group=GROUP,
        identity="i",
        state_dir=settings.state_dir,
        options=StateOptions(8),
    ).take(0, lambda: True)

    def fatal(what: str, error: BaseException) -> None:
        raise Fatal(what) from error

    return PartitionJoin(
        0,
        settings=settings.join,
        names=names,
        group=GROUP,
        identity="i",
        partitions=1,
        taken=taken,
        owner=Owner(failed=fatal),
        metrics=JoinMetrics(CollectorRegistry()),
    )


async def runs(settings: Settings, topics: Sequence[str]) -> list[Run]:
    """All that is in these topics, a run each."""
    read_back = {topic: await read(settings, topic) for topic in topics}
    return [Run(topic, 0, 0, len(records), records) for topic, records in read_back.items()]
