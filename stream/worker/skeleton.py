"""What join, trainer and scorer have in common: the Faust app, its agent and rebalance hooks, readiness, background tasks.

    Kafka ── runs ──▶ agent ──▶ deliver(run)                    the worker's own work, behind a guard
    group ── revoked ──▶ revoked() ──▶ put out by another?
          └─ assigned ─▶ assigned() ────────────▶ ready, or what is still missing

A worker derives from `Worker` and fills in what only it knows. Each exception in these methods ends the process: the log is
read again by the next process, so ending loses nothing. Faust alone would go on and count the run as handled.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from faust.types import TP

from stream.errors import Abandoned, Replaced
from stream.kafka.cluster import Cluster, ClusterWatch
from stream.kafka.transport import FETCH_MAX_WAIT_MS, LogEnd, Run, RunSchema
from stream.settings import KafkaSettings
from stream.worker.app import build_app
from stream.worker.guards import fatal, guarded
from stream.worker.membership import Membership
from stream.worker.watchdog import Part, source_part

__all__ = ["Worker"]

log = logging.getLogger(__name__)


class Worker(ABC):
    """One process of the join, the trainer or the scorer. Must be built inside a running event loop.

    ```python
    class CounterWorker(Worker):
        name = "counter"                                # in logs and metrics, and the name of the Faust agent

        def next_offset(self, tp): return self.positions.get(tp)
        async def deliver(self, run): self.positions[TP(run.topic, run.partition)] = run.after
        async def revoked(self): ...                    # finish or drop what is under way
        async def assigned(self): ...                   # find the positions to go on from
        def work(self): return self.source_parts("clicks", {0: 7})
        async def drain(self): ...

    await serve(CounterWorker(kafka, cluster, group="g", topics=["clicks"], session_timeout_ms=10_000), http=…, prometheus=…)
    ```

    Args:
        cluster: the topics as the worker found them at its start. The worker ends when they change.
        instance_id: makes membership in the group static.
        instance_setting: name of the setting that `instance_id` comes from, for the message when another worker with the same
            id puts this one out. None where a worker is meant to put out its predecessor.
    """

    name: ClassVar[str]
    fetch_max_wait_ms: ClassVar[int] = FETCH_MAX_WAIT_MS
    """How long a broker holds back an empty fetch."""

    def __init__(
        self,
        kafka: KafkaSettings,
        cluster: Cluster,
        *,
        group: str,
        topics: Sequence[str],
        session_timeout_ms: int,
        instance_id: str | None = None,
        instance_setting: str | None = None,
    ) -> None:
        self.group = group
        self.watch = ClusterWatch(kafka, cluster, changed=lambda error: fatal(self.name, error))
        self.waiting_for: str | None = "joining the group"
        """What must happen before the worker does its work, for `/readyz` and the watchdog; None while it works."""
        self.joins = False
        """Whether `before_joining` has ended, so that the worker is on its way into the group."""
        self._background: list[asyncio.Task[None]] = []
        self.app = build_app(
            group,
            kafka,
            next_offset=self.next_offset,
            session_timeout_ms=session_timeout_ms,
            instance_id=instance_id,
            fetch_max_wait_ms=self.fetch_max_wait_ms,
        )
        self.membership = Membership(
            self.app, kafka, group, instance_id if instance_setting else None, setting=instance_setting or ""
        )
        # Acks are off because positions are the worker's own. Faust's commits would also erase the metadata of the join's.
        runs = self.app.topic(*topics, schema=RunSchema(), acks=False)
        self.app.agent(runs, name=self.name)(self._consume)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_rebalance_complete.connect(self._on_rebalance_complete)

    # What a worker fills in

    @abstractmethod
    def next_offset(self, tp: TP) -> int | None:
        """The offset to read an assigned partition from; None leaves its position alone."""

    @abstractmethod
    async def deliver(self, run: Run) -> None:
        """Take a run. Waiting here holds back Faust's queue, and the queue holds back the fetcher."""

    @abstractmethod
    async def revoked(self) -> None:
        """End or drop what is under way before the group assigns partitions anew.

        Which partitions are lost is not known yet. No heartbeat goes to the group meanwhile: be done well within the session
        timeout.
        """

    @abstractmethod
    async def assigned(self) -> str | None:
        """Prepare for the partitions of `self.app.consumer.assignment()`. The flow of runs stands still, heartbeats go on.

        Another rebalance may complete during any await, so read the assignment after the last one that comes before its use.

        Returns:
            None when the worker does its work now, else what it still waits for.

        Raises:
            Abandoned: another rebalance has begun, and decides. It is logged; every other exception ends the process.
        """

    @abstractmethod
    def work(self) -> Iterable[Part]:
        """What the watchdog looks after while the worker has its partitions."""

    @abstractmethod
    async def drain(self) -> None:
        """End what is under way, and close everything. Called once, after a signal."""

    # What a worker may add to; overrides call these

    async def start(self) -> None:
        """Start the background tasks. Called before `/metrics` answers."""
        self.background(self.watch.run())

    async def before_joining(self) -> None:  # noqa: B027 (most workers have nothing to do here)
        """Do what must be done before the worker joins its group; `/metrics` and `/healthz` answer already."""

    def ready(self) -> str | None:
        """What the worker still waits for, None when it does its work. Called by the HTTP thread."""
        return self.membership.put_out or self.waiting_for

    def on_the_way(self) -> Iterable[Part]:
        """What the watchdog looks after until the worker has its partitions."""
        yield Part("the group's assignment", self.app.consumer_generation_id, self.waiting_for)

    # What a worker uses

    def background(self, *works: Coroutine[Any, Any, None]) -> None:
        """Start tasks that run until the worker has drained. An exception that leaves one ends the process."""
        self._background += [guarded(work, self.name) for work in works]

    async def cancel_background(self) -> None:
        """Cancel the background tasks and wait until they have ended."""
        tasks, self._background = self._background, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def end_if_replaced(self, *, fenced: bool = False) -> None:
        """End the process, after a while, if another worker with the same instance id has taken this worker's membership.

        Args:
            fenced: a producer of this worker was fenced, so ask the group even if it still knows this worker.
        """
        if await self.membership.check(fenced=fenced) is not None:
            await self.membership.wait_put_out()
            fatal(self.name, Replaced(self.membership.put_out))

    def log_end(self, tp: TP) -> LogEnd | None:
        """The end of a partition's log by the last fetch, None before the first."""
        end: LogEnd | None = self.app.consumer.log_end(tp)
        return end

    def lags(self, topic: str, positions: Mapping[int, int]) -> Iterator[tuple[int, int]]:
        """Each partition with how many offsets its log goes on beyond the position, where the end of the log is known."""
        for number, position in positions.items():
            if (end := self.log_end(TP(topic, number))) is not None:
                yield number, max(end.offset - position, 0)

    def source_parts(self, topic: str, positions: Mapping[int, int]) -> Iterator[Part]:
        """The partitions of a topic for the watchdog. Records before a partition's position are processed and committed."""
        for number, position in positions.items():
            yield source_part(TP(topic, number), position, self.log_end(TP(topic, number)), self.watch)

    def parts(self) -> Iterable[Part]:
        """What the watchdog looks after now: nothing before the worker joins, and nothing after another has put it out."""
        if self.membership.put_out is not None or not self.joins:
            return []
        return self.on_the_way() if self.waiting_for is not None else self.work()

    # What Faust calls

    async def _consume(self, stream: Any) -> None:
        """The agent. An exception that left it would count its run as handled."""
        try:
            async for run in stream:
                await self.deliver(run)
        except Exception as error:
            fatal(f"{self.name} agent", error)

    async def _on_revoked(self, *args: Any, **kwargs: Any) -> None:
        try:
            self.waiting_for = "partitions are being assigned"
            await self.revoked()
            await self.end_if_replaced()
        except Exception as error:
            fatal(f"{self.name}: giving up partitions", error)

    async def _on_rebalance_complete(self, *args: Any, **kwargs: Any) -> None:
        try:
            await self._rebalanced()
        except Abandoned as news:
            log.info("%s", news)
        except Exception as error:
            fatal(f"{self.name}: taking over partitions", error)

    async def _rebalanced(self) -> None:
        self.waiting_for = await self.assigned()
        self.membership.joined = True
