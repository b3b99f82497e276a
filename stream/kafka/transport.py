"""The run transport: Faust delivers one event for each fetched run of a partition, instead of one event for each record.

Between fetch and agent Faust takes some 70 µs for an event (a scheduler, a message object, four tasks, a lock, a decode, a
queue, sensors, an ack). With one event a run, this is paid once for thousands of records. Group membership, rebalances, agents
and supervision are still Faust's.

A `Run` also carries what exactly-once processing needs and records alone don't show:

- the fetch position before and after it, since transaction markers, aborted records and retention leave gaps between offsets;
- the end of the log at the time of the fetch.

Positions belong to the application: Faust commits nothing here, and every start or restart of the flow seeks to the offsets
that the application returns from `RunApp.next_offset`.

This module uses private methods of faust-streaming 0.15.3 and aiokafka 0.14.0, which are pinned exactly.
`tests/stream/kafka/test_transport_contract.py` checks every one of them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import faust
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import NoOffsetForPartitionError
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage, EventT
from faust.types.transports import SchedulingStrategyT

from stream.kafka.fetched import LogRecord
from stream.kafka.read_log import FETCHER_LOOK_MS

__all__ = ["FETCH_MAX_WAIT_MS", "LogEnd", "Run", "RunApp", "RunSchema"]

# How long a broker holds back an empty fetch, unless the worker says otherwise. It limits the age of `LogEnd.seen_at_ms` on a
# quiet partition, and so how soon a source can be seen to be idle. Faust's own 1,500 ms would dominate `idle_timeout_ms`.
FETCH_MAX_WAIT_MS = 250
# Limit for one fetch of one partition: some 6,000 records of 700 bytes. Larger runs add latency and memory, but no speed
# (measured).
FETCH_MAX_BYTES = 4 * 1024 * 1024
# Limit for one fetch of all partitions. aiokafka keeps a fetch until all of it is taken.
FETCH_TOTAL_BYTES = 16 * 1024 * 1024
# Limit for all runs that were delivered and still exist: in Faust's queue, in the application's, and in progress. One more
# fetch may exceed it. It is a second of work for a join that does 60 MB/s, so the join never waits for records.
RUNS_MAX_BYTES = 64 * 1024 * 1024
# While there are too many runs: how often to look whether some were released, and after how long without a release to deliver
# the next fetch all the same. A partition that keeps a run until its next one comes must not wait for ever.
RUNS_WAIT_S, RUNS_PATIENCE_S = 0.02, 1.0
# Memory of a record without its key and value: the named tuple, its numbers, and two `bytes` headers.
RECORD_BYTES = 300
# Longest time from an assignment to the seek. A takeover lies between them, which may rebuild for as long as it needs. A
# partition that is never sought gets no records, which the watchdog notices.
SEEK_PATIENCE_S = 86_400.0
# Limit for a commit, which is one round trip. While partitions are revoked it must end within the session timeout (10 s).
COMMIT_S = 3.0


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive records of one partition.

    `records` may be empty, when the position moved over transaction markers or aborted records only.
    """

    topic: str
    partition: int
    before: int  # fetch position before the first record
    after: int  # fetch position after the last one
    records: list[LogRecord]
    held: _Held | None = None  # counts the run's bytes for as long as the run exists


class RunBytes:
    """Counts the bytes of the runs that exist. Adds in the consumer's thread, subtracts where a run's last reference ends."""

    def __init__(self) -> None:
        self._taken, self._moved_at = 0, time.monotonic()
        # A deque needs no lock. That matters because a run may end in the middle of anything, also in the garbage collector.
        self._let_go: deque[int] = deque()

    def have_room(self) -> bool:
        """Whether another fetch may be delivered."""
        before, alive = self._taken, self.alive
        if alive != before:
            self._moved_at = time.monotonic()
        return alive < RUNS_MAX_BYTES or time.monotonic() - self._moved_at > RUNS_PATIENCE_S

    def take(self, records: list[LogRecord]) -> _Held:
        size = sum(len(record.value or b"") + len(record.key or b"") for record in records) + RECORD_BYTES * len(records)
        self._taken, self._moved_at = self._taken + size, time.monotonic()
        return _Held(self._let_go, size)

    @property
    def alive(self) -> int:
        while self._let_go:
            self._taken -= self._let_go.popleft()
        return self._taken


