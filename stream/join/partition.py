"""One partition number of the join: decide, commit one transaction, apply.

The state is a function of the committed log. A step decides over the state without changing it, writes its outputs and the
source offsets in one Kafka transaction, and only then changes the state, in one write. A crash before the commit leaves nothing
behind. A crash after the commit leaves a state that is a prefix of the committed log, and the next takeover brings it up to
date.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Any, Protocol

from aiokafka.structs import OffsetAndMetadata, TopicPartition
from faust.types import TP

from state.join_state import LAYOUT, Chunk, JoinMeta, JoinState
from stream.formats import Formats
from stream.join.commit_metadata import Progress, encode_progress
from stream.join.events import read_run
from stream.join.idle import IdleSources
from stream.join.logic import Step, watermark
from stream.join.memory import LowWater, Memory
from stream.join.metrics import JoinMetrics
from stream.join.outgoing import outgoing_records, record_count, set_aside_too_large
from stream.join.plan import Plan
from stream.join.source_clock import SourceClock
from stream.kafka.batches import send_batches
from stream.kafka.clients import quietly_stopped
from stream.kafka.transport import LogEnd, Run
from stream.settings import JoinSettings
from stream.topics.limits import OutputLimits
from stream.topics.names import TopicNames

__all__ = ["Owner", "PartitionJoin", "Positions", "TakenOver"]

# Limit for the records of one step. This bounds how long deciding holds the event loop: about 100 ms on one core.
MAX_STEP_RECORDS = 6_000
# How often the state is flushed. After a crash, at most the records of this time, or of a full write buffer, are read again.
FLUSH_S = 30.0
# Longest time for a transaction until its commit: long enough for a failed broker to be replaced. The coordinator aborts an
# abandoned transaction much sooner (join.transaction_timeout_ms).
TRANSACTION_S = 90.0
# How often a partition without new records checks whether its sources are idle and the watermark may move.
TICK_S = 0.1


@dataclass(slots=True)
class Positions:
    """The next offset of each topic.

    Records of a source below its offset have been applied to the state. The next record of `examples` has its offset, or a
    later one.
    """

    impressions: int
    clicks: int
    examples: int


@dataclass(frozen=True, slots=True)
class TakenOver:
    """What a takeover ends with and a `PartitionJoin` starts from."""

    producer: Any
    state: JoinState
    memory: Memory
    positions: Positions
    pending: int


class Owner(Protocol):
    """What a partition asks of the worker that owns it, and reports to it."""

    def log_end(self, tp: TP) -> LogEnd | None:
        """The end of a source's partition by the last fetch, None before the first."""

    def stepped(self, partition: PartitionJoin) -> None:
        """A step has ended."""

    def failed(self, what: str, error: BaseException) -> None:
        """A transaction has failed. The process must end: nothing decided may be used after this."""


