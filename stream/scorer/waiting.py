"""What happens to requests while no scorer has a version: they wait for one, and in the end are answered `no_model`.

A scorer without a version does not join the group, so it takes no request from scorers that could score it. When no scorer has
a version, the group is empty, and one scorer must still answer: the one whose id comes first among the live scorers, by their
heartbeats. That scorer reads all partitions from the group's committed offsets, and commits what it answered.

Kafka takes offsets from a client that isn't a member only while the group has no members. So this scorer commits before it
answers: when the commit is rejected, a scorer with a version has joined, and the requests are left to that one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import CommitFailedError, KafkaError
from aiokafka.structs import TopicPartition

from stream.errors import StreamError
from stream.kafka.clients import aiokafka_options
from stream.records.heartbeat import Heartbeat
from stream.records.record import Record
from stream.records.request import deadline_ms
from stream.registry.heartbeat import HeartbeatReader
from stream.scorer.start import committed_positions
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["WaitingRoom", "due_ms", "is_first"]

log = logging.getLogger(__name__)

# How often the live scorers are read while another scorer answers, and how long to wait after an error of Kafka.
LOOK_S = 0.5
# Longest round. Without this limit the client would retry a commit for as long as no coordinator answers.
ROUND_S = 30.0
# Longest wait for requests in one round, which is how late an answer may be.
POLL_MS = 50
# Requests held at once. Beyond, no more are read until older ones are due.
MAX_HELD = 2_000
# A request that can't be scored is answered this long before its deadline, so that its sender still waits for the reason.
BEFORE_DEADLINE_MS = 100


class _Held(NamedTuple):
    """A request and the time at which it is answered."""

    due_ms: int
    record: Record


def due_ms(record: Record, now_ms: int, patience_ms: int) -> int:
    """When a request is answered without a version: `patience_ms` after its arrival, or shortly before its deadline.

    An arrival after `now_ms`, by a broker's clock that is ahead of this machine's, counts as `now_ms`.
    """
    due, deadline = min(record.timestamp, now_ms) + patience_ms, deadline_ms(record)
    return due if deadline is None else min(due, deadline - BEFORE_DEADLINE_MS)


def is_first(worker: str, live: Sequence[Heartbeat]) -> bool:
    """Whether this worker answers for all: no live scorer has a version, and its id comes first."""
    return all(beat.version < 0 for beat in live) and worker == min((beat.worker for beat in live), default="")


class WaitingRoom:
    """Answers `no_model` while no scorer has a version, until it is cancelled.

    Args:
        refuse: answers these requests and returns when the brokers have the answers.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        names: TopicNames,
        *,
        group: str,
        partitions: int,
        worker: str,
        patience_ms: int,
        refuse: Callable[[list[Record]], Awaitable[None]],
    ) -> None:
        self._kafka, self._names, self._group, self._worker = kafka, names, group, worker
        self._partitions, self._patience_ms, self._refuse = partitions, patience_ms, refuse
        self._consumer: AIOKafkaConsumer | None = None
        self._held: dict[TopicPartition, list[_Held]] = {}  # in the order of the log

    async def run(self) -> None:
        """Hold requests and answer those that are due. Errors of Kafka are logged, and the round is tried again."""
        while True:
            try:
                async with HeartbeatReader(self._kafka, self._names, every_track=True) as scorers:
                    while True:
                        async with asyncio.timeout(ROUND_S):
                            first = is_first(self._worker, await scorers.live())
                            await (self._round() if first else self._leave())
                        if not first:
                            await asyncio.sleep(LOOK_S)
            except CommitFailedError:
                log.info("a scorer with a version is there: leaving the requests to it")
            except (KafkaError, StreamError, TimeoutError) as error:
                log.warning("requests wait for a version, and the brokers don't answer: %r", error)
            finally:
                await self._leave()
            await asyncio.sleep(LOOK_S)

    async def _round(self) -> None:
        consumer = await self._entered()
        if sum(map(len, self._held.values())) < MAX_HELD:
            fetched = await consumer.getmany(timeout_ms=POLL_MS, max_records=MAX_HELD)
            now_ms = _now_ms()
            for tp, records in fetched.items():
                self._held[tp] += [_Held(due_ms(record, now_ms, self._patience_ms), record) for record in records]
        else:
            await asyncio.sleep(POLL_MS / 1000)
        now_ms = _now_ms()
        due = [each.record for held in self._held.values() for each in held if each.due_ms <= now_ms]
        if due:
            await self._commit(consumer)  # rejected when a scorer with a version has joined
            await self._refuse(due)
            for held in self._held.values():
                held[:] = [each for each in held if each.due_ms > now_ms]
            await self._commit(consumer)

    async def _entered(self) -> AIOKafkaConsumer:
        """The consumer of all partitions, started at the committed offsets when this scorer begins to answer."""
        if self._consumer is not None:
            return self._consumer
        numbers = range(self._partitions)
        positions = await committed_positions(self._kafka, self._group, self._names.score_requests, numbers)
        consumer = AIOKafkaConsumer(
            **aiokafka_options(self._kafka),
            group_id=self._group,
            enable_auto_commit=False,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
        )
        await consumer.start()
        self._consumer = consumer
        self._held = {TopicPartition(self._names.score_requests, number): [] for number in numbers}
        consumer.assign(list(self._held))
        for tp in self._held:
            consumer.seek(tp, positions[tp.partition])
        log.info("no scorer has a version: requests wait for one, at most %d ms", self._patience_ms)
        return consumer

    async def _leave(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            with contextlib.suppress(KafkaError):
                await consumer.stop()

    async def _commit(self, consumer: AIOKafkaConsumer) -> None:
        """Commit the offset of the first held request of each partition: everything before it is answered."""
        offsets = {}
        for tp, held in self._held.items():
            offsets[tp] = held[0].record.offset if held else await consumer.position(tp)
        await consumer.commit(offsets)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