class _Held:
    __slots__ = ("_let_go", "_size")

    def __init__(self, let_go: deque[int], size: int) -> None:
        self._let_go, self._size = let_go, size

    def __del__(self) -> None:
        self._let_go.append(self._size)


@dataclass(frozen=True, slots=True)
class LogEnd:
    """The end of a partition's log at the last fetch, and when the broker answered that fetch."""

    offset: int  # the last stable offset: nothing beyond it can be read
    seen_at_ms: int  # by this machine's wall clock
    highwater: int  # larger than `offset` while a transaction is open


class RunSchema(faust.Schema):
    """Passes runs on without decoding."""

    def compile(self, app: faust.App, **kwargs: object) -> Callable[..., Awaitable[EventT]]:
        create_event = app.create_event

        async def decode(message: ConsumerMessage, *, propagate: bool = False) -> EventT:
            return create_event(None, message.value, None, message)

        return decode


class _RunScheduler(SchedulingStrategyT):
    """Yields whole runs, in the order in which they were fetched."""

    @classmethod
    def map_from_records(cls, records: Mapping[TP, Run]) -> Mapping[TP, Run]:
        return records

    def iterate(self, records: Mapping[TP, Run]) -> Iterator[tuple[TP, Run]]:
        return iter(records.items())

    def records_iterator(self, index: Mapping[TP, Run]) -> Iterator[tuple[TP, Run]]:
        return self.iterate(index)


class _ConsumerThread(driver.AIOKafkaConsumerThread):
    """Fetches runs, in Faust's consumer thread, so that heartbeats continue while the application is busy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Next offset to deliver, by partition. Only `_seek_runs` and `_fetch_records` change it, both in this thread.
        self._next: dict[TP, int] = {}
        self._unsought_since: float | None = None
        self.run_bytes = RunBytes()

    def _create_worker_consumer(self, transport: driver.Transport) -> AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        # Outside its own exactly-once mode, Faust reads uncommitted records and waits 1.5 s on a quiet partition.
        consumer._isolation_level = "read_committed"
        consumer._fetch_max_wait_ms = self.app.fetch_max_wait_ms
        consumer._consumer_timeout = FETCHER_LOOK_MS / 1_000
        consumer._max_partition_fetch_bytes = FETCH_MAX_BYTES
        consumer._fetch_max_bytes = FETCH_TOTAL_BYTES
        return consumer

    async def _fetch_records(
        self,
        consumer: AIOKafkaConsumer,
        active_partitions: set[TP],
        timeout: float | None = None,
        max_records: int | None = None,
    ) -> dict[TP, Run]:
        # A copy, because Faust's own set changes when the application pauses a partition meanwhile. A run that was fetched but
        # is not delivered would be missing until something else is fetched.
        wanted = set(active_partitions)
        if not wanted:
            return {}  # the last partition was paused since Faust looked; to aiokafka, no partition means all partitions
        if not self.run_bytes.have_room():
            await asyncio.sleep(RUNS_WAIT_S)
            return {}
        try:
            fetched = await super()._fetch_records(consumer, wanted, timeout, max_records)
        except NoOffsetForPartitionError:
            # The fetcher uses an assignment whose partitions haven't been sought yet, and the group has committed nothing.
            now = time.monotonic()
            if self._unsought_since is None:
                self._unsought_since = now
            if now - self._unsought_since > SEEK_PATIENCE_S:
                raise
            await asyncio.sleep(RUNS_WAIT_S)
            return {}
        self._unsought_since = None
        assignment = consumer._subscription.subscription.assignment
        runs: dict[TP, Run] = {}
        if assignment is None or not assignment.active:
            return runs
        for tp in wanted:
            state = assignment.state_value(tp)
            before = self._next.get(tp)
            if state is None or before is None or not state.has_valid_position:
                continue
            after = state.position
            if after > before:
                self._next[tp] = after
                records = fetched.get(tp, [])
                runs[tp] = Run(tp.topic, tp.partition, before, after, records, self.run_bytes.take(records))
        return runs

    async def seek_runs(self, offsets: Mapping[TP, int]) -> None:
        """Seek in the consumer's thread, which drops in the same step what was fetched before."""
        await self.call_thread(self._seek_runs, dict(offsets))

    async def _seek_runs(self, offsets: dict[TP, int]) -> None:
        consumer = self._ensure_consumer()
        assigned = consumer.assignment()
        for tp, offset in offsets.items():
            if driver.TopicPartition(tp.topic, tp.partition) in assigned:
                consumer.seek(driver.TopicPartition(tp.topic, tp.partition), offset)
                self._next[tp] = offset

    def member_id(self) -> str | None:
        coordinator = self._ensure_consumer()._coordinator
        return None if coordinator is None else str(coordinator.member_id)

    def log_end(self, tp: TP) -> LogEnd | None:
        assignment = self._ensure_consumer()._subscription.subscription
        assignment = assignment and assignment.assignment
        state = assignment.state_value(tp) if assignment and assignment.active else None
        if state is None or state.timestamp is None:
            return None
        end = state.highwater if state.lso is None else state.lso
        return None if end is None else LogEnd(end, state.timestamp, state.highwater)