class PartitionJoin:
    """Owns a partition number from the end of its takeover until it is revoked.

    Args:
        partitions: how many the topics have; committed with the progress.
        limits: the largest batches that `examples` and `dead-letters` take.
        formats: opens events that aren't plain JSON; without it none are opened.
    """

    def __init__(
        self,
        number: int,
        *,
        settings: JoinSettings,
        names: TopicNames,
        group: str,
        identity: str,
        partitions: int,
        taken: TakenOver,
        owner: Owner,
        metrics: JoinMetrics,
        limits: OutputLimits = OutputLimits(),  # noqa: B008 (frozen)
        formats: Formats | None = None,
    ) -> None:
        self._formats = formats or Formats()
        self._form = self._formats.form(settings.envelope)
        self.number = number
        self._settings, self._names, self._group, self._identity = settings, names, group, identity
        self._partitions = partitions
        self._producer, self._state, self._memory = taken.producer, taken.state, taken.memory
        self._owner, self._metrics = owner, metrics
        self.positions, self.pending, self.steps = taken.positions, taken.pending, 0
        self._flushed = time.perf_counter()
        self._limits = limits
        lateness_ms, memory = settings.lateness_ms, taken.memory
        self._clocks = {
            names.impressions: SourceClock(lateness_ms, memory.impressions_seen_ms + lateness_ms),
            names.clicks: SourceClock(lateness_ms, memory.clicks_seen_ms + lateness_ms),
        }
        self._idle = IdleSources(settings.idle_timeout_ms)
        self._queue: asyncio.Queue[Run] = asyncio.Queue()
        self.reset()

    def reset(self) -> None:
        """Forget runs that were taken and not applied; they are read again. `run` must have ended."""
        self._empty_queue()
        names = self._names
        self.accepted = {names.impressions: self.positions.impressions, names.clicks: self.positions.clicks}
        # A few waiting runs keep the loop busy; more would only take memory. Faust's queue and the fetcher hold back the rest.
        self._queue = asyncio.Queue(maxsize=4)

    def _empty_queue(self) -> None:
        """Empty the queue, so that an agent that waits to put a run continues."""
        while not self._queue.empty():
            self._queue.get_nowait()

    @property
    def memory(self) -> Memory:
        return self._memory

    async def put(self, run: Run) -> bool:
        """Take a run. Returns False when it isn't the one expected next: the worker must seek to `accepted`."""
        if run.before != self.accepted[run.topic]:
            return False
        self.accepted[run.topic] = run.after
        await self._queue.put(run)
        return True

    async def run(self) -> None:
        """Step until cancelled. A step under way, with its transaction, ends first."""
        while True:
            # The runs are not assigned to a variable, which would keep them in memory, and their bytes counted, until the next
            # ones come.
            step = asyncio.ensure_future(self._step(await self._prepared(await self._gather())))
            try:
                await asyncio.shield(step)
            except asyncio.CancelledError:
                await step
                raise

    async def _gather(self) -> list[Run]:
        """The next runs: those that come within `step_ms` of the first, or none after a tick without any."""
        runs: list[Run] = []
        records = 0
        # `wait_for` isn't used: before Python 3.12 it loses a cancellation that arrives together with what it waits for.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TICK_S) as limit:
                while records < MAX_STEP_RECORDS:
                    runs.append(await self._queue.get())
                    records += len(runs[-1].records)
                    if len(runs) == 1:
                        limit.reschedule(asyncio.get_running_loop().time() + self._settings.step_ms / 1000)
        return runs

    async def _prepared(self, runs: list[Run]) -> list[Run]:
        """Fetch the schemas that these runs name, and return the runs.

        While the schema registry is away, this waits, and can be cancelled.
        """
        if self._form:
            for run in runs:
                await self._formats.prepare(run.records, self._form)
        return runs

    async def _step(self, runs: list[Run]) -> None:
        began = time.perf_counter()
        memory = self._memory
        # Terms that nothing needs are removed before the step and not after: a step commits the terms that it decided by.
        low = self.low_water()
        memory.history = memory.history.pruned(low.impressions, low.clicks)
        step = Step(self._settings, self._state, memory)
        after = Positions(self.positions.impressions, self.positions.clicks, self.positions.examples)
        for run in runs:
            events = read_run(
                run.records,
                self._settings.max_future_ms,
                self._settings.max_watermark_future_ms,
                self._formats,
                self._form,
            )
            self._clocks[run.topic].read(events)
            if events.ahead:
                self._metrics.observe_ahead(run.topic == self._names.impressions, self.number, events.ahead)
            if run.records:
                self._idle.has_records(run.topic)
            if run.topic == self._names.impressions:
                step.impressions(events)
                after.impressions = run.after
            else:
                step.clicks(events)
                after.clicks = run.after
        self.observe_idle(after)
        allowed = watermark(
            memory,
            impressions_idle=self.is_idle(self._names.impressions),
            clicks_idle=self.is_idle(self._names.clicks),
        )
        plan = step.close(allowed, self._names.clicks, self.number)
        set_aside_too_large(plan, self._limits.example_bytes, self._names.impressions, self.number)
        self._metrics.decide_seconds.observe(time.perf_counter() - began)
        if runs or plan.settled or plan.examples or plan.dead or plan.forgotten:
            chunk = self._chunk(plan)
            try:
                await self._commit(plan, after)
                self._apply(plan, after, chunk)
            except BaseException as error:  # CancelledError too: whether the commit succeeded is not known then
                self._owner.failed(f"join partition {self.number}: a transaction failed", error)
                raise
        self.steps += 1
        self._metrics.observe_step(self.number, plan, memory, self.pending)
        self._owner.stepped(self)

    def observe_idle(self, positions: Positions) -> None:
        """Note for both sources whether these positions are at the end of the log."""
        names, number = self._names, self.number
        for topic, position in ((names.impressions, positions.impressions), (names.clicks, positions.clicks)):
            self._idle.observe(topic, position, self._owner.log_end(TP(topic, number)))

    def is_idle(self, topic: str) -> bool:
        """Whether a source has stopped holding the watermark back, by the last observation."""
        return self._idle.is_idle(topic)

    def _chunk(self, plan: Plan) -> Chunk | None:
        """The ids that this step remembers, with the position of `examples` before the step; None when there are no ids."""
        if not plan.new_ids:
            return None
        latest = max(plan.remembered[key][0] for key in plan.new_ids)
        chunk = Chunk(plan.first_offset, latest, self.positions.examples)
        self._memory.add_chunk(chunk)
        return chunk

    async def _commit(self, plan: Plan, after: Positions) -> None:
        """One transaction: the outputs, and both sources' offsets with the progress up to them."""
        began = time.perf_counter()
        async with asyncio.timeout(TRANSACTION_S):
            await self._write(plan, after)
        # A commit that hangs may or may not have happened. After the broker's own time limit only a new start can find out.
        async with asyncio.timeout(self._settings.transaction_timeout_ms / 1000):
            await self._producer.commit_transaction()
        self._metrics.commit_seconds.observe(time.perf_counter() - began)

    async def _write(self, plan: Plan, after: Positions) -> None:
        """Everything of a transaction except its end."""
        names, producer = self._names, self._producer
        await producer.begin_transaction()
        labels = outgoing_records(plan, self._settings.negative_rate)
        sends = await send_batches(producer, names.examples, self.number, labels)
        letters = (letter.outgoing(self._limits.letter_bytes) for letter in plan.dead)
        dead_sends = await send_batches(producer, names.dead_letters, self._limits.letter_partition(self.number), letters)
        # Every future is awaited before the commit; see `send_batches`.
        written = [await future for future in sends]
        for future in dead_sends:
            await future
        if written:
            # The first batch's offset, plus all records and the transaction's marker. This is a lower bound, since records of a
            # replay may lie between them.
            after.examples = written[0].offset + record_count(plan) + 1
        metadata = encode_progress(self._progress(after))
        await producer.send_offsets_to_transaction(
            {
                TopicPartition(names.impressions, self.number): OffsetAndMetadata(after.impressions, metadata),
                TopicPartition(names.clicks, self.number): OffsetAndMetadata(after.clicks, metadata),
            },
            self._group,
        )

    def low_water(self) -> LowWater:
        """The earliest offsets that taking over this partition without local state would read."""
        return self._memory.low_water(self.positions.impressions, self.positions.clicks, self.positions.examples)

    def _progress(self, after: Positions) -> Progress:
        memory = self._memory
        low = memory.low_water(after.impressions, after.clicks, after.examples)
        return Progress(
            watermark_ms=memory.watermark_ms,
            cut=memory.cut,
            impressions_seen_ms=memory.impressions_seen_ms,
            clicks_seen_ms=memory.clicks_seen_ms,
            impressions_low=low.impressions,
            clicks_low=low.clicks,
            examples_low=low.examples,
            terms=memory.history.terms,
            partitions=self._partitions,
            identity=self._identity,
            life=memory.life,
        )

    def _apply(self, plan: Plan, after: Positions, chunk: Chunk | None) -> None:
        """Bring the state up to the committed log, in one write."""
        began = time.perf_counter()
        memory, batch = self._memory, self._state.batch()
        batch.drop_pending_before(memory.expired_ms, plan.expired_until_ms)
        memory.expired_ms = max(memory.expired_ms, plan.expired_until_ms)
        batch.drop_pending(plan.dropped_pending)
        batch.remember(plan.remembered.items())
        batch.add_pending((*impression, *row) for impression, row in plan.new_pending.items())
        batch.drop_held(plan.dropped_held)
        batch.hold(plan.held.items())
        batch.add_early(plan.new_early)
        batch.drop_early(plan.dropped_early)
        if chunk is not None:
            batch.add_chunk(chunk, plan.new_ids)
        for forgotten in plan.forgotten:
            batch.forget(forgotten, plan.forget_before_ms, plan.remembered)
        batch.set_meta(
            JoinMeta(
                identity=self._identity,
                layout=LAYOUT,
                impressions_position=after.impressions,
                clicks_position=after.clicks,
                examples_position=after.examples,
                watermark_ms=memory.watermark_ms,
                cut=memory.cut,
                impressions_seen_ms=memory.impressions_seen_ms,
                clicks_seen_ms=memory.clicks_seen_ms,
                life=memory.life,
            )
        )
        batch.write()
        if began - self._flushed > FLUSH_S:
            self._state.flush()
            self._flushed = began
        self.positions = after
        self.pending += plan.counts["impressions"] - plan.settled
        self._metrics.apply_seconds.observe(time.perf_counter() - began)

    async def close(self) -> None:
        """Stop the producer and close the state. `run` must have ended."""
        self._empty_queue()
        await quietly_stopped(self._producer.stop)
        self._state.close()
