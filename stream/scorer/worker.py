"""The scorer worker: a Faust app that answers runs of requests, at least once.

    Faust ── runs ──▶ intake ── batches ──▶ scoring (a thread) ── answers ──▶ outbox ──▶ acknowledged ──▶ committed

A scorer joins its group only once it has a version: until then it takes no request from those that could score it
(`stream.scorer.waiting` says what becomes of requests while nobody has one).

Requests that wait are scored together in one forward pass. While answers are on their way to the brokers the next requests are
scored. A position is committed only when everything before it is acknowledged, so a crash means that some requests are
answered twice, never that one isn't.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from aiokafka.errors import KafkaError
from faust.types import TP

from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.errors import NoAnswer, Replaced
from stream.kafka.cluster import ClusterWatch, describe_cluster
from stream.kafka.transport import Run, RunSchema
from stream.records.record import Record
from stream.registry.follower import RegistryReader
from stream.registry.heartbeat import HeartbeatSender
from stream.scorer.answers import Answers, answer_requests
from stream.scorer.intake import MAX_REQUESTS, Batch, Intake
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.outbox import Outbox
from stream.scorer.serving import Served, load_version
from stream.scorer.start import committed_positions
from stream.scorer.swap import Swapper
from stream.scorer.waiting import WaitingRoom
from stream.settings import HttpSettings, KafkaSettings, ScorerSettings
from stream.topics.limits import max_message_bytes
from stream.topics.names import TopicNames
from stream.worker.membership import Membership
from stream.worker.runtime import build_app, fatal, new_registry, serve, source_part
from stream.worker.watchdog import Part

__all__ = ["ScorerWorker", "run_scorer"]

log = logging.getLogger(__name__)

SESSION_TIMEOUT_MS = 10_000
# A crash repeats the answers of at most this long.
COMMIT_S = 0.2
# Batches scored whose answers are not sent yet: enough that scoring never waits for a round trip.
SCORED_WAITING = 4
# Longest wait for answers under way: while partitions are taken away no heartbeat goes to the group (SESSION_TIMEOUT_MS);
# at the end all has to fit into the supervisor's patience (stream/worker/runtime.py).
REVOKE_S, DRAIN_S = 3.0, 4.0


class ScorerWorker:
    """One process of the scorer. Must be built inside a running event loop.

    Args:
        stale: whether the registry couldn't be read to its end within the lease.
        max_bytes: largest batch that the topic `scores` takes.
    """

    def __init__(
        self,
        *,
        kafka: KafkaSettings,
        settings: ScorerSettings,
        names: TopicNames,
        swapper: Swapper,
        stale: Callable[[], bool],
        outbox: Outbox,
        heartbeats: HeartbeatSender,
        metrics: ScorerMetrics,
        worker_id: str,
        max_bytes: int,
        watch: ClusterWatch,
    ) -> None:
        self._watch = watch
        self._kafka, self._settings, self._names, self._topic = kafka, settings, names, names.score_requests
        self._swapper, self._stale, self._outbox, self._heartbeats = swapper, stale, outbox, heartbeats
        self._metrics, self._worker_id, self._max_bytes = metrics, worker_id, max_bytes
        self._group = f"{names.prefix}{settings.group}"
        self._standing = "joining the group"
        self._joins = False
        self._intake = Intake()
        self._arrived, self._room, self._done = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._scored: asyncio.Queue[tuple[Batch, Answers]] = asyncio.Queue(SCORED_WAITING)
        self._thread = ThreadPoolExecutor(1, "scoring")
        self._under_way = 0  # batches taken from the intake whose answers are not acknowledged
        self._answered: dict[int, int] = {}
        self._committed: dict[int, int] = {}
        self._batches = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.app = build_app(
            self._group,
            kafka,
            next_offset=lambda tp: self._intake.expected.get(tp.partition),
            session_timeout_ms=SESSION_TIMEOUT_MS,
            instance_id=settings.instance_id,
        )
        self._membership = Membership(self.app, kafka, self._group, settings.instance_id, setting="scorer.instance_id")
        # Acks are off since a position is committed here, when the answers are acknowledged.
        runs = self.app.topic(self._topic, schema=RunSchema(), acks=False)
        self.app.agent(runs, name="scorer")(self._consume)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_rebalance_complete.connect(self._on_rebalance_complete)

    def start(self) -> None:
        """Start the background tasks; `serve` starts the app."""
        for work in (self._score_all(), self._send_all(), self._commit_now_and_then(), self._beat()):
            task = asyncio.ensure_future(work)
            task.add_done_callback(_ended)
            self._tasks.append(task)

    async def wait_for_a_version(self, request_partitions: int) -> None:
        """Return when there is a version to answer with; `serve` then starts the app, which joins the group."""
        room = WaitingRoom(
            self._kafka,
            self._names,
            group=self._group,
            partitions=request_partitions,
            worker=self._worker_id,
            patience_ms=self._settings.no_model_after_ms,
            refuse=self._refuse,
        )
        # Where a version is there and quick to load, the room would only open to be closed again.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.no_model_after_ms / 1000):
                await self._swapper.first_load_ended()
        if not self._swapper.has_version.is_set():
            waiting = asyncio.ensure_future(room.run())
            waiting.add_done_callback(_ended)
            try:
                await self._swapper.has_version.wait()
            finally:
                waiting.cancel()
                await asyncio.wait([waiting])
        # A full collection looks at every object of torch, Arrow and Faust: 130 ms in which nobody is answered.
        gc.collect()
        gc.freeze()
        self._joins = True

    async def _refuse(self, records: list[Record]) -> None:
        """Answer `no_model`."""
        for start in range(0, len(records), MAX_REQUESTS):
            part = records[start : start + MAX_REQUESTS]
            for future in await self._outbox.send(await self._score(part)):
                await future
            self._metrics.acknowledged(part)

    # Positions

    async def _on_revoked(self, *args: Any, **kwargs: Any) -> None:
        """See the answers under way through while the partitions are still ours. What waits is left to the next owner."""
        self._standing = "partitions are being assigned"
        self._intake.drop()
        await self._finish(REVOKE_S)
        if (put_out := await self._membership.check()) is not None:
            self._standing = put_out
            await self._membership.wait_put_out()
            fatal("scorer", Replaced(put_out))

    async def _on_rebalance_complete(self, *args: Any, **kwargs: Any) -> None:
        try:
            ours = sorted(tp.partition for tp in self.app.consumer.assignment() if tp.topic == self._topic)
            positions = await committed_positions(self._kafka, self._group, self._topic, ours)
        except Exception as error:
            fatal("scorer: finding where to go on", error)
        self._intake.assign(positions)
        self._answered, self._committed = dict(positions), dict(positions)
        self._standing = ""
        self._membership.joined = True
        log.info("answering partitions %s from %s", ours, positions)

    async def _finish(self, timeout_s: float) -> None:
        """Wait until nothing waits or is under way, at most so long, and commit."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._under_way or not self._intake.empty:
                    self._done.clear()
                    await self._done.wait()
        await self._commit()

    async def _commit_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(COMMIT_S)
            if not self._standing:
                await self._commit()

    async def _commit(self) -> None:
        due = {number: offset for number, offset in self._answered.items() if self._committed.get(number) != offset}
        if due and await self.app.consumer.commit_run({TP(self._topic, number): offset for number, offset in due.items()}):
            self._committed.update(due)

    # Answering

    async def _consume(self, stream: Any) -> None:
        try:
            async for run in stream:
                await self._deliver(run)
        except Exception as error:  # an exception that leaves an agent would count as handled
            fatal("scorer agent", error)

    async def _deliver(self, run: Run) -> None:
        while self._intake.full:
            self._room.clear()
            await self._room.wait()
        missing_from = self._intake.put(run)
        self._arrived.set()
        if missing_from is not None:
            await self.app.consumer.seek_runs({TP(run.topic, run.partition): missing_from})

    async def _score_all(self) -> None:
        while True:
            batch = self._intake.take()
            if batch is None:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            self._under_way += 1
            self._room.set()
            await self._scored.put((batch, await self._score(batch.records)))

    async def _score(self, records: list[Record]) -> Answers:
        if not records:
            return Answers()
        began = time.perf_counter()
        answer = partial(
            answer_requests,
            records,
            self._swapper.current,  # one version for the whole batch, whatever is swapped meanwhile
            worker=self._worker_id,
            max_candidates=self._settings.max_candidates,
            max_bytes=self._max_bytes,
            stale=self._stale(),
        )
        answers = await asyncio.get_running_loop().run_in_executor(self._thread, answer)
        self._metrics.scored(answers, time.perf_counter() - began)
        return answers

    async def _send_all(self) -> None:
        while True:
            scored = [await self._scored.get()]
            while not self._scored.empty():
                scored.append(self._scored.get_nowait())
            futures = [future for _, answers in scored for future in await self._outbox.send(answers)]
            for future in futures:
                await future
            for batch, _ in scored:
                self._acknowledged(batch)

    def _acknowledged(self, batch: Batch) -> None:
        self._metrics.acknowledged(batch.records)
        if batch.generation == self._intake.generation:
            self._answered.update(batch.positions)
        self._under_way -= 1
        self._batches += 1
        self._done.set()

    # Saying how it is

    async def _beat(self) -> None:
        swapper = self._swapper
        told = (-1, 0, 0)
        while True:
            swapper.changed.clear()
            version = -1 if swapper.current is None else swapper.current.version
            now = (version, swapper.since_ms, swapper.applied)
            if swapper.since_ms == told[1] or await self._earlier_are_out():
                told = now
            try:
                of, reason = swapper.fallback or (None, "")
                await self._heartbeats.send(*told, stale=self._stale(), fallback_of=of, fallback_reason=reason)
            except (KafkaError, NoAnswer) as error:
                log.warning("a heartbeat did not get through: %r", error)
            for number, position in self._answered.items():
                end = self.app.consumer.log_end(TP(self._topic, number))
                if end is not None:
                    self._metrics.lag.labels(str(number)).set(max(end.offset - position, 0))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.heartbeat_ms / 1000):
                    await swapper.changed.wait()

    async def _earlier_are_out(self) -> bool:
        """Wait for the answers to what was begun so far, at most a heartbeat's time.

        Who reads that a version answers may then rely on no answer of another coming after.
        """
        until = self._batches + self._under_way
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.heartbeat_ms / 1000):
                while self._batches < until:
                    self._done.clear()
                    await self._done.wait()
        return self._batches >= until

    def ready(self) -> str | None:
        """None when requests are answered with scores, else what is missing."""
        if self._swapper.current is None:
            fallback = self._swapper.fallback
            return "no champion yet" if fallback is None else f"version {fallback.of}, the champion: {fallback.reason}"
        return self._standing or None

    def parts(self) -> Iterable[Part]:
        """Partitions by the positions whose answers are acknowledged; before that, the way into the group."""
        if self._membership.put_out is not None:
            return
        if not self._joins:
            return
        if self._standing:
            yield Part("the group's assignment", self.app.consumer_generation_id, self._standing)
            return
        for number, position in self._answered.items():
            yield source_part(self.app, self._watch, TP(self._topic, number), position)

    async def drain(self) -> None:
        """Answer what was taken, commit, and end the background tasks."""
        if not self._standing:
            self._standing = "stopping"
            self._intake.expected = {}  # takes no more
            await self._finish(DRAIN_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        fatal("scorer", error)


async def run_scorer(
    *,
    kafka: KafkaSettings,
    settings: ScorerSettings,
    names: TopicNames,
    http: HttpSettings,
    snapshots: SnapshotSettings,
) -> None:
    """Run a scorer until it is told to stop. Features and model come from the version served, not from the settings.

    Raises:
        TopicError: topics are missing.
        RegistryError: the registry can't be read.
        StreamError: Kafka can't be reached.
    """
    topics = (names.score_requests, names.scores, names.snapshots, names.scorers, names.dead_letters)
    cluster = await describe_cluster(kafka, topics)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    worker_id = settings.instance_id or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    registry = new_registry()
    metrics = ScorerMetrics(registry)
    store = SnapshotStore(snapshots)
    reader = RegistryReader(kafka, names, on_change=lambda state: swapper.want(state, reader.position))

    def load(version: int) -> Served:
        return load_version(store, version, device=settings.device, announced=reader.state.versions.get(version))

    swapper = Swapper(load, metrics, keep=snapshots.keep_ready)

    def registry_age_s() -> float:
        return float("inf") if reader.caught_up_at is None else time.monotonic() - reader.caught_up_at

    metrics.watch_registry(registry_age_s)
    watch = ClusterWatch(kafka, cluster, changed=lambda error: fatal("scorer", error))
    outbox = Outbox(kafka, cluster.partitions, scores=names.scores, dead_letters=names.dead_letters)
    heartbeats = HeartbeatSender(kafka, names, worker=worker_id, heartbeat_ms=settings.heartbeat_ms)
    async with contextlib.AsyncExitStack() as stack:
        for start, close in ((outbox.start, outbox.close), (reader.start, reader.close), (heartbeats.start, heartbeats.close)):
            stack.push_async_callback(_quietly, close)
            await start()
        stack.push_async_callback(swapper.close)
        worker = ScorerWorker(
            kafka=kafka,
            settings=settings,
            names=names,
            swapper=swapper,
            stale=lambda: registry_age_s() > settings.lease_ms / 1000,
            outbox=outbox,
            heartbeats=heartbeats,
            metrics=metrics,
            worker_id=worker_id,
            max_bytes=await max_message_bytes(kafka, names.scores),
            watch=watch,
        )
        worker.start()
        first = partial(worker.wait_for_a_version, cluster.partitions[names.score_requests])
        await serve(worker, name="scorer", http=http, registry=registry, first=first, beside=(watch.run,))


async def _quietly(close: Callable[[], Awaitable[None]]) -> None:
    """Close, whatever the brokers say: everything that matters is acknowledged by now."""
    try:
        await close()
    except (KafkaError, NoAnswer) as error:
        log.warning("closing a client: %r", error)
