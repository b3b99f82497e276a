"""The join worker: takes over the partition numbers that it is assigned, and gives each the runs that are fetched for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from aiokafka.errors import InvalidProducerEpoch, InvalidTxnState, ProducerFenced
from faust.types import TP
from prometheus_client import CollectorRegistry

from state.join_state import StateOptions
from stream.errors import Abandoned, TopicError
from stream.formats import open_formats
from stream.join.checks import check_topics
from stream.join.file_limit import check_file_limit, open_files_each, raise_file_limit
from stream.join.metrics import JoinMetrics
from stream.join.partition import PartitionJoin
from stream.join.partition_count import check_partitions
from stream.join.rebuild_progress import RebuildProgress, takeover_status
from stream.join.retention import RetentionWatch
from stream.join.settings_history import NEVER_MS
from stream.join.takeover import Takeover
from stream.kafka.cluster import Cluster, describe_cluster
from stream.kafka.transport import Run
from stream.settings import HttpSettings, JoinSettings, KafkaSettings, SchemaRegistrySettings
from stream.topics.limits import OutputLimits, letter_limit
from stream.topics.names import TopicNames
from stream.worker import Part, Worker, fatal, new_prometheus, serve, source_part
from stream.worker.guards import end_on_error

__all__ = ["JoinWorker", "run_join"]

log = logging.getLogger(__name__)

# Limit for takeovers at one time. Each opens three connections and holds a fetch in memory.
TAKEOVERS_AT_ONCE = 8
# How often the wait for takeovers checks whether another rebalance has begun.
GENERATION_LOOK_S = 0.2
# The errors of a producer whose transactional id another worker has taken.
FENCED = (ProducerFenced, InvalidProducerEpoch, InvalidTxnState)


class JoinWorker(Worker):
    """One process of the join. Must be built inside a running event loop.

    Each partition number has a `PartitionJoin`, whose loop is a task here. A partition number that is assigned is taken over
    first, and its loop starts when all takeovers are done. This worker is the partitions' `Owner`.
    """

    name = "join"

    def __init__(
        self,
        *,
        kafka: KafkaSettings,
        settings: JoinSettings,
        schema_registry: SchemaRegistrySettings,
        names: TopicNames,
        cluster: Cluster,
        state_dir: Path,
        prometheus: CollectorRegistry,
        limits: OutputLimits = OutputLimits(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(
            kafka,
            cluster,
            group=f"{names.prefix}{settings.group}",
            topics=(names.impressions, names.clicks),
            session_timeout_ms=settings.session_timeout_ms,
            instance_id=settings.instance_id,
            instance_setting="join.instance_id",
        )
        self._kafka, self._settings, self._names, self._cluster = kafka, settings, names, cluster
        self._state_dir, self._limits = state_dir, limits
        self._file_limit = raise_file_limit()
        each = open_files_each(self._file_limit, cluster.partitions[names.impressions])
        self._options = StateOptions(settings.cache_mb, each, settings.write_buffers_mb)
        self._metrics = JoinMetrics(prometheus)
        self._formats = open_formats(schema_registry, self._metrics.registry_failures.inc)
        self.partitions: dict[int, PartitionJoin] = {}
        self._loops: dict[int, asyncio.Task[None]] = {}
        self._takeovers: dict[int, asyncio.Task[None]] = {}  # under way, or failed
        self._rebuilds: dict[int, RebuildProgress] = {}  # under way, or failed
        self._turns = asyncio.Semaphore(TAKEOVERS_AT_ONCE)
        self._assigned = 0  # partition numbers, by the last rebalance
        self._paused: set[TP] = set()
        self._stopping = False
        self._ending: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await super().start()
        watch = RetentionWatch(
            self._kafka,
            self._names,
            self._metrics,
            lambda: {number: partition.low_water() for number, partition in self.partitions.items()},
        )
        self.background(watch.run())

    # Runs

    def next_offset(self, tp: TP) -> int | None:
        partition = self.partitions.get(tp.partition)
        return partition.accepted.get(tp.topic) if partition else None

    async def deliver(self, run: Run) -> None:
        partition = self.partitions.get(run.partition)
        if partition is None or run.partition not in self._loops:
            return  # fetched before a rebalance; whoever owns the partition now reads it again
        if not await partition.put(run):
            tp = TP(run.topic, run.partition)
            await self.app.consumer.seek_runs({tp: partition.accepted[run.topic]})

    async def _stop_loops(self) -> None:
        """Stop the partitions' loops. Steps under way end first."""
        loops, self._loops = self._loops, {}
        for task in loops.values():
            task.cancel()
        if loops:
            await asyncio.wait(loops.values())

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        if self._ending is None:
            end_on_error("join partition", task)

    # Rebalances

    async def revoked(self) -> None:
        await self._stop_loops()

    async def assigned(self) -> None:
        """Take over the partition numbers that are new, and go on with those that stayed."""
        await self._stop_loops()
        self._paused.clear()  # Faust resumes every partition when this is over
        # Read together, with no await between them: while the steps ended, another rebalance may have completed.
        generation, assigned = self.app.consumer_generation_id, self.app.consumer.assignment()
        ours = self._numbers(assigned)
        for number in sorted((self.partitions.keys() | self._takeovers.keys()) - ours):
            await self._let_go(number)
        check_file_limit(self._file_limit, len(ours))
        # A partition that stayed keeps its producer: if another worker has owned it meanwhile, our next transaction is fenced.
        # A takeover that is under way goes on, too: a long one doesn't start again because other workers come and go.
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

    def _numbers(self, assigned: set[TP]) -> set[int]:
        """The partition numbers that were assigned.

        Raises:
            TopicError: different partition numbers of the two sources were assigned, or the topics have gained partitions.
        """
        names, count = self._names, self._cluster.partitions[self._names.impressions]
        ours = {tp.partition for tp in assigned if tp.topic == names.impressions}
        clicks = {tp.partition for tp in assigned if tp.topic == names.clicks}
        if ours != clicks:
            raise TopicError(
                f"expected the same partitions of {names.impressions} and {names.clicks}, was assigned "
                f"{sorted(ours)} and {sorted(clicks)}. Run `headrace topics check`."
            )
        if new := sorted(number for number in ours if number >= count):
            raise TopicError(
                f"expected {count} partitions of {names.impressions}, was assigned {new}: the topic has gained partitions. Run "
                "`headrace topics check`."
            )
        return ours

    async def _let_go(self, number: int) -> None:
        """Close a partition that went to another worker, and end its takeover if that is under way."""
        if (task := self._takeovers.pop(number, None)) is not None:
            # A state that is rebuilt only in part belongs to no position of the log; the next takeover starts again.
            task.cancel()
            await asyncio.wait([task])
            self._rebuilds.pop(number, None)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.warning("partition %d went to another worker; taking it over had failed: %r", number, error)
        if number in self.partitions:
            await self.partitions.pop(number).close()
        self._metrics.forget_partition(number)

    async def _take_in_turn(self, number: int) -> None:
        async with self._turns:
            self.partitions[number] = await self._take(number, lambda: not self._stopping)
        del self._takeovers[number]  # a takeover that fails stays, and `assigned` finds its exception

    async def _take(self, number: int, still_ours: Callable[[], bool]) -> PartitionJoin:
        began = time.monotonic()
        cluster, names = self._cluster, self._names
        ids = (cluster.topic_ids[topic] for topic in (names.impressions, names.clicks, names.examples))
        identity = "/".join([cluster.cluster_id, *ids, str(number)])
        takeover = Takeover(
            kafka=self._kafka,
            settings=self._settings,
            names=names,
            group=self.group,
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
            group=self.group,
            identity=identity,
            partitions=cluster.partitions[names.impressions],
            taken=taken,
            owner=self,
            metrics=self._metrics,
            limits=self._limits,
            formats=self._formats,
        )
        self._metrics.takeover_seconds.observe(time.monotonic() - began)
        return partition

    # What partitions report (`Owner`)

    def stepped(self, partition: PartitionJoin) -> None:
        self._balance_sources(partition)
        if decoded := self._formats.decoded:
            self._metrics.observe_frames(decoded.items())
            decoded.clear()

    def _balance_sources(self, partition: PartitionJoin) -> None:
        """Pause a source that runs far ahead of the other in event time, to bound the number of pending impressions."""
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

    def failed(self, what: str, error: BaseException) -> None:
        """End the process at once, or after a wait if another worker with the same instance id may have replaced this one.

        Without the wait, which is in `end_if_replaced`, two workers with one instance id would fence each other as often as
        their supervisors restart them.
        """
        if self._settings.instance_id is None or not isinstance(error, FENCED):
            fatal(what, error)
        self._ending = asyncio.ensure_future(self._end_after_fence(what, error))

    async def _end_after_fence(self, what: str, error: BaseException) -> None:
        await self._stop_loops()
        await self.end_if_replaced(fenced=True)
        fatal(what, error)

    # Readiness and progress

    def ready(self) -> str | None:
        if self.membership.put_out is not None or self.waiting_for is None:
            return super().ready()
        # Called by the HTTP thread: the list is a copy, made in one step.
        return takeover_status(list(self._rebuilds.values()), len(self.partitions), self._assigned)

    def on_the_way(self) -> Iterable[Part]:
        """The takeovers under way, each with its progress. Meanwhile no partition gets records, not even one that stayed."""
        if not self._rebuilds:
            yield from super().on_the_way()
        for number, rebuild in list(self._rebuilds.items()):
            yield Part(f"taking over partition {number}", rebuild.progress, rebuild.stage, self._formats.trouble)

    def work(self) -> Iterable[Part]:
        """The partitions of both sources, with their committed positions. A source that is paused for the other is left out."""
        for number, partition in self.partitions.items():
            committed = partition.positions
            for topic, position in ((self._names.impressions, committed.impressions), (self._names.clicks, committed.clicks)):
                if (tp := TP(topic, number)) not in self._paused:
                    part = source_part(tp, position, self.log_end(tp), self.watch)
                    yield part if part.outside else replace(part, outside=self._formats.trouble)

    async def drain(self) -> None:
        """Let the transactions under way end, and close everything.

        A takeover under way is given up, since a state that is rebuilt only in part belongs to no position of the log.
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
    schema_registry: SchemaRegistrySettings,
    names: TopicNames,
    http: HttpSettings,
    state_dir: Path,
) -> None:
    """Run a join worker until it gets a signal to stop.

    Raises:
        TopicError: topics are missing, not co-partitioned, stamped by producers' clocks, or have another number of partitions
            than when the pending impressions came.
        NoAnswer: Kafka can't be reached.
        StreamError: `schema_registry.url` is set, and a package that it needs isn't installed.
    """
    open_formats(schema_registry)  # first, so that a missing package is reported before anything is waited for
    cluster = await describe_cluster(kafka, (names.impressions, names.clicks, names.examples, names.dead_letters))
    await check_topics(kafka, settings, names, cluster)
    await check_partitions(kafka, settings, names, cluster.partitions[names.impressions])
    limits = OutputLimits(
        example_bytes=await letter_limit(kafka, names.examples),
        letter_bytes=await letter_limit(kafka, names.dead_letters),
        letter_partitions=cluster.partitions[names.dead_letters],
    )
    prometheus = new_prometheus()
    worker = JoinWorker(
        kafka=kafka,
        settings=settings,
        schema_registry=schema_registry,
        names=names,
        cluster=cluster,
        state_dir=state_dir,
        prometheus=prometheus,
        limits=limits,
    )
    await serve(worker, http=http, prometheus=prometheus)
