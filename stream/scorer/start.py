"""What a scorer asks the cluster: where its partitions go on, and how large an answer may be."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from stream.clients import aiokafka_options
from stream.offsets import committed_offsets
from stream.settings import KafkaSettings

__all__ = ["choose_positions", "committed_positions", "max_message_bytes"]

log = logging.getLogger(__name__)

DEFAULT_MAX_MESSAGE_BYTES = 1_048_588  # Kafka's own, for a scorer that may not read the topic's configuration


async def committed_positions(kafka: KafkaSettings, group: str, topic: str, partitions: Sequence[int]) -> dict[int, int]:
    """Where each partition goes on: what the group has committed, or the start of the log.

    Raises:
        aiokafka.errors.KafkaError: Kafka can't be reached.
    """
    if not partitions:
        return {}
    places = [TopicPartition(topic, number) for number in partitions]
    committed = await committed_offsets(kafka, group, places)
    consumer = AIOKafkaConsumer(**aiokafka_options(kafka), isolation_level="read_committed", enable_auto_commit=False)
    try:
        await consumer.start()
        starts, ends = await consumer.beginning_offsets(places), await consumer.end_offsets(places)
    finally:
        await consumer.stop()
    return choose_positions(
        topic,
        {place.partition: at.offset for place, at in committed.items()},
        {place.partition: at for place, at in starts.items()},
        {place.partition: at for place, at in ends.items()},
    )


def choose_positions(
    topic: str, committed: Mapping[int, int], starts: Mapping[int, int], ends: Mapping[int, int]
) -> dict[int, int]:
    """A committed offset (-1: none) that lies within the log, else the log's start.

    Nobody waits for an answer any more to requests that retention has deleted, or to those of a topic since made anew.
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


async def max_message_bytes(kafka: KafkaSettings, topic: str) -> int:
    """The largest batch that a topic takes.

    Asked for before anything is sent: a record refused by the broker would break the idempotent producer's sequence.
    """
    admin = AIOKafkaAdminClient(**aiokafka_options(kafka))
    try:
        await admin.start()
        answers = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    finally:
        await admin.close()
    try:
        entries = {entry[0]: entry[1] for answer in answers for resource in answer.resources for entry in resource[4]}
        return int(entries["max.message.bytes"])
    except (KafkaError, KeyError, IndexError, ValueError):
        log.warning("%s: its max.message.bytes can't be read, taking Kafka's default", topic)
        return DEFAULT_MAX_MESSAGE_BYTES
