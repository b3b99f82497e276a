"""Sending many records to one partition: whole batches are built here, so that a record costs one call and no future.

aiokafka's `send` spends some 30 µs on a record; `BatchBuilder.append` about 1 µs. The broker keeps the order of a partition's
batches (idempotent producer), and a batch is acknowledged as a whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any

from aiokafka.record.default_records import DefaultRecordBatchBuilder

__all__ = ["BATCH_BYTES", "Outgoing", "batch_bytes", "send_batches"]

Outgoing = tuple[bytes | None, bytes | None, Sequence[tuple[str, bytes | None]]]  # key, value, headers

# Below Kafka's default limit of one batch (max.message.bytes, 1,048,588). A record larger than this travels alone.
BATCH_BYTES = 900_000


def batch_bytes(key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes | None]]) -> int:
    """The most that a batch of this record alone takes, which is what a topic's `max.message.bytes` is about."""
    return int(DefaultRecordBatchBuilder.estimate_size_in_bytes(key, value, list(headers)))


async def send_batches(producer: Any, topic: str, partition: int, records: Iterable[Outgoing]) -> list[asyncio.Future[Any]]:
    """Hand records over to an AIOKafkaProducer (its `max_batch_size` being BATCH_BYTES), in order.

    Returns:
        A future for each batch. Every one must be awaited: aiokafka commits a transaction whose record failed with an error
        that can't be retried as if nothing were wrong.
    """
    futures: list[asyncio.Future[Any]] = []
    builder = producer.create_batch()
    now_ms = int(time.time() * 1000)
    empty = True
    for key, value, headers in records:
        if builder.append(timestamp=now_ms, key=key, value=value, headers=headers) is None:
            futures.append(await producer.send_batch(builder, topic, partition=partition))
            builder = producer.create_batch()
            builder.append(timestamp=now_ms, key=key, value=value, headers=headers)
        empty = False
    if not empty:
        futures.append(await producer.send_batch(builder, topic, partition=partition))
    return futures
