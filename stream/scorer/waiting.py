"""What happens to requests while no scorer has a version: they wait for one, and in the end are answered `no_model`.

A scorer without a version is no member of the group, so it takes no request from scorers that could score it. Where nobody
has a version, the group is empty, and somebody must still answer. That is the one among the scorers alive, by their
heartbeats, whose id comes first. It reads all partitions from what the group has committed, and commits what it answered.

Kafka takes offsets from somebody who isn't a member only while a group has no members. So committing comes before answering:
when it is rejected, a scorer with a version is there, and the requests are left to that one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import CommitFailedError, KafkaError
from aiokafka.structs import TopicPartition

from stream.errors import StreamError
from stream.kafka.clients import aiokafka_options
from stream.records.heartbeat import Heartbeat
from stream.registry.heartbeat import HeartbeatReader
from stream.scorer.start import committed_positions
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["WaitingRoom", "due_ms", "is_first"]

log = logging.getLogger(__name__)

# How often it is looked who is alive while somebody else answers, or a broker doesn't.
LOOK_S = 0.5
# Longest round: the client tries a commit again for as long as no coordinator answers.
ROUND_S = 30.0
# Longest wait for requests in one round: how late an answer may be.
POLL_MS = 50
# Requests held at once; older ones are due before more are read.
MAX_HELD = 2_000
# So long before its deadline a request that can't be scored is answered: whoever asked is still there to hear why.
BEFORE_DEADLINE_MS = 100


class _Request(msgspec.Struct):
    deadline_ms: int | None = None


_request = msgspec.json.Decoder(_Request).decode


def due_ms(record: Any, now_ms: int, patience_ms: int) -> int:
    """When a request is answered for want of a version: `patience_ms` after its arrival, or shortly before its deadline.

    An arrival by a broker's clock that is ahead of this machine's counts as now.
    """
    due = min(record.timestamp, now_ms) + patience_ms
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        deadline_ms = _request(record.value or b"").deadline_ms
        if deadline_ms is not None:
            due = min(due, deadline_ms - BEFORE_DEADLINE_MS)
    return due


def is_first(worker: str, live: Sequence[Heartbeat]) -> bool:
    """Whether this worker answers for all: nobody alive has a version, and its id comes first."""
    return all(beat.version < 0 for beat in live) and worker == min((beat.worker for beat in live), default="")


class WaitingRoom:
    """Answers `no_model` where nobody can do better, until it is cancelled.

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
        refuse: Callable[[list[Any]], Awaitable[None]],
    ) -> None:
        self._kafka, self._names, self._group, self._worker = kafka, names, group, worker
        self._partitions, self._patience_ms, self._refuse = partitions, patience_ms, refuse
        self._consumer: Any = None
        self._held: dict[TopicPartition, list[tuple[int, Any]]] = {}  # requests with when they are due, in the order of the log

    async def run(self) -> None:
        """Hold requests and answer those that are due. What Kafka has against it is logged, and tried again."""
        while True:
            try:
                async with HeartbeatReader(self._kafka, self._names) as scorers:
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
        if self._consumer is None:
            await self._enter()
        if sum(map(len, self._held.values())) < MAX_HELD:
            fetched = await self._consumer.getmany(timeout_ms=POLL_MS, max_records=MAX_HELD)
            now_ms = _now_ms()
            for place, records in fetched.items():
                self._held[place] += [(due_ms(record, now_ms, self._patience_ms), record) for record in records]
        else:
            await asyncio.sleep(POLL_MS / 1000)
        now_ms = _now_ms()
        due = [record for held in self._held.values() for when_ms, record in held if when_ms <= now_ms]
        if due:
            await self._commit()  # rejected where a scorer with a version has come
            await self._refuse(due)
            for held in self._held.values():
                held[:] = [(when_ms, record) for when_ms, record in held if when_ms > now_ms]
            await self._commit()

    async def _enter(self) -> None:
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
        for place in self._held:
            consumer.seek(place, positions[place.partition])
        log.info("no scorer has a version: requests wait for one, at most %d ms", self._patience_ms)

    async def _leave(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            with contextlib.suppress(KafkaError):
                await consumer.stop()

    async def _commit(self) -> None:
        """Everything before the first request held is answered."""
        offsets = {}
        for place, held in self._held.items():
            offsets[place] = held[0][1].offset if held else await self._consumer.position(place)
        await self._consumer.commit(offsets)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
