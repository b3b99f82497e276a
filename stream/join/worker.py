"""The join worker: a Faust app that owns partition numbers and hands each its runs."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

from aiokafka.structs import TopicPartition
from faust.types import TP
from prometheus_client import CollectorRegistry

from state.join_state import StateOptions
from stream.cluster import Cluster, describe_cluster
from stream.errors import Abandoned, TopicError
from stream.join.metrics import JoinMetrics
from stream.join.partition import PartitionJoin
from stream.join.partition_count import check_partition_count
from stream.join.recovery import RebuildProgress, told
from stream.join.retention import RetentionWatch
from stream.join.takeover import Takeover
from stream.join.terms import NEVER_MS
from stream.offsets import committed_offsets
from stream.runtime import Watchdog, build_app, fatal, new_registry, serve
from stream.settings import HttpSettings, JoinSettings, KafkaSettings
from stream.topics import TopicNames
from stream.transport import LogEnd, Run, RunSchema

__all__ = ["JoinWorker", "run_join"]

log = logging.getLogger(__name__)

# Each opens three connections and holds a fetch in memory.
TAKEOVERS_AT_ONCE = 8


class JoinWorker:
    """One process of the join. Must be built inside a running event loop."""

    def __init__(
        self,
        *,
        kafka: KafkaSettings,
        settings: JoinSettings,
        names: TopicNames,
        cluster: Cluster,
        state_dir: Path,
        registry: CollectorRegistry,
    ) -> None:
        self._settings, self._names, self._cluster = settings, names, cluster
        self._group = f"{names.prefix}{settings.group}"
        self._kafka, self._state_dir = kafka, state_dir
        self._options = StateOptions(settings.cache_mb)
        self._metrics = JoinMetrics(registry)
        self.partitions: dict[int, PartitionJoin] = {}
        self._loops: dict[int, asyncio.Task[None]] = {}
        self._takeover_done = False
        self._rebuilds: dict[int, RebuildProgress] = {}  # under way, or failed
        self._assigned = 0  # partition numbers, by the last rebalance
        self._paused: set[TP] = set()
        self.app = build_app(
            self._group,
            kafka,
            next_offset=self._next_offset,
            session_timeout_ms=settings.session_timeout_ms,
            instance_id=settings.instance_id,
        )
        # Acks are off because a commit of Faust's would erase our offsets' metadata.
        topic = self.app.topic(names.impressions, names.clicks, schema=RunSchema(), acks=False)
        self.app.agent(topic, name="join")(self._consume)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_rebalance_complete.connect(self._on_rebalance_complete)

    def _next_offset(self, tp: TP) -> int | None:
        partition = self.partitions.get(tp.partition)
        return partition.accepted.get(tp.topic) if partition else None

    async def _consume(self, stream: Any) -> None:
        try:
            async for run in stream:
                await self._deliver(run)
        except Exception as error:  # an exception that leaves an agent would count as handled
            fatal("join agent", error)

    async def _deliver(self, run: Run) -> None:
        partition = self.partitions.get(run.partition)
        if partition is None or run.partition not in self._loops:
            return  # fetched before a rebalance; whoever owns the partition now reads it again
        if not await partition.put(run):
            tp = TP(run.topic, run.partition)
            await self.app.consumer.seek_runs({tp: partition.accepted[run.topic]})

    async def _on_revoked(self, *args: Any, **kwargs: Any) -> None:
        """Let the steps under way end. Which partitions are lost is known when the rebalance is complete."""
        self._takeover_done = False
        await self._stop_loops()

    async def _stop_loops(self) -> None:
        loops, self._loops = self._loops, {}
        for task in loops.values():
            task.cancel()
        if loops:
            await asyncio.wait(loops.values())

    async def _on_rebalance_complete(self, *args: Any, **kwargs: Any) -> None:
        """Take over what is new and go on with what stayed; the flow stands still, heartbeats go on."""
        try:
            await self._rebalanced()
        except Abandoned as news:
            log.info("%s", news)
        except Exception as error:
            fatal("taking over partitions", error)

    async def _rebalanced(self) -> None:
        await self._stop_loops()
        self._paused.clear()  # Faust resumes every partition when this is over
        generation = self.app.consumer_generation_id
        assigned = self.app.consumer.assignment()
        ours = {tp.partition for tp in assigned if tp.topic == self._names.impressions}
        clicks = {tp.partition for tp in assigned if tp.topic == self._names.clicks}
        if ours != clicks:
            raise TopicError(
                f"expected the same partitions of {self._names.impressions} and {self._names.clicks}, was assigned "
                f"{sorted(ours)} and {sorted(clicks)}. Run `headrace topics check`."
            )
        for number in sorted((self.partitions.keys() | self._rebuilds.keys()) - ours):
            if number in self.partitions:
                await self.partitions.pop(number).close()
            self._metrics.forget_partition(number)
        # A partition that stayed keeps its producer: had another worker owned it meanwhile, our next transaction is fenced.
        for partition in self.partitions.values():
            partition.reset()
        self._rebuilds.clear()
        self._assigned = len(ours)
        limit = asyncio.Semaphore(TAKEOVERS_AT_ONCE)

        async def take(number: int) -> None:
            async with limit:
                self.partitions[number] = await self._take(number, lambda: self.app.consumer_generation_id == generation)

        # All of them end before the first failure counts: one that went on could meet the next rebalance's take of its number.
        taking = [take(number) for number in sorted(ours - self.partitions.keys())]
        for outcome in await asyncio.gather(*taking, return_exceptions=True):
            if outcome is not None:
                raise outcome
        if self.app.consumer_generation_id != generation:
            raise Abandoned("another rebalance began while partitions were taken over")
        for number, partition in self.partitions.items():
            self._loops[number] = task = asyncio.ensure_future(partition.run())
            task.add_done_callback(self._loop_ended)
        self._takeover_done = True

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            fatal("join partition", error)

    async def _take(self, number: int, still_ours: Any) -> PartitionJoin:
        began = time.monotonic()
        cluster, names = self._cluster, self._names
        topics = (names.impressions, names.clicks, names.examples)
        ids = (cluster.topic_ids[topic] for topic in topics)
        identity = "/".join([cluster.cluster_id, *ids, str(number)])
        takeover = Takeover(
            kafka=self._kafka,
            settings=self._settings,
            names=names,
            group=self._group,
            identity=identity,
            state_dir=self._state_dir,
            options=self._options,
        )
        progress = self._rebuilds[number] = RebuildProgress(number, self._metrics.observe_rebuild)
        taken = await takeover.take(number, still_ours, progress)
        del self._rebuilds[number]
        partition = PartitionJoin(
            number,
            settings=self._settings,
            names=names,
            group=self._group,
            identity=identity,
            partitions=cluster.partitions[names.impressions],
            taken=taken,
            log_end=lambda topic: self._log_end(TP(topic, number)),
            after_step=self._balance_sources,
            fatal=fatal,
            metrics=self._metrics,
        )
        self._metrics.takeover_seconds.observe(time.monotonic() - began)
        return partition

    def _log_end(self, tp: TP) -> LogEnd | None:
        end: LogEnd | None = self.app.consumer.log_end(tp)
        return end

    def _balance_sources(self, partition: PartitionJoin) -> None:
        """Pause a source that runs far ahead of the other in event time, so that what is pending stays bounded."""
        memory, names = partition.memory, self._names
        impressions, clicks = memory.impressions_seen_ms, memory.clicks_seen_ms
        for topic, seen, other, other_topic in (
            (names.impressions, impressions, clicks, names.clicks),
            (names.clicks, clicks, impressions, names.impressions),
        ):
            tp = TP(topic, partition.number)
            ahead = other > NEVER_MS and seen - other > self._settings.max_ahead_ms and not partition.is_idle(other_topic)
            if ahead and tp not in self._paused:
                self._paused.add(tp)
                self.app.consumer.pause_partitions({tp})
            elif not ahead and tp in self._paused:
                self._paused.discard(tp)
                self.app.consumer.resume_partitions({tp})

    def ready(self) -> str | None:
        if self._takeover_done:
            return None
        # Asked by the HTTP thread: a copy, in one step.
        return told(list(self._rebuilds.values()), len(self.partitions), self._assigned)

    def retention_watch(self) -> RetentionWatch:
        return RetentionWatch(
            self._kafka,
            self._names,
            self._metrics,
            lambda: {number: partition.low_water() for number, partition in self.partitions.items()},
        )

    def watchdog(self) -> Watchdog:
        def waiting() -> bool:
            if not self._takeover_done:
                return True
            return any(
                end is not None and end.offset > position
                for partition in self.partitions.values()
                for topic, position in partition.accepted.items()
                if (end := self._log_end(TP(topic, partition.number))) and TP(topic, partition.number) not in self._paused
            )

        def progress() -> Any:
            return self._takeover_done, self.app.consumer_generation_id, [p.steps for p in self.partitions.values()]

        return Watchdog(progress, waiting)

    async def drain(self) -> None:
        """Let the transactions under way end, and close everything."""
        await self._stop_loops()
        for partition in self.partitions.values():
            await partition.close()
        self.partitions.clear()


async def run_join(
    *,
    kafka: KafkaSettings,
    settings: JoinSettings,
    names: TopicNames,
    http: HttpSettings,
    state_dir: Path,
) -> None:
    """Run a join worker until it is told to stop.

    Raises:
        TopicError: topics are missing, or not co-partitioned, or have another number of partitions than what is pending.
    """
    topics = (names.impressions, names.clicks, names.examples)
    cluster = await describe_cluster(kafka, (*topics, names.dead_letters))
    if len({cluster.partitions[topic] for topic in topics}) != 1:
        found = ", ".join(f"{topic} {cluster.partitions[topic]}" for topic in topics)
        raise TopicError(f"expected the same number of partitions, found {found}. Run `headrace topics check`.")
    partitions = cluster.partitions[names.impressions]
    sources = [TopicPartition(topic, number) for topic in (names.impressions, names.clicks) for number in range(partitions)]
    committed = await committed_offsets(kafka, f"{names.prefix}{settings.group}", sources)
    check_partition_count(committed, names, partitions, settings.accept_partitions)
    registry = new_registry()
    worker = JoinWorker(kafka=kafka, settings=settings, names=names, cluster=cluster, state_dir=state_dir, registry=registry)
    watch = asyncio.ensure_future(worker.retention_watch().run())
    try:
        await serve(worker, name="join", http=http, registry=registry)
    finally:
        watch.cancel()
