"""The scorer worker: answers runs of requests, at least once.

A scorer joins its group only once it has a version: until then it takes no request from scorers that could score it
(`stream.scorer.waiting` says what becomes of requests while no scorer has a version).

A position is committed only when the answers to everything before it are acknowledged (`stream.scorer.answering`). So after a
crash some requests are answered twice, and none is left out.
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
from typing import NamedTuple

import torch
from aiokafka.errors import KafkaError
from faust.types import TP

from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.errors import NoAnswer
from stream.kafka.cluster import Cluster, describe_cluster
from stream.kafka.transport import Run
from stream.registry.follower import RegistryFollower
from stream.registry.heartbeat import HeartbeatSender
from stream.scorer.answering import Answering
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.outbox import Outbox
from stream.scorer.serving import Served, load_version
from stream.scorer.start import committed_positions
from stream.scorer.swap import Swapper
from stream.scorer.waiting import WaitingRoom
from stream.settings import HttpSettings, KafkaSettings, ScorerSettings
from stream.topics.limits import max_message_bytes
from stream.topics.names import TopicNames
from stream.worker import Part, Worker, guarded, new_prometheus, serve

__all__ = ["ScorerWorker", "run_scorer"]

log = logging.getLogger(__name__)

SESSION_TIMEOUT_MS = 10_000
# How often positions are committed. A crash repeats the answers of at most this long.
COMMIT_S = 0.2
# Longest waits for answers under way. REVOKE_S is well within SESSION_TIMEOUT_MS, since no heartbeat goes to the group while
# partitions are taken away. DRAIN_S is part of the time for draining a worker (stream/worker/lifecycle.py).
REVOKE_S, DRAIN_S = 3.0, 4.0


class _Serving(NamedTuple):
    """What a heartbeat reports."""

    version: int  # -1 for none
    since_ms: int
    registry_offset: int


class ScorerWorker(Worker):
    """One process of the scorer. Must be built inside a running event loop.

    Args:
        stale: whether the registry couldn't be read to its end within the lease.
        max_bytes: largest batch that the topic `scores` takes.
    """

    name = "scorer"

    def __init__(
        self,
        *,
        kafka: KafkaSettings,
        settings: ScorerSettings,
        names: TopicNames,
        cluster: Cluster,
        swapper: Swapper,
        stale: Callable[[], bool],
        outbox: Outbox,
        heartbeats: HeartbeatSender,
        metrics: ScorerMetrics,
        worker_id: str,
        max_bytes: int,
    ) -> None:
        super().__init__(
            kafka,
            cluster,
            group=f"{names.prefix}{settings.group}",
            topics=(names.score_requests,),
            session_timeout_ms=SESSION_TIMEOUT_MS,
            instance_id=settings.instance_id,
            instance_setting="scorer.instance_id",
        )
        self._kafka, self._settings, self._names, self._cluster = kafka, settings, names, cluster
        self._topic = names.score_requests
        self._swapper, self._stale, self._heartbeats, self._metrics = swapper, stale, heartbeats, metrics
        self._worker_id = worker_id
        self._answering = Answering(
            swapper,
            outbox,
            metrics,
            worker_id=worker_id,
            stale=stale,
            max_candidates=settings.max_candidates,
            max_bytes=max_bytes,
        )
        self._committed: dict[int, int] = {}

    async def start(self) -> None:
        await super().start()
        answering = self._answering
        self.background(answering.score_all(), answering.send_all(), self._commit_regularly(), self._send_heartbeats())

    async def before_joining(self) -> None:
        """Wait for a version to answer with."""
        # A version that loads quickly needs no waiting room, which would be closed as soon as it is open.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.no_model_after_ms / 1000):
                await self._swapper.first_load_ended()
        if not self._swapper.has_version.is_set():
            room = WaitingRoom(
                self._kafka,
                self._names,
                group=self.group,
                partitions=self._cluster.partitions[self._topic],
                worker=self._worker_id,
                patience_ms=self._settings.no_model_after_ms,
                refuse=self._answering.answer,  # without a version every answer is `no_model`
            )
            waiting = guarded(room.run(), self.name)
            try:
                await self._swapper.has_version.wait()
            finally:
                waiting.cancel()
                await asyncio.wait([waiting])
        # A full collection looks at every object of torch, Arrow and Faust: 130 ms in which no request is answered.
        gc.collect()
        gc.freeze()

    # Runs and positions

    def next_offset(self, tp: TP) -> int | None:
        return self._answering.expected(tp.partition)

    async def deliver(self, run: Run) -> None:
        missing_from = await self._answering.put(run)
        if missing_from is not None:
            await self.app.consumer.seek_runs({TP(run.topic, run.partition): missing_from})

    async def revoked(self) -> None:
        """Wait for the answers under way while the partitions are still ours. What waits is left to the next owner."""
        self._answering.drop_waiting()
        await self._answering.all_answered(REVOKE_S)
        await self._commit()

    async def assigned(self) -> None:
        ours = sorted(tp.partition for tp in self.app.consumer.assignment() if tp.topic == self._topic)
        positions = await committed_positions(self._kafka, self.group, self._topic, ours)
        self._answering.assign(positions)
        self._committed = dict(positions)
        log.info("answering partitions %s from %s", ours, positions)

    async def _commit_regularly(self) -> None:
        while True:
            await asyncio.sleep(COMMIT_S)
            if self.waiting_for is None:
                await self._commit()

    async def _commit(self) -> None:
        answered = self._answering.answered
        due = {number: offset for number, offset in answered.items() if self._committed.get(number) != offset}
        if due and await self.app.consumer.commit_run({TP(self._topic, number): offset for number, offset in due.items()}):
            self._committed.update(due)

    # Heartbeats

    async def _send_heartbeats(self) -> None:
        """Report the version that answers, when it changes and every `heartbeat_ms`.

        A change is reported only after the answers of the version before are acknowledged. Whoever reads that a version answers
        can rely on no answer of another version coming after that.
        """
        swapper, interval_s = self._swapper, self._settings.heartbeat_ms / 1000
        reported = _Serving(-1, 0, 0)
        while True:
            swapper.changed.clear()
            version = -1 if swapper.current is None else swapper.current.version
            now = _Serving(version, swapper.since_ms, swapper.applied)
            if now.since_ms == reported.since_ms or await self._answering.begun_answered(interval_s):
                # Never a new registry offset beside an old version: a rollback would count it as confirmed.
                reported = now
            try:
                of, reason = swapper.fallback or (None, "")
                await self._heartbeats.send(*reported, stale=self._stale(), fallback_of=of, fallback_reason=reason)
            except (KafkaError, NoAnswer) as error:
                log.warning("a heartbeat was not sent: %r", error)
            for number, lag in self.lags(self._topic, self._answering.answered):
                self._metrics.lag.labels(str(number)).set(lag)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await swapper.changed.wait()

    # Readiness, progress, shutdown

    def ready(self) -> str | None:
        if self._swapper.current is None:
            fallback = self._swapper.fallback
            return "no champion yet" if fallback is None else f"version {fallback.of}, the champion: {fallback.reason}"
        return super().ready()

    def work(self) -> Iterable[Part]:
        """Partitions, by the positions whose answers are acknowledged."""
        return self.source_parts(self._topic, self._answering.answered)

    async def drain(self) -> None:
        """Answer what was taken, and commit."""
        if self.waiting_for is None:
            self.waiting_for = "stopping"
            self._answering.close_intake()
            await self._answering.all_answered(DRAIN_S)
            await self._commit()


async def run_scorer(
    *,
    kafka: KafkaSettings,
    settings: ScorerSettings,
    names: TopicNames,
    http: HttpSettings,
    snapshots: SnapshotSettings,
) -> None:
    """Run a scorer until it gets a signal to stop. Features and model come from the version served, not from the settings.

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
    prometheus = new_prometheus()
    metrics = ScorerMetrics(prometheus)
    store = SnapshotStore(snapshots)
    reader = RegistryFollower(kafka, names, on_change=lambda state: swapper.want(state, reader.position))

    def load(version: int) -> Served:
        return load_version(store, version, device=settings.device, announced=reader.state.versions.get(version))

    swapper = Swapper(load, metrics, keep=snapshots.keep_ready)

    def registry_age_s() -> float:
        return float("inf") if reader.caught_up_at is None else time.monotonic() - reader.caught_up_at

    metrics.watch_registry(registry_age_s)
    outbox = Outbox(kafka, cluster.partitions, scores=names.scores, dead_letters=names.dead_letters)
    heartbeats = HeartbeatSender(kafka, names, worker=worker_id, heartbeat_ms=settings.heartbeat_ms)
    async with contextlib.AsyncExitStack() as stack:
        for start, close in ((outbox.start, outbox.close), (reader.start, reader.close), (heartbeats.start, heartbeats.close)):
            stack.push_async_callback(_closed_whatever_happens, close)
            await start()
        stack.push_async_callback(swapper.close)
        worker = ScorerWorker(
            kafka=kafka,
            settings=settings,
            names=names,
            cluster=cluster,
            swapper=swapper,
            stale=lambda: registry_age_s() > settings.lease_ms / 1000,
            outbox=outbox,
            heartbeats=heartbeats,
            metrics=metrics,
            worker_id=worker_id,
            max_bytes=await max_message_bytes(kafka, names.scores),
        )
        await serve(worker, http=http, prometheus=prometheus)


async def _closed_whatever_happens(close: Callable[[], Awaitable[None]]) -> None:
    """Close a client, and only log an error of the brokers: everything that matters is acknowledged by now."""
    try:
        await close()
    except (KafkaError, NoAnswer) as error:
        log.warning("closing a client: %r", error)
