"""The offset from which a scorer reads each partition."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from aiokafka.structs import TopicPartition

from stream.kafka.clients import quietly_stopped, started
from stream.kafka.offsets import committed_offsets
from stream.kafka.read_log import log_consumer, log_spans
from stream.settings import KafkaSettings

__all__ = ["choose_positions", "committed_positions"]

log = logging.getLogger(__name__)


async def committed_positions(kafka: KafkaSettings, group: str, topic: str, partitions: Sequence[int]) -> dict[int, int]:
    """The next offset to read of each partition: what the group has committed, or the start of the log.

    Raises:
        aiokafka.errors.KafkaError: Kafka can't be reached.
    """
    if not partitions:
        return {}
    wanted = [TopicPartition(topic, number) for number in partitions]
    committed = await committed_offsets(kafka, group, wanted)
    consumer = await started(kafka, log_consumer(kafka), f"the ends of {topic}")
    try:
        logs = await log_spans(kafka, consumer, wanted)
    finally:
        await quietly_stopped(consumer.stop)
    return choose_positions(
        topic,
        {tp.partition: at.offset for tp, at in committed.items()},
        {tp.partition: span.start for tp, span in logs.items()},
        {tp.partition: span.end for tp, span in logs.items()},
    )


def choose_positions(
    topic: str, committed: Mapping[int, int], starts: Mapping[int, int], ends: Mapping[int, int]
) -> dict[int, int]:
    """The committed offset (-1: none) when it lies within the log, else the log's start.

    A committed offset outside the log belongs to requests that retention has deleted, or to a topic that was deleted and
    created again. Nobody waits for those answers any more.
    """
    positions = {}
    for partition, start in starts.items():
        at = committed.get(partition, -1)
        positions[partition] = at if start <= at <= ends[partition] else start
        if at >= 0 and at != positions[partition]:
            log.warning(
                "%s, partition %d: committed up to %d, but the log holds %d to %d; going on at %d",
                *(topic, partition, at, start, ends[partition], positions[partition]),
            )
    return positions
