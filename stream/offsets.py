"""What a group has committed, metadata included (aiokafka's consumer leaves that out)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import CoordinatorLoadInProgressError, CoordinatorNotAvailableError, NotCoordinatorError
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from stream.clients import aiokafka_options
from stream.settings import KafkaSettings

__all__ = ["committed_offsets"]

# A broker that has just become the group's coordinator reads its log first; a new cluster makes that log at the first question.
COORDINATOR_S = 30.0
RETRY_S = 0.2


async def committed_offsets(
    kafka: KafkaSettings, group: str, partitions: Sequence[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """Offsets and metadata of the partitions for which the group has committed any.

    Raises:
        aiokafka.errors.KafkaError: Kafka can't be reached, or has no coordinator for the group within half a minute.
    """
    admin = AIOKafkaAdminClient(**aiokafka_options(kafka))
    deadline = time.monotonic() + COORDINATOR_S
    await admin.start()
    try:
        while True:
            try:
                found = await admin.list_consumer_group_offsets(group, partitions=list(partitions))
                return {partition: at for partition, at in found.items() if at.offset >= 0}
            except (CoordinatorLoadInProgressError, CoordinatorNotAvailableError, NotCoordinatorError):
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(RETRY_S)
    finally:
        await admin.close()
