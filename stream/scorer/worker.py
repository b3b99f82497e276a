"""The scorer worker: a Faust app that answers runs of requests, at least once.

Runs that wait are scored together in one forward pass, in a thread. While answers are on their way to the broker the next runs
are scored; the position of a run is committed only when its answers are acknowledged, in order. A crash in between means that
some requests are answered twice, never that one isn't.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.structs import TopicPartition
from faust.types import TP

from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.batches import BATCH_BYTES, Outgoing, send_batches
from stream.clients import aiokafka_options
from stream.cluster import Cluster, describe_cluster
from stream.heartbeat import HeartbeatSender
from stream.runtime import Watchdog, build_app, fatal, new_registry, serve
from stream.scorer.answers import Answers, answer_requests
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.serving import Ready
from stream.scorer.swap import Swapper
from stream.settings import HttpSettings, KafkaSettings, ScorerSettings
from stream.topics import TopicNames
from stream.transport import Run, RunSchema

__all__ = ["ScorerWorker", "run_scorer"]

log = logging.getLogger(__name__)

SESSION_TIMEOUT_MS = 10_000
COMMIT_S = 0.2  # a crash repeats the answers of at most this long
MAX_IN_FLIGHT = 32  # batches whose answers are not acknowledged: a bound on memory, far above what latency needs
MAX_BATCH_REQUESTS = 2_000  # in one forward pass; at 50 candidates each some 0.2 s of work on two cores


class ScorerWorker:
    """One process of the scorer. Must be built inside a running event loop."""

    def __init__(
        self,
        *,
        kafka: KafkaSettings,
        settings: ScorerSettings,
        names: TopicNames,
        cluster: Cluster,
        swapper: Swapper,
        producer: Any,
        heartbeats: HeartbeatSender,
        metrics: ScorerMetrics,
        worker_id: str,
    ) -> None:
        self._kafka, self._settings, self._names = kafka, settings, names
        self._swapper, self._producer, self._heartbeats, self._metrics = swapper, producer, heartbeats, metrics
        self._worker_id = worker_id
        self._group = f"{names.prefix}{settings.group}"
        self._partitions = {topic: list(range(cluster.partitions[topic])) for topic in (names.scores, names.dead_letters)}
        self._place = DefaultPartitioner()
        self._positioned = False
        self._accepted: dict[int, int] = {}
        self._acked: dict[int, int] = {}
        self._committed: dict[int, int] = {}
        self._queue: asyncio.Queue[Run] = asyncio.Queue(maxsize=16)
        self._in_flight: deque[asyncio.Task[None]] = deque()
        self._answering = asyncio.Lock()
        self._tasks: list[asyncio.Task[Any]] = []
        self.batches = 0
        self.app = build_app(
            self._group,
            kafka,
            next_offset=lambda tp: self._accepted.get(tp.partition),
            session_timeout_ms=SESSION_TIMEOUT_MS,
        )
        # acks are off: a position is committed here, when the answers are acknowledged.
        topic = self.app.topic(names.score_requests, schema=RunSchema(), acks=False, maxsize=4)
        self.app.agent(topic, name="scorer")(self._consume)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_rebalance_complete.connect(self._on_rebalance_complete)

    def start(self) -> None:
        """Start the background tasks; `serve` starts the app."""
        self._tasks = [asyncio.ensure_future(task) for task in (self._answer(), self._commit_now_and_then(), self._beat())]
        for task in self._tasks:
            task.add_done_callback(_ended)
        self._swapper.watch(_ended)

    # Taking runs

    async def _consume(self, stream: Any) -> None:
        try:
            async for run in stream:
                await self._deliver(run)
        except Exception as error:  # an exception that leaves an agent would count as handled
            fatal("scorer agent", error)

    async def _deliver(self, run: Run) -> None:
        expected = self._accepted.get(run.partition)
        if not self._positioned or expected is None:
            return  # fetched before a rebalance
        if run.before != expected:
            await self.app.consumer.seek_runs({TP(run.topic, run.partition): expected})
            return
        self._accepted[run.partition] = run.after
        self._metrics.lag.labels(str(run.partition)).set(max(run.end - run.after, 0))
        await self._queue.put(run)

    async def _on_revoked(self, *args: Any, **kwargs: Any) -> None:
        """Answer what was taken, and commit it, while the partitions are still ours."""
        self._positioned = False
        await self._settle()

    async def _settle(self) -> None:
        while not self._queue.empty() or self._in_flight or self._answering.locked():
            if self._in_flight:
                await asyncio.wait({self._in_flight[0]})
            await asyncio.sleep(0.005)
        await self._commit()

    async def _on_rebalance_complete(self, *args: Any, **kwargs: Any) -> None:
        try:
            assigned = {tp.partition for tp in self.app.consumer.assignment() if tp.topic == self._names.score_requests}
            positions = await self._positions(sorted(assigned))
        except Exception as error:
            fatal("scorer positions", error)
        self._accepted, self._acked, self._committed = dict(positions), dict(positions), dict(positions)
        self._positioned = True

    async def _positions(self, numbers: Sequence[int]) -> dict[int, int]:
        """Where each partition goes on: what the group has committed, or the log's start."""
        if not numbers:
            return {}
        parts = [TopicPartition(self._names.score_requests, number) for number in numbers]
        admin = AIOKafkaAdminClient(**aiokafka_options(self._kafka))
        consumer = AIOKafkaConsumer(**aiokafka_options(self._kafka), enable_auto_commit=False)
        await admin.start()
        try:
            await consumer.start()
            offsets = await admin.list_consumer_group_offsets(self._group, partitions=parts)
            starts = await consumer.beginning_offsets(parts)
        finally:
            await consumer.stop()
            await admin.close()
        # A committed offset below the log's start: those requests are gone, and so is who asked.
        return {tp.partition: max(offsets[tp].offset if tp in offsets else -1, starts[tp]) for tp in parts}

    # Answering

    async def _answer(self) -> None:
        while True:
            runs = [await self._queue.get()]
            async with self._answering:
                records = list(runs[0].records)
                while not self._queue.empty() and len(records) < MAX_BATCH_REQUESTS:
                    runs.append(self._queue.get_nowait())
                    records.extend(runs[-1].records)
                answers = await self._score(records) if records else Answers()
                sends = await self._send(answers)
                before = self._in_flight[-1] if self._in_flight else None
                self._in_flight.append(asyncio.ensure_future(self._acknowledge(runs, records, sends, before)))
            while len(self._in_flight) >= MAX_IN_FLIGHT:
                await asyncio.wait({self._in_flight[0]})

    async def _score(self, records: list[Any]) -> Answers:
        served = self._swapper.current  # one version for the whole batch, whatever is swapped meanwhile
        began = time.perf_counter()
        answers = await asyncio.to_thread(
            answer_requests,
            records,
            served,
            worker=self._worker_id,
            max_candidates=self._settings.max_candidates,
            stale=self._swapper.stale,
        )
        metrics = self._metrics
        metrics.forward_seconds.observe(time.perf_counter() - began)
        metrics.batch_candidates.observe(answers.candidates)
        metrics.candidates.inc(answers.candidates)
        metrics.dead_letters.inc(len(answers.dead))
        for outcome, count in answers.outcomes.items():
            metrics.requests.labels(outcome).inc(count)
        if served is not None:
            metrics.snapshot_age.set(max(time.time() - served.created_at_ms / 1000, 0))
        return answers

    async def _send(self, answers: Answers) -> list[asyncio.Future[Any]]:
        names = self._names
        letters: list[Outgoing] = [(letter.key, letter.value, letter.out_headers()) for letter in answers.dead]
        sends: list[asyncio.Future[Any]] = []
        for topic, records in ((names.scores, answers.records), (names.dead_letters, letters)):
            numbers = self._partitions[topic]
            by_partition: dict[int, list[Outgoing]] = defaultdict(list)
            for record in records:
                by_partition[self._place(record[0], numbers, numbers)].append(record)
            for number, part in by_partition.items():
                sends.extend(await send_batches(self._producer, topic, number, part))
        return sends

    async def _acknowledge(
        self, runs: list[Run], records: list[Any], sends: list[asyncio.Future[Any]], before: asyncio.Task[None] | None
    ) -> None:
        """Wait for the answers' acknowledgements and for the batches before, then move the positions."""
        try:
            for send in sends:
                await send
        except KafkaError as error:
            fatal("scorer: answers were not acknowledged", error)
        if before is not None:
            await asyncio.wait({before})
        if records:
            self._metrics.latency_seconds.observe(max(time.time() - records[0].timestamp / 1000, 0))
        for run in runs:
            if self._accepted.get(run.partition, -1) >= run.after:
                self._acked[run.partition] = run.after
        self.batches += 1
        if self._in_flight and self._in_flight[0] is asyncio.current_task():
            self._in_flight.popleft()

    async def _commit_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(COMMIT_S)
            if self._positioned:
                await self._commit()

    async def _commit(self) -> None:
        due = {number: offset for number, offset in self._acked.items() if self._committed.get(number) != offset}
        if due:
            topic = self._names.score_requests
            if await self.app.consumer.commit_run({TP(topic, number): offset for number, offset in due.items()}):
                self._committed.update(due)

    # Saying how it is

    async def _beat(self) -> None:
        while True:
            self._swapper.swapped.clear()
            served = self._swapper.current
            try:
                await self._heartbeats.send(
                    -1 if served is None else served.version,
                    self._swapper.since_ms,
                    self._swapper.registry_offset,
                    stale=self._swapper.stale,
                )
            except KafkaError as error:
                log.warning("a heartbeat did not get through: %s", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._swapper.swapped.wait(), self._settings.heartbeat_ms / 1000)

    def ready(self) -> str | None:
        if not self._positioned:
            return "partitions are being assigned"
        return None if self._swapper.current is not None else "no champion yet"

    def watchdog(self) -> Watchdog:
        def waiting() -> bool:
            if not self._positioned or not self._queue.empty() or self._in_flight:
                return True
            ends = [
                (self.app.consumer.log_end(TP(self._names.score_requests, number)), position)
                for number, position in self._accepted.items()
            ]
            return any(end is not None and end.offset > position for end, position in ends)

        return Watchdog(lambda: (self._positioned, self.batches, list(self._accepted.values())), waiting)

    async def drain(self) -> None:
        """Answer what was taken, commit, leave a tombstone."""
        if self._positioned:
            self._positioned = False
            await self._settle()
        for task in self._tasks:
            task.cancel()
        await self._heartbeats.close()
        await self._swapper.close()
        await self._producer.stop()


