"""Whether the topics hold a stream that has ended later than what is about to be sent: the join would refuse all of it as late.

Whatever ends a stream sends a watermark record beyond it, and then nothing. So the last record of each partition tells.
"""

from __future__ import annotations

import time
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from deploy.errors import DataSetError
from stream.kafka.clients import aiokafka_options
from stream.records.watermark import WATERMARK_HEADER
from stream.settings import JoinSettings, KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["refuse_late"]

_READ_S = 5.0  # for one record of each partition; what wasn't read by then isn't judged


async def refuse_late(kafka: KafkaSettings, topics: TopicNames, join: JoinSettings, first_ms: int) -> None:
    """Look at the ends of impressions and clicks.

    Args:
        first_ms: event time of the first event to be sent.

    Raises:
        DataSetError: in a partition both have ended, and their watermark makes this event late.
    """
    ends = await _last_watermarks(kafka, (topics.impressions, topics.clicks))
    kept_ms = join.window_ms + max(join.dedupe_horizon_ms, join.negative_skew_ms)
    for partition in sorted(number for topic, number in ends if topic == topics.impressions):
        marks = [ends.get((topic, partition)) for topic in (topics.impressions, topics.clicks)]
        if None in marks:
            continue
        watermark_ms = min(mark for mark in marks if mark is not None)
        if first_ms < watermark_ms - kept_ms:
            raise DataSetError(
                f"topic {topics.impressions!r}: expected no stream that ended later than this one begins, found a watermark of "
                f"{watermark_ms} at its end, and {first_ms} as the first event time: the join would refuse it as late. Use "
                "another topics.prefix, or `headrace kafka reset` for a fresh local Kafka; --loop replays again and again."
            )


async def _last_watermarks(kafka: KafkaSettings, topics: tuple[str, ...]) -> dict[tuple[str, int], int]:
    """The watermark that a partition ends with, by topic and partition; those that end with anything else are left out."""
    consumer = AIOKafkaConsumer(**aiokafka_options(kafka), enable_auto_commit=False)
    found: dict[tuple[str, int], int] = {}
    await consumer.start()
    try:
        known = await consumer._client.fetch_all_metadata()
        partitions = [TopicPartition(topic, each) for topic in topics for each in known.partitions_for_topic(topic) or ()]
        starts, ends = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
        waiting = {partition for partition in partitions if ends[partition] > starts[partition]}
        consumer.assign(list(waiting))
        for partition in waiting:
            consumer.seek(partition, ends[partition] - 1)
        until = time.monotonic() + _READ_S
        while waiting and time.monotonic() < until:
            for partition, records in (await consumer.getmany(*waiting, timeout_ms=200)).items():
                waiting.discard(partition)
                mark = _mark(records[-1])
                if mark is not None:
                    found[partition.topic, partition.partition] = mark
    finally:
        await consumer.stop()
    return found


def _mark(record: Any) -> int | None:
    mark = dict(record.headers).get(WATERMARK_HEADER)
    return int(mark) if not record.value and mark is not None and mark.isdigit() else None
