"""Committed offsets of a group, with their metadata.

aiokafka's consumer leaves out the metadata, and its admin client leaves out the errors.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence

from aiokafka.errors import (
    CoordinatorLoadInProgressError,
    CoordinatorNotAvailableError,
    KafkaError,
    NodeNotReadyError,
    NotCoordinatorError,
    RequestTimedOutError,
    for_code,
)
from aiokafka.protocol.api import Response
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from stream.errors import NoAnswer
from stream.kafka.clients import admin_client, answer
from stream.kafka.requests import StableOffsetsRequest
from stream.settings import KafkaSettings

__all__ = ["committed_offsets"]

# How long the request is repeated. Three things take time:
# - a broker that has just become the group's coordinator reads the group's log first;
# - a new cluster creates that log at the first request;
# - an open transaction with offsets of this group ends within its own timeout (join.transaction_timeout_ms, 15 s).
COORDINATOR_S = 60.0
RETRY_S = 0.2
UNSTABLE_OFFSET_COMMIT = 88  # Kafka's error code, unknown to aiokafka: an open transaction is about to move the offset
_PASSING = (
    CoordinatorLoadInProgressError,
    CoordinatorNotAvailableError,
    NodeNotReadyError,
    NotCoordinatorError,
    RequestTimedOutError,
)


async def committed_offsets(
    kafka: KafkaSettings, group: str, partitions: Sequence[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """Offsets and metadata of those of the partitions for which the group has committed an offset.

    Where an open transaction is about to move an offset, its end is awaited. (Brokers before Kafka 2.5 don't report that.)

    Raises:
        NoAnswer: for a minute the group had no coordinator, or a transaction was open.
        aiokafka.errors.KafkaError: Kafka can't be reached, or rejects the request.
    """
    topics: dict[str, list[int]] = defaultdict(list)
    for topic, number in partitions:
        topics[topic].append(number)
    deadline = time.monotonic() + COORDINATOR_S
    async with admin_client(kafka) as admin:
        while True:
            what = f"the committed offsets of group {group}"
            try:
                coordinator = await answer(kafka, admin.find_coordinator(group), f"the coordinator of group {group}")
                response = await answer(kafka, admin._send_request(StableOffsetsRequest(group, topics), coordinator), what)
                return _read(response, group)
            except _PASSING as error:
                if time.monotonic() > deadline:
                    raise NoAnswer(
                        f"Kafka at {kafka.bootstrap_servers}: expected {what} within {COORDINATOR_S:.0f} s, found: "
                        f"{error!r}. Check the brokers that hold __consumer_offsets and __transaction_state."
                    ) from error
            await asyncio.sleep(RETRY_S)


def _read(response: Response, group: str) -> dict[TopicPartition, OffsetAndMetadata]:
    """Raises on any error code: an error that is passed over would look like a partition without a committed offset."""
    _check(response.error_code, f"group {group}")
    found: dict[TopicPartition, OffsetAndMetadata] = {}
    for topic, numbers, *_ in response.topics:
        for row in numbers:
            # Version 7 has a leader epoch after the offset, and tags at the end.
            number, offset, *_, metadata, code = row if len(row) == 4 else row[:5]
            _check(code, f"group {group}, {topic} partition {number}")
            if offset >= 0:
                found[TopicPartition(topic, number)] = OffsetAndMetadata(offset, metadata or "")
    return found


def _check(code: int, what: str) -> None:
    if code == UNSTABLE_OFFSET_COMMIT:
        raise CoordinatorLoadInProgressError(f"{what}: an open transaction is about to move the offset")
    if code:
        error: type[KafkaError] = for_code(code)
        raise error(f"{what}: the coordinator answered with error code {code}")