def _ended(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        fatal("scorer", error)


async def run_scorer(
    *,
    kafka: KafkaSettings,
    settings: ScorerSettings,
    names: TopicNames,
    http: HttpSettings,
    snapshots: SnapshotSettings,
    leash: bool = False,
) -> None:
    """Run a scorer until it is told to stop. Features and model come from the version served, not from the settings.

    Raises:
        TopicError: topics are missing.
        RegistryError: the registry can't be read.
    """
    topics = (names.score_requests, names.scores, names.snapshots, names.scorers, names.dead_letters)
    cluster = await describe_cluster(kafka, topics)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    registry = new_registry()
    metrics = ScorerMetrics(registry)
    ready = Ready(SnapshotStore(snapshots), keep=snapshots.keep_ready, device=settings.device)
    swapper = Swapper(kafka, names, ready, metrics, lease_ms=settings.lease_ms)
    heartbeats = HeartbeatSender(kafka, names, worker=worker_id)
    producer = AIOKafkaProducer(
        **aiokafka_options(kafka), acks="all", enable_idempotence=True, max_batch_size=BATCH_BYTES, max_request_size=1 << 30
    )
    await producer.start()
    await heartbeats.start()
    await swapper.start()
    worker = ScorerWorker(
        kafka=kafka,
        settings=settings,
        names=names,
        cluster=cluster,
        swapper=swapper,
        producer=producer,
        heartbeats=heartbeats,
        metrics=metrics,
        worker_id=worker_id,
    )
    worker.start()
    await serve(
        worker.app,
        name="scorer",
        http=http,
        registry=registry,
        ready=worker.ready,
        drain=worker.drain,
        watchdog=worker.watchdog(),
        leash=leash,
    )
