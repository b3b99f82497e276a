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
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from aiokafka.errors import KafkaError
from faust.types import TP

from state.tracks import MAIN
from stream.errors import NoAnswer
from stream.kafka.cluster import Cluster
from stream.kafka.transport import Run
from stream.registry.heartbeat import HeartbeatSender, Weights
from stream.scorer.answering import Answering
from stream.scorer.candidate import CandidateKeeper
from stream.scorer.chain_follower import ChainFollower
from stream.scorer.challenger import Challengers
from stream.scorer.freshness import Freshness
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.outbox import Outbox
from stream.scorer.serving import WeightsState
from stream.scorer.standstill import Standstill
from stream.scorer.start import committed_positions
from stream.scorer.swap import Swapper
from stream.scorer.waiting import WaitingRoom
from stream.settings import KafkaSettings, ScorerSettings
from stream.topics.names import TopicNames
from stream.worker import Part, Worker, guarded

__all__ = ["ScorerWorker", "ServingTrack"]

log = logging.getLogger(__name__)

SESSION_TIMEOUT_MS = 10_000
# How often positions are committed. A crash repeats the answers of at most this long.
COMMIT_S = 0.2
# Longest waits for answers under way. REVOKE_S is well within SESSION_TIMEOUT_MS, since no heartbeat goes to the group while
# partitions are taken away. DRAIN_S is part of the time for draining a worker (stream/worker/lifecycle.py).
REVOKE_S, DRAIN_S = 3.0, 4.0


class _Serving(NamedTuple):
    """What a heartbeat reports, and confirms."""

    version: int  # -1 for none
    since_ms: int
    registry_offset: int
    candidate: int | None = None
    candidate_since_ms: int = 0
    track: str = MAIN
    main_offset: int = 0


class ServingTrack(NamedTuple):
    """The track that serves, and the offset after the change in the registry of `main` which says so, or later."""

    track: str
    main_offset: int


class ScorerWorker(Worker):
    """One process of the scorer. Must be built inside a running event loop.

    Args:
        serving: gives the track whose registry the swapper has, and the offset in that of `main` which says so.
        scoring: the thread that scores.
        scrub: checks the memory from time to time, until cancelled.
        stale: whether the registry couldn't be read to its end within the lease.
        max_bytes: largest batch that the topic `scores` takes.
    """

    name = "scorer"
    # Nothing here goes by the age of a quiet partition's end. The first fetch after an assignment may be held up for this long.
    fetch_max_wait_ms = 500

    def __init__(
        self,
        *,
        kafka: KafkaSettings,
        settings: ScorerSettings,
        names: TopicNames,
        cluster: Cluster,
        swapper: Swapper,
        candidate: CandidateKeeper,
        challengers: Challengers,
        serving: Callable[[], ServingTrack],
        follower: ChainFollower,
        scoring: ThreadPoolExecutor,
        scrub: Callable[[], Coroutine[Any, Any, None]],
        stale: Callable[[], bool],
        outbox: Outbox,
        heartbeats: HeartbeatSender,
        metrics: ScorerMetrics,
        freshness: Freshness,
        standstill: Standstill,
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
        self._follower, self._scrub, self._candidate = follower, scrub, candidate
        self._worker_id, self._standstill = worker_id, standstill
        self._challengers, self._serving = challengers, serving
        self._answering = Answering(
            swapper,
            candidate,
            challengers,
            outbox,
            metrics,
            freshness,
            standstill,
            scoring=scoring,
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
        self.background(self._follower.run(), self._scrub())

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
            await self._answering.news.wait()
            self._answering.news.clear()
            if self.waiting_for is None:
                await self._commit()
            await asyncio.sleep(COMMIT_S)

    async def _commit(self) -> None:
        answered = self._answering.answered
        due = {number: offset for number, offset in answered.items() if self._committed.get(number) != offset}
        if due and await self.app.consumer.commit_run({TP(self._topic, number): offset for number, offset in due.items()}):
            self._committed.update(due)
        elif due:
            self._answering.news.set()  # they are tried again

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
            state = None if swapper.current is None else swapper.current.state
            trial = self._candidate.trial
            now = _Serving(
                -1 if state is None else state.version,
                swapper.since_ms,
                swapper.applied,
                None if trial is None else trial.served.version,
                self._candidate.since_ms,
                *self._serving(),
            )
            same = (now.since_ms, now.candidate_since_ms) == (reported.since_ms, reported.candidate_since_ms)
            if same or await self._answering.begun_answered(interval_s):
                # Never a new registry offset beside an old version: a rollback would count it as confirmed.
                reported = now
            looked_s = self._standstill.look()
            try:
                of, reason = swapper.fallback or (None, "")
                weights = None if state is None or now != reported else self._weights(state)
                await self._heartbeats.send(
                    *reported[:3],
                    stale=self._stale(),
                    fallback_of=of,
                    fallback_reason=reason,
                    weights=weights,
                    candidate=reported.candidate,
                    candidate_problem=self._candidate.problem,
                    track=reported.track,
                    # Nothing of the track's registry is in effect before its champion answers.
                    main_offset=reported.main_offset if reported.registry_offset else 0,
                    shadows=self._challengers.beats(time.time_ns() // 1_000_000),
                )
                self._standstill.reported(looked_s)
            except (KafkaError, NoAnswer) as error:
                log.warning("a heartbeat was not sent: %r", error)
            for number, lag in self.lags(self._topic, self._answering.answered):
                self._metrics.lag.labels(str(number)).set(lag)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await swapper.changed.wait()

    def _weights(self, state: WeightsState) -> Weights:
        following = self._swapper.is_following
        return Weights(
            following=following,
            chain="" if state.point is None else str(state.point.chain),
            digest="" if state.point is None else f"{state.digest:016x}",
            delta=state.delta,
            age_ms=max(time.time_ns() // 1_000_000 - state.captured_at_ms, 0),
            marks=state.recent,
            problem=self._follower.problem,
        )

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
