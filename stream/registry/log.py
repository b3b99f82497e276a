"""The `snapshots` topic as a log that is read whole: no consumer group, committed records only, from the first offset."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from state.registry import RegistryState
from stream.errors import RegistryError, TopicError
from stream.kafka.clients import aiokafka_options, no_answer, quietly_stopped
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["RegistryLog", "read_registry", "unreachable"]

logger = logging.getLogger(__name__)

# A fetch waits this long at the broker when there is nothing new, so this is also how often "nothing new" is learned.
FETCH_WAIT_MS = 500
# One wait for records while reading to a known end; a marker at the end of a transaction wakes nobody, so keep it short.
POLL_MS = 10


class RegistryLog:
    """Reads the registry's one partition into a `RegistryState`.

    `position` is the next offset to read: everything below it is in `state`. Transaction markers take offsets too, so it
    can be larger than the last record's offset plus one.

    Args:
        follow: go on fetching between calls, as a reader does that waits for news. A writer doesn't: a fetch that waits at
            the broker would hold up its question for the end of the log, which goes over the same connection.
    """

    def __init__(self, kafka: KafkaSettings, names: TopicNames, *, follow: bool) -> None:
        self._follow = follow
        self.state = RegistryState()
        self.position = 0
        self._kafka = kafka
        self._topic = names.snapshots
        self._consumer: Any = None
        self._partition: Any = None

    async def open(self) -> None:
        """Connect and stand at the first offset.

        Raises:
            TopicError: the topic isn't there.
            aiokafka.errors.KafkaError: Kafka can't be reached.
        """
        from aiokafka import AIOKafkaConsumer, TopicPartition

        consumer = AIOKafkaConsumer(
            **aiokafka_options(self._kafka),
            group_id=None,
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="none",
            fetch_max_wait_ms=FETCH_WAIT_MS if self._follow else POLL_MS,
        )
        try:
            await consumer.start()
            if self._topic not in await consumer.topics():
                raise TopicError(
                    f"topic {self._topic}: expected at {self._kafka.bootstrap_servers}, found none of that name. "
                    "`headrace topics create` makes it; topics.prefix is part of the name."
                )
            partition = TopicPartition(self._topic, 0)
            first = (await consumer.beginning_offsets([partition]))[partition]
        except BaseException:
            await quietly_stopped(consumer.stop)
            raise
        # No await between these: a fetch must not begin without a position.
        consumer.assign([partition])
        consumer.seek(partition, first)
        if not self._follow:
            consumer.pause(partition)
        self._consumer, self._partition = consumer, partition
        self.state, self.position = RegistryState(), first

    async def poll(self, timeout_ms: int) -> int:
        """Take in what has arrived, waiting at most this long for something.

        Returns:
            How many records were taken in; a malformed one counts, and is in `state.problems`.
        """
        from aiokafka.errors import OffsetOutOfRangeError

        try:
            batches = await self._consumer.getmany(self._partition, timeout_ms=timeout_ms)
        except OffsetOutOfRangeError:
            # The topic was made anew: what was read no longer counts.
            first = (await self._consumer.beginning_offsets([self._partition]))[self._partition]
            logger.warning("%s: offset %d is gone, reading from %d again", self._topic, self.position, first)
            self._consumer.seek(self._partition, first)
            self.state, self.position = RegistryState(), first
            return 0
        records = batches.get(self._partition, [])
        for record in records:
            problem = self.state.apply(record.key, record.value, record.offset)
            if problem is not None:
                logger.warning("%s: passed over a record: %s", self._topic, problem)
        self.position = await self._consumer.position(self._partition)
        return len(records)

    async def catch_up(self) -> None:
        """Read to the end as it stands now: the last stable offset. The caller sets a time limit."""
        await self.read_to((await self._consumer.end_offsets([self._partition]))[self._partition])

    async def read_to(self, end: int) -> None:
        """Read until `position` is at or beyond an offset that is there."""
        if self.position >= end:
            return
        self._consumer.resume(self._partition)
        try:
            while self.position < end:
                await self.poll(POLL_MS)
        finally:
            if not self._follow:
                self._consumer.pause(self._partition)

    def caught_up_at(self) -> float | None:
        """When the log was last known to hold nothing more (`time.monotonic()`); None when it holds more, or unknown."""
        stable = self._consumer.last_stable_offset(self._partition)
        fetched_at_ms = self._consumer.last_poll_timestamp(self._partition)
        if stable is None or fetched_at_ms is None or self.position < stable:
            return None
        return time.monotonic() - max(0.0, time.time() - fetched_at_ms / 1_000)

    async def close(self) -> None:
        """Disconnect; what was read stays readable."""
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            await quietly_stopped(consumer.stop)


def unreachable(kafka: KafkaSettings, error: BaseException) -> RegistryError:
    """What a user is told when Kafka doesn't answer."""
    return RegistryError(str(no_answer(kafka, "the snapshot registry", error)))


async def read_registry(kafka: KafkaSettings, names: TopicNames, *, timeout_ms: int = 15_000) -> RegistryState:
    """The registry as it stands now. Looking writes nothing and disturbs nobody.

    Raises:
        TopicError: the topic isn't there.
        RegistryError: Kafka can't be reached, or the end wasn't reached in time.
    """
    from aiokafka.errors import KafkaError

    log = RegistryLog(kafka, names, follow=False)
    try:
        async with asyncio.timeout(timeout_ms / 1_000):
            await log.open()
            await log.catch_up()
    except (KafkaError, TimeoutError) as error:
        raise unreachable(kafka, error) from error
    finally:
        await log.close()
    return log.state