class _Consumer(driver.Consumer):
    """Delivers runs, and seeks to the application's positions."""

    _thread: _ConsumerThread

    def _new_consumer_thread(self) -> _ConsumerThread:
        return _ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    def _to_message(self, tp: TP, run: Run) -> ConsumerMessage:
        # The offset is that of the last position in the run. Faust uses it only to drop what it has delivered before.
        return ConsumerMessage(
            run.topic,
            run.partition,
            run.after - 1,
            time.time(),
            0,
            None,
            None,
            run,
            None,
            0,
            0,
            tp,
            generation_id=self.app.consumer_generation_id,
        )

    async def _wait_next_records(self, timeout: float) -> tuple[dict[TP, Run] | None, set[TP] | None]:
        """Deliver what was fetched also for partitions that were paused meanwhile: `getmany` would drop it."""
        runs, active = await super()._wait_next_records(timeout)
        return runs, None if active is None else {*active, *(runs or ())}

    def on_buffer_drop(self, tp: TP) -> None:
        """Faust's queue has room again: fetch the partition, unless the application has paused it meanwhile."""
        if tp in self._paused_partitions:
            self._buffered_partitions.discard(tp)
        else:
            super().on_buffer_drop(tp)

    async def perform_seek(self) -> None:
        """Seek every assigned partition to the offset that the application wants next, not to the committed offset."""
        await self.seek_runs({tp: self.app.next_offset(tp) for tp in self.assignment()})

    async def seek_runs(self, offsets: Mapping[TP, int | None]) -> None:
        known = {tp: offset for tp, offset in offsets.items() if offset is not None}
        await self._thread.seek_runs(known)
        for tp in known:
            self._read_offset[tp] = None

    def log_end(self, tp: TP) -> LogEnd | None:
        """The end of a partition's log at the last fetch; None before the first."""
        return self._thread.log_end(tp)

    def member_id(self) -> str | None:
        """The id by which the group knows this member; empty where the group has said that it doesn't know the member."""
        return self._thread.member_id()

    async def commit_run(self, offsets: Mapping[TP, int]) -> bool:
        """Commit positions as a member of the group, for the worker whose progress is the group's offsets (the scorer).

        Returns:
            False when the coordinator rejected them, or didn't answer in time.
        """
        committing = asyncio.ensure_future(self._thread.commit(dict(offsets)))
        # It isn't cancelled when it takes too long: it may still succeed, and a later commit includes its offsets.
        done, _ = await asyncio.wait([committing], timeout=COMMIT_S)
        return bool(done and committing.result())


class _Transport(driver.Transport):
    Consumer = _Consumer


class RunApp(faust.App):
    """A Faust app whose topics deliver `Run`s.

    Args:
        next_offset: returns the next offset wanted of an assigned partition; None leaves its position alone.
        fetch_max_wait_ms: how long a broker holds back an empty fetch.
    """

    def __init__(
        self,
        *args: Any,
        next_offset: Callable[[TP], int | None],
        fetch_max_wait_ms: int = FETCH_MAX_WAIT_MS,
        **options: Any,
    ) -> None:
        options.setdefault("ConsumerScheduler", _RunScheduler)
        super().__init__(*args, **options)
        self.next_offset, self.fetch_max_wait_ms = next_offset, fetch_max_wait_ms

    def _create_directories(self) -> None:
        """Create no folders: Faust's are for tables, and there are none."""

    def _new_transport(self) -> _Transport:
        return _Transport(self.conf.broker_consumer, self)
