"""Sends answers and dead letters, whole batches to a partition."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.partitioner import DefaultPartitioner

from stream.kafka.batches import BATCH_BYTES, send_batches
from stream.kafka.clients import aiokafka_options, quietly_stopped, started
from stream.records.record import Outgoing
from stream.scorer.answers import Answers
from stream.settings import KafkaSettings
from stream.topics.limits import DEFAULT_MAX_MESSAGE_BYTES, letter_limit

__all__ = ["Outbox"]


class Outbox:
    """An idempotent producer. A record goes to the partition that Kafka's own producers choose, by murmur2 of its key.

    Args:
        partitions: how many partitions each of the two topics has.
    """

    def __init__(self, kafka: KafkaSettings, partitions: dict[str, int], *, scores: str, dead_letters: str) -> None:
        self._kafka, self._scores, self._dead_letters = kafka, scores, dead_letters
        self._numbers = {topic: list(range(count)) for topic, count in partitions.items()}
        self._partition_of = DefaultPartitioner()
        self._letter_bytes = DEFAULT_MAX_MESSAGE_BYTES
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        self._letter_bytes = await letter_limit(self._kafka, self._dead_letters)
        producer = AIOKafkaProducer(
            **aiokafka_options(self._kafka),
            acks="all",
            enable_idempotence=True,
            max_batch_size=BATCH_BYTES,
            max_request_size=1 << 30,  # the topics' limits decide
        )
        self._producer = await started(self._kafka, producer, "a producer of answers")

    async def send(self, answers: Answers) -> list[asyncio.Future[Any]]:
        """Hand over. Returns a future for each batch: when all are done, the brokers have everything."""
        letters = (letter.outgoing(self._letter_bytes) for letter in answers.dead)
        return [*await self._send(self._scores, answers.records), *await self._send(self._dead_letters, letters)]

    async def _send(self, topic: str, records: Iterable[Outgoing]) -> list[asyncio.Future[Any]]:
        numbers = self._numbers[topic]
        by_partition: dict[int, list[Outgoing]] = defaultdict(list)
        for record in records:
            key, _, _ = record
            by_partition[self._partition_of(key, numbers, numbers)].append(record)
        # At the same time: the producer holds back each partition's sender until the batch before is on its way.
        sent = await asyncio.gather(
            *(send_batches(self._producer, topic, number, part) for number, part in by_partition.items())
        )
        return [future for futures in sent for future in futures]

    async def close(self) -> None:
        if self._producer is not None:
            await quietly_stopped(self._producer.stop)
