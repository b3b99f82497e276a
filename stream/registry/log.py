"""Reads the registry of versions: the one partition of the topic `snapshots`, whole, from its first offset.

Committed records only, and no consumer group.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from state.registry import RegistryState
from stream.kafka.clients import aiokafka_options, quietly_stopped, unreachable
from stream.kafka.cluster import missing_topic
from stream.kafka.quick import started_quickly
from stream.kafka.read_log import FETCHER_LOOK_MS, read_to
from stream.records.record import Record
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

if TYPE_CHECKING:
    from aiokafka import AIOKafkaConsumer, TopicPartition

__all__ = ["ANSWER", "LOOK_MS", "RegistryLog", "read_registry"]

logger = logging.getLogger(__name__)

# What was asked for, in the error of a Kafka that can't be reached.
ANSWER = "an answer about the snapshot registry"
# How often a follower learns that there is nothing new: the broker answers a fetch without new records after this time.
LOOK_MS = 500
# Size of one answer: a registry of a thousand versions has some 2 MB.
FETCH_BYTES = 4 << 20
# Longest single wait for records while reading to a known end. It is short, since the marker at a transaction's end is no
# record and doesn't end the wait.
POLL_MS = 10


class RegistryLog:
    """Reads the registry's partition into a `RegistryState`.

    `position` is the next offset to read: everything below it is in `state`. It can be larger than the last record's offset
    plus one, since the markers of transactions take offsets too.

    Args:
        follow: keep fetching between calls, for a reader that waits for news. A writer doesn't: a fetch that waits at the
            broker would hold up the writer's request for the end of the log, which uses the same connection.
        look_ms: how often a reader that follows learns that there is nothing new.
    """

    def __init__(self, kafka: KafkaSettings, names: TopicNames, *, follow: bool, look_ms: int = LOOK_MS) -> None:
        self._follow, self._look_ms = follow, look_ms
        self.state = RegistryState()
        self.position = 0
        self.arrived_ms = 0
        """Arrival of the newest record that was read, by the broker's clock: Kafka's time is that, or later."""
        self._kafka = kafka
        self._topic = names.snapshots
        self._consumer: AIOKafkaConsumer = None
        self._partition: TopicPartition = None

    @property
    def is_open(self) -> bool:
        """Whether it is connected."""
        return self._consumer is not None

    async def open(self) -> None:
        """Connect, and read to the end of the log as it is now. The caller sets a time limit.

        Raises:
            TopicError: the topic doesn't exist.
            aiokafka.errors.KafkaError: Kafka can't be reached.
        """
        from aiokafka import AIOKafkaConsumer, TopicPartition

        consumer = AIOKafkaConsumer(
            **aiokafka_options(self._kafka),
            group_id=None,
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="none",
            fetch_max_wait_ms=self._look_ms if self._follow else 1,  # what a writer fetches is there
            max_partition_fetch_bytes=FETCH_BYTES,
            consumer_timeout_ms=FETCHER_LOOK_MS,
        )
        try:
            await started_quickly(consumer, [self._topic])
            if not consumer.partitions_for_topic(self._topic):
                raise missing_topic(self._kafka, self._topic)
            partition = TopicPartition(self._topic, 0)
            # Before the first fetch, which may wait at the broker, and holds up what is sent on its connection meanwhile.
            end = (await consumer.end_offsets([partition]))[partition]
        except BaseException:
            await quietly_stopped(consumer.stop)
            raise
        # No await between these: a fetch must not begin without a position. `read_to` goes on behind what the log has lost.
        consumer.assign([partition])
        consumer.seek(partition, 0)
        if not self._follow:
            consumer.pause(partition)
        self._consumer, self._partition = consumer, partition
        self.state, self.position = RegistryState(), 0
        try:
            await self.read_to(end)
        except BaseException:
            await self.close()
            raise

    async def poll(self, timeout_ms: int) -> int:
        """Apply the records that have arrived; wait for some at most `timeout_ms`.

        Returns:
            How many records there were. A malformed one counts too; it is listed in `state.problems`.
        """
        from aiokafka.errors import OffsetOutOfRangeError

        try:
            fetched = await self._consumer.getmany(self._partition, timeout_ms=timeout_ms)
        except OffsetOutOfRangeError:
            await self._start_again()
            return 0
        records = fetched.get(self._partition, [])
        self._apply(records)
        self.position = await self._consumer.position(self._partition)
        return len(records)

    async def catch_up(self) -> None:
        """Read to the end of the log as it is now: the last stable offset. The caller sets a time limit."""
        await self.read_to(await self.end())

    async def end(self) -> int:
        """The end of the log as it is now: the last stable offset."""
        end: int = (await self._consumer.end_offsets([self._partition]))[self._partition]
        return end

    async def read_to(self, end: int) -> None:
        """Read until `position` is at or beyond an offset that exists. The caller sets a time limit."""
        from aiokafka.errors import OffsetOutOfRangeError

        if self.position >= end:
            return
        self._consumer.resume(self._partition)
        try:
            while self.position < end:
                try:
                    async for _, records in read_to(self._consumer, {self._partition: end}, poll_ms=POLL_MS):
                        self._apply(records)
                    self.position = await self._consumer.position(self._partition)
                except OffsetOutOfRangeError:
                    await self._start_again()
        finally:
            if not self._follow:
                self._consumer.pause(self._partition)

    def _apply(self, records: Sequence[Record]) -> None:
        for record in records:
            self.arrived_ms = max(self.arrived_ms, record.timestamp)  # a broker's clock may jump back
            problem = self.state.apply(record.key, record.value, record.offset, self.arrived_ms)
            if problem is not None:
                logger.warning("%s: passed over a record: %s", self._topic, problem)

    async def _start_again(self) -> None:
        """The topic was deleted and created again: the records read so far no longer count. Or its first offset isn't 0."""
        first = (await self._consumer.beginning_offsets([self._partition]))[self._partition]
        if self.position:
            logger.warning("%s: offset %d is gone, reading from %d again", self._topic, self.position, first)
        self._consumer.seek(self._partition, first)
        self.state, self.position = RegistryState(), first

    def caught_up_at(self) -> float | None:
        """When (`time.monotonic()`) the log was last seen to hold nothing more. None when it holds more, or that is unknown."""
        if self._consumer is None:
            return None
        stable = self._consumer.last_stable_offset(self._partition)
        fetched_at_ms = self._consumer.last_poll_timestamp(self._partition)
        if stable is None or fetched_at_ms is None or self.position < stable:
            return None
        return time.monotonic() - max(0.0, time.time() - fetched_at_ms / 1_000)

    async def close(self) -> None:
        """Disconnect. `state` stays readable."""
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            await quietly_stopped(consumer.stop)


async def read_registry(kafka: KafkaSettings, names: TopicNames, *, timeout_ms: int = 15_000) -> RegistryState:
    """The registry as it is now. Writes nothing, and holds up no writer.

    Raises:
        TopicError: the topic doesn't exist.
        NoAnswer: Kafka can't be reached, or the end wasn't reached in time.
    """
    from aiokafka.errors import KafkaError

    log = RegistryLog(kafka, names, follow=False)
    try:
        async with asyncio.timeout(timeout_ms / 1_000):
            await log.open()
    except (KafkaError, TimeoutError) as error:
        raise unreachable(kafka, ANSWER, error) from error
    finally:
        await log.close()
    return log.state
