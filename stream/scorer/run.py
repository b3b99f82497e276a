"""Puts a scorer together and runs it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from aiokafka.errors import KafkaError

from state.background import in_background
from state.chain_versions import point_of
from state.registry import RegistryState, VersionRecord
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from state.tracks import MAIN
from state.version_cache import VersionCache
from stream.errors import NoAnswer
from stream.kafka.cluster import describe_cluster
from stream.records.heartbeat import live_limit
from stream.registry.heartbeat import HeartbeatSender
from stream.scorer.candidate import CandidateKeeper, load_candidate
from stream.scorer.candidate_metrics import CandidateMetrics
from stream.scorer.chain_follower import ChainFollower
from stream.scorer.challenger import Challengers
from stream.scorer.challenger_metrics import ChallengerMetrics
from stream.scorer.delta_log import open_deltas
from stream.scorer.following_metrics import FollowingMetrics
from stream.scorer.freshness import Freshness
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.outbox import Outbox
from stream.scorer.scrub import scrub_regularly
from stream.scorer.serving import Served, load_version
from stream.scorer.standstill import Standstill, limit_s
from stream.scorer.swap import Swapper
from stream.scorer.tracks import ServingView, TrackRegistries
from stream.scorer.worker import ScorerWorker, ServingTrack
from stream.settings import HttpSettings, KafkaSettings, ScorerSettings
from stream.topics.limits import max_message_bytes
from stream.topics.names import TopicNames
from stream.worker import new_prometheus, serve

__all__ = ["run_scorer"]

log = logging.getLogger(__name__)

# How often a scorer learns that the registry has nothing new: so many times in a lease, at least every MAX_LOOK_MS.
LEASE_LOOKS, MAX_LOOK_MS = 5, 2_000


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
    metrics, following_metrics = ScorerMetrics(prometheus), FollowingMetrics(prometheus)
    freshness = Freshness(following_metrics.click_to_answer.observe)
    cache = VersionCache(settings.cache_dir, settings.cache_mb * 1_000_000, on_read=metrics.read_file)
    stores: dict[str, SnapshotStore] = {}

    def store_of(track: str) -> SnapshotStore:
        if track not in stores:
            its = snapshots.on_track(track)
            store = SnapshotStore(its)
            stores[track] = SnapshotStore(its, cache=cache) if not store.is_local and settings.cache_mb else store
        return stores[track]

    scoring = ThreadPoolExecutor(1, "scoring")
    spare_bytes = settings.spare_mb * 1_000_000

    def load(version: int) -> Served:
        store, announced = store_of(tracks.track_of(version)), tracks.view.state.versions.get(version)
        return load_version(store, version, device=settings.device, announced=announced)

    def load_record(record: VersionRecord) -> Served:
        def load() -> Served:
            store = store_of(tracks.track_of(record.version))
            return load_version(store, record.version, device=settings.device, announced=record)

        return in_background(load) if swapper.is_serving else load()

    async def alone(work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(scoring, work)

    swapper = Swapper(
        load, metrics, keep=snapshots.keep_ready, spare_bytes=spare_bytes, on_swap=lambda: want_replica(tracks.view.state)
    )
    follower = ChainFollower(
        load_record,
        lambda offset: open_deltas(kafka, tracks.names_of(tracks.view.track), offset),
        alone,
        swapper,
        following_metrics,
        freshness,
        jitter_s=settings.heal_jitter_ms / 1_000,
        cached=lambda record: store_of(tracks.track_of(record.version)).has(record),
    )

    def read_candidate(record: VersionRecord) -> Served:
        store, taken = store_of(tracks.track_of(record.version)), swapper.beside_bytes() + replica_aside() + challengers.size
        return in_background(
            lambda: load_candidate(store, record, device=settings.device, spare_bytes=spare_bytes, taken_bytes=taken)
        )

    def replica_aside() -> int:
        """Bytes of the replica while it doesn't answer."""
        replica = None if follower.replica is None else follower.replica.served
        return 0 if replica is None or replica is swapper.current else replica.size

    def candidate_changed() -> None:
        swapper.reserved_bytes = candidate.size + challengers.size
        swapper.changed.set()

    candidate = CandidateKeeper(read_candidate, CandidateMetrics(prometheus), on_change=candidate_changed)

    challengers = Challengers(
        store_of,
        lambda track, offset: open_deltas(kafka, tracks.names_of(track), offset),
        alone,
        ChallengerMetrics(prometheus),
        device=settings.device,
        room=lambda: spare_bytes - swapper.beside_bytes() - replica_aside() - candidate.size - challengers.size,
        on_change=candidate_changed,
    )

    def follows(state: RegistryState) -> bool:
        return state.champion.follows and snapshots.auto_promote and _has_chain(state)

    def want_replica(state: RegistryState) -> None:
        """A replica is wanted to answer, or aside while a version is pinned, if there is memory for it."""
        weights = swapper.current if follower.replica is None else follower.replica.served
        room = weights is not None and weights.size <= spare_bytes - candidate.size - challengers.size
        aside = room and (_has_chain(state) or follower.replica is not None)
        follower.want(state, follows(state) or aside)

    serving: ServingTrack | None = None

    def on_change(view: ServingView) -> None:
        nonlocal serving
        state, moved = view.state, serving is not None and view.track != serving.track
        serving = ServingTrack(view.track, view.main_position)
        if moved:
            swapper.applied = 0  # an offset of the registry of the track before
            follower.moved(challengers.take(view.track))
        if candidate.trial is not None and candidate.trial.served.version == state.champion.version:
            swapper.offer(candidate.trial.served)
        candidate.want(state)  # before the swapper: a rollback must never be reported as served while a candidate still answers
        swapper.want(state, view.position, follow=follows(state))
        want_replica(state)

    tracks = TrackRegistries(
        kafka,
        names,
        on_change=on_change,
        on_shares=lambda found: challengers.want(found),
        look_ms=min(settings.lease_ms // LEASE_LOOKS, MAX_LOOK_MS),
    )

    def in_memory() -> list[Served]:
        kept = [
            *swapper.in_memory,
            None if follower.replica is None else follower.replica.served,
            None if candidate.trial is None else candidate.trial.served,
            *challengers.in_memory(),
        ]
        return list({id(each): each for each in kept if each is not None}.values())

    def damaged(served: Served) -> None:
        if candidate.trial is not None and candidate.trial.served is served:
            candidate.damaged()
        elif challengers.damaged(served):
            return
        elif served.is_replica:
            follower.damaged()
        else:
            swapper.reload(served)

    def registry_age_s() -> float:
        at = tracks.caught_up_at
        return float("inf") if at is None else time.monotonic() - at

    metrics.watch_registry(registry_age_s)
    outbox = Outbox(kafka, cluster.partitions, scores=names.scores, dead_letters=names.dead_letters)
    heartbeats = HeartbeatSender(kafka, names, worker=worker_id, heartbeat_ms=settings.heartbeat_ms)
    async with contextlib.AsyncExitStack() as stack:
        for start, close in ((outbox.start, outbox.close), (tracks.start, tracks.close), (heartbeats.start, heartbeats.close)):
            stack.push_async_callback(_closed_whatever_happens, close)
            await start()
        stack.push_async_callback(swapper.close)
        stack.push_async_callback(candidate.close)
        stack.push_async_callback(challengers.close)
        worker = ScorerWorker(
            kafka=kafka,
            settings=settings,
            names=names,
            cluster=cluster,
            swapper=swapper,
            candidate=candidate,
            challengers=challengers,
            serving=lambda: serving or ServingTrack(MAIN, 0),
            follower=follower,
            scoring=scoring,
            scrub=lambda: scrub_regularly(in_memory, damaged, following_metrics, scrub_s=settings.scrub_s),
            stale=lambda: registry_age_s() > settings.lease_ms / 1000,
            outbox=outbox,
            heartbeats=heartbeats,
            metrics=metrics,
            freshness=freshness,
            standstill=Standstill(
                tracks.read_to_end,
                limit_s=limit_s(live_limit(settings.heartbeat_ms), settings.heartbeat_ms),
                patience_s=settings.lease_ms / 1_000,
            ),
            worker_id=worker_id,
            max_bytes=await max_message_bytes(kafka, names.scores),
        )
        await serve(worker, http=http, prometheus=prometheus)


def _has_chain(state: RegistryState) -> bool:
    """Whether the champion is a point of a chain that can be followed."""
    record = state.champion_record
    return record is not None and point_of(record) is not None


async def _closed_whatever_happens(close: Callable[[], Awaitable[None]]) -> None:
    """Close a client, and only log an error of the brokers: everything that matters is acknowledged by now."""
    try:
        await close()
    except (KafkaError, NoAnswer) as error:
        log.warning("closing a client: %r", error)
