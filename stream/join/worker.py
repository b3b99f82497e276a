"""The join worker: a Faust app that owns partition numbers and hands each its runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiokafka.errors import InvalidProducerEpoch, InvalidTxnState, ProducerFenced
from aiokafka.structs import TopicPartition
from faust.types import TP
from prometheus_client import CollectorRegistry

from state.join_state import StateOptions
from stream.errors import Abandoned, Replaced, TopicError
from stream.formats import open_formats
from stream.join.checks import check_topics
from stream.join.file_limit import check_file_limit, open_files_each, raise_file_limit
from stream.join.metrics import JoinMetrics
from stream.join.partition import PartitionJoin
from stream.join.partition_count import check_partition_count
from stream.join.rebuild_progress import RebuildProgress, told
from stream.join.retention import RetentionWatch
from stream.join.settings_history import NEVER_MS
from stream.join.takeover import Takeover
from stream.kafka.cluster import Cluster, ClusterWatch, describe_cluster
from stream.kafka.offsets import committed_offsets
from stream.kafka.read_log import high_watermarks
from stream.kafka.transport import LogEnd, Run, RunSchema
from stream.settings import HttpSettings, JoinSettings, KafkaSettings
from stream.topics.limits import OutputLimits, letter_limit
from stream.topics.names import TopicNames
from stream.worker.membership import Membership
from stream.worker.runtime import build_app, fatal, new_registry, serve, source_part
from stream.worker.watchdog import Part

__all__ = ["JoinWorker", "run_join"]

log = logging.getLogger(__name__)

# Each opens three connections and holds a fetch in memory.
TAKEOVERS_AT_ONCE = 8
# How often a takeover that is waited for looks whether another rebalance has begun.
GENERATION_LOOK_S = 0.2
# What a producer says when another worker has taken its transactional id.
FENCED = (ProducerFenced, InvalidProducerEpoch, InvalidTxnState)


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
        watch: ClusterWatch,
        limits: OutputLimits = OutputLimits(),  # noqa: B008 (frozen)
    ) -> None:
        self._settings, self._names, self._cluster, self._watch = settings, names, cluster, watch
        self._group = f"{names.prefix}{settings.group}"
        self._kafka, self._state_dir, self._limits = kafka, state_dir, limits
        self._file_limit = raise_file_limit()
        each = open_files_each(self._file_limit, cluster.partitions[names.impressions])
        self._options = StateOptions(settings.cache_mb, each, settings.write_buffers_mb)
        self._metrics = JoinMetrics(registry)
        self._formats = open_formats(settings.schema_registry, self._metrics.registry_failures.inc)
        self.partitions: dict[int, PartitionJoin] = {}
        self._loops: dict[int, asyncio.Task[None]] = {}
        self._takeover_done = False
        self._takeovers: dict[int, asyncio.Task[None]] = {}  # under way, or failed
        self._turns = asyncio.Semaphore(TAKEOVERS_AT_ONCE)
        self._stopping = False
        self._ending: asyncio.Task[None] | None = None
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
        self._membership = Membership(self.app, kafka, self._group, settings.instance_id, setting="join.instance_id")
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
        if await self._membership.check() is not None:
            await self._membership.wait_put_out()
            fatal("join", Replaced(self._membership.put_out))

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
            self._membership.joined = True
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
        if new := sorted(number for number in ours if number >= self._cluster.partitions[self._names.impressions]):
            raise TopicError(
                f"expected {self._cluster.partitions[self._names.impressions]} partitions of {self._names.impressions}, was "
                f"assigned {new}: the topic has gained partitions. Run `headrace topics check`."
            )
        for number in sorted((self.partitions.keys() | self._takeovers.keys()) - ours):
            if number in self._takeovers:
                await self._give_up(number)
            if number in self.partitions:
                await self.partitions.pop(number).close()
            self._metrics.forget_partition(number)
        check_file_limit(self._file_limit, len(ours))
        # A partition that stayed keeps its producer: had another worker owned it meanwhile, our next transaction is fenced. So
        # does a takeover that is under way: a long one isn't begun anew because others come and go.
        for partition in self.partitions.values():
            partition.reset()
        self._assigned = len(ours)
        for number in sorted(ours - self.partitions.keys() - self._takeovers.keys()):
            self._takeovers[number] = asyncio.ensure_future(self._take_in_turn(number))
        while self._takeovers:
            done, _ = await asyncio.wait(
                self._takeovers.values(), timeout=GENERATION_LOOK_S, return_when=asyncio.FIRST_COMPLETED
            )
            if self._stopping or self.app.consumer_generation_id != generation:
                raise Abandoned("the worker is stopping, or another rebalance has begun; takeovers under way go on")
            for task in done:
                task.result()
        if self.app.consumer_generation_id != generation:
            raise Abandoned("another rebalance has begun")
        for number, partition in self.partitions.items():
            self._loops[number] = task = asyncio.ensure_future(partition.run())
            task.add_done_callback(self._loop_ended)
        self._takeover_done = True

    async def _take_in_turn(self, number: int) -> None:
        async with self._turns:
            self.partitions[number] = await self._take(number, lambda: not self._stopping)
        del self._takeovers[number]  # one that fails stays, for whoever waits for it

    async def _give_up(self, number: int) -> None:
        """End a takeover that is under way. What it has rebuilt stands for no position of the log."""
        task = self._takeovers.pop(number)
        task.cancel()
        await asyncio.wait([task])
        self._rebuilds.pop(number, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("partition %d went to another worker; taking it over had failed: %r", number, error)

    def _failed(self, what: str, error: BaseException) -> None:
        """End the process, at once but for one case: a worker that is started again and again must not do harm at that pace."""
        if self._settings.instance_id is None or not isinstance(error, FENCED):
            fatal(what, error)
        self._ending = asyncio.ensure_future(self._fenced(what, error))

    async def _fenced(self, what: str, error: BaseException) -> None:
        await self._stop_loops()
        if await self._membership.check(fenced=True) is not None:
            await self._membership.wait_put_out()
            fatal("join", Replaced(self._membership.put_out))
        fatal(what, error)

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        if self._ending is None and not task.cancelled() and (error := task.exception()) is not None:
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
            formats=self._formats,
        )
        progress = self._rebuilds[number] = RebuildProgress(number, self._metrics.observe_rebuild)
        taken = await takeover.take(number, still_ours, progress)
        self._rebuilds.pop(number, None)
        partition = PartitionJoin(
            number,
            settings=self._settings,
            names=names,
            group=self._group,
            identity=identity,
            partitions=cluster.partitions[names.impressions],
            taken=taken,
            log_end=lambda topic: self._log_end(TP(topic, number)),
            after_step=self._after_step,
            fatal=self._failed,
            metrics=self._metrics,
            limits=self._limits,
            formats=self._formats,
        )
        self._metrics.takeover_seconds.observe(time.monotonic() - began)
        return partition

    def _log_end(self, tp: TP) -> LogEnd | None:
        end: LogEnd | None = self.app.consumer.log_end(tp)
        return end

    def _after_step(self, partition: PartitionJoin) -> None:
        self._balance_sources(partition)
        if decoded := self._formats.decoded:
            self._metrics.observe_frames(decoded.items())
            decoded.clear()

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
        if self._membership.put_out is not None:
            return self._membership.put_out
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

    def parts(self) -> Iterable[Part]:
        """Partitions of the sources by their committed positions; before that, the way there."""
        if self._membership.put_out is not None:
            return
        if not self._takeover_done:
            # While partitions are taken over the flow stands still, also of those that stayed.
            if not self._rebuilds:
                yield Part("the group's assignment", self.app.consumer_generation_id, "partitions to be assigned")
            for number, rebuild in list(self._rebuilds.items()):
                yield Part(f"taking over partition {number}", rebuild.progress, rebuild.stage, self._formats.trouble)
            return
        for number, partition in self.partitions.items():
            committed = partition.positions
            for topic, position in ((self._names.impressions, committed.impressions), (self._names.clicks, committed.clicks)):
                if (tp := TP(topic, number)) not in self._paused:
                    part = source_part(self.app, self._watch, tp, position)
                    yield part if part.outside else replace(part, outside=self._formats.trouble)

    async def drain(self) -> None:
        """Let the transactions under way end, and close everything.

        A takeover under way is given up: what it has rebuilt stands for no position of the log, and the next one begins anew.
        """
        self._stopping = True
        await self._stop_loops()
        takeovers = list(self._takeovers.values())
        for task in takeovers:
            task.cancel()
        if takeovers:
            await asyncio.wait(takeovers)
        await asyncio.gather(*(partition.close() for partition in self.partitions.values()))
        self.partitions.clear()
        await self._formats.close()


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
        TopicError: topics are missing, not co-partitioned, stamped by producers' clocks, or have another number of partitions
            than what is pending.
        NoAnswer: Kafka can't be reached.
        StreamError: `schema_registry.url` is set, and what it needs isn't installed.
    """
    open_formats(settings.schema_registry)  # asked first: what it lacks is said before anything is waited for
    cluster = await describe_cluster(kafka, (names.impressions, names.clicks, names.examples, names.dead_letters))
    await check_topics(kafka, settings, names, cluster)
    partitions = cluster.partitions[names.impressions]
    sources = [TopicPartition(topic, number) for topic in (names.impressions, names.clicks) for number in range(partitions)]
    committed = await committed_offsets(kafka, f"{names.prefix}{settings.group}", sources)
    ends = await high_watermarks(kafka, sources)
    check_partition_count(committed, ends, names, partitions, settings.accept_partitions)
    registry = new_registry()
    limits = OutputLimits(
        example_bytes=await letter_limit(kafka, names.examples),
        letter_bytes=await letter_limit(kafka, names.dead_letters),
        letter_partitions=cluster.partitions[names.dead_letters],
    )
    watch = ClusterWatch(kafka, cluster, changed=lambda error: fatal("join", error))
    worker = JoinWorker(
        kafka=kafka,
        settings=settings,
        names=names,
        cluster=cluster,
        state_dir=state_dir,
        registry=registry,
        watch=watch,
        limits=limits,
    )
    beside = (worker.retention_watch().run, watch.run)
    await serve(worker, name="join", http=http, registry=registry, beside=beside)
