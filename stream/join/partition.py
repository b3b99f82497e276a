"""One partition number of the join: decide, commit one transaction, apply.

The state is a function of the committed log. A step decides over the state without touching it, writes its outputs and the
source offsets in one Kafka transaction, and only then changes the state, in one write. A crash before the commit leaves nothing
behind; a crash after it leaves a state that is a prefix of the committed log, which taking over brings up to date.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiokafka.structs import OffsetAndMetadata, TopicPartition

from state.join_state import LAYOUT, Chunk, JoinMeta, JoinState
from stream.formats import Formats
from stream.join.commit_metadata import Progress, encode_progress
from stream.join.events import read_run
from stream.join.logic import Step, watermark
from stream.join.memory import Memory
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

__all__ = ["PartitionJoin", "Positions", "TakenOver"]

# Records of one step. It bounds how long deciding holds the event loop: about 100 ms on one core.
MAX_STEP_RECORDS = 6_000
# What a crash leaves to be read again is at most this old, or a full write buffer.
FLUSH_S = 30.0
# Everything of a transaction until its commit: time for a broker that has gone to be replaced. The coordinator gives up much
# sooner what nobody goes on with (join.transaction_timeout_ms).
TRANSACTION_S = 90.0
# How often a partition without new records looks whether its sources are idle and the watermark may move.
TICK_S = 0.1


@dataclass(slots=True)
class Positions:
    """Next offsets: of the sources, what is applied; of `examples`, a lower bound of what comes next."""

    impressions: int
    clicks: int
    examples: int


@dataclass(frozen=True, slots=True)
class TakenOver:
    """What taking over a partition ends with, and a `PartitionJoin` starts from."""

    producer: Any
    state: JoinState
    memory: Memory
    positions: Positions
    pending: int


class PartitionJoin:
    """Owns a partition number from the end of taking over until it is revoked.

    Args:
        partitions: of the topics, committed with the progress.
        log_end: the end of a source's partition by the last fetch, by topic name.
        fatal: called when a transaction fails; must not return. Nothing decided may be used after that.
        limits: what the topics of labels and dead letters take.
        formats: opens events that aren't plain JSON; those of the worker, else none are opened.
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
        log_end: Callable[[str], LogEnd | None],
        after_step: Callable[[PartitionJoin], None],
        fatal: Callable[[str, BaseException], Any],
        metrics: JoinMetrics,
        limits: OutputLimits = OutputLimits(),  # noqa: B008 (frozen)
        formats: Formats | None = None,
    ) -> None:
        self._formats, self._form = formats or Formats(), settings.form
        self.number = number
        self._settings, self._names, self._group, self._identity = settings, names, group, identity
        self._partitions = partitions
        self._producer, self._state, self._memory = taken.producer, taken.state, taken.memory
        self._log_end, self._after_step, self._fatal, self._metrics = log_end, after_step, fatal, metrics
        self.positions, self.pending, self.steps = taken.positions, taken.pending, 0
        self._flushed = time.perf_counter()
        self._limits = limits
        lateness_ms, memory = settings.lateness_ms, taken.memory
        self._clocks = {
            names.impressions: SourceClock(lateness_ms, memory.impressions_seen_ms + lateness_ms),
            names.clicks: SourceClock(lateness_ms, memory.clicks_seen_ms + lateness_ms),
        }
        self._idle_since: dict[str, float] = {}
        self._queue: asyncio.Queue[Run] = asyncio.Queue()
        self.reset()

    def reset(self) -> None:
        """Forget runs that were taken and not applied; they are read again. The loop must have ended."""
        self._let_go()
        names = self._names
        self.accepted = {names.impressions: self.positions.impressions, names.clicks: self.positions.clicks}
        # A few runs in waiting keep the loop busy; more would only be memory. Faust's queue and the fetcher hold back the rest.
        self._queue = asyncio.Queue(maxsize=4)

    def _let_go(self) -> None:
        """Empty the queue, so that an agent which waits to put a run goes on."""
        while not self._queue.empty():
            self._queue.get_nowait()

    @property
    def memory(self) -> Memory:
        return self._memory

    async def put(self, run: Run) -> bool:
        """Take a run; False when it isn't the one expected next (a seek is due)."""
        if run.before != self.accepted[run.topic]:
            return False
        self.accepted[run.topic] = run.after
        await self._queue.put(run)
        return True

    async def run(self) -> None:
        """Step until cancelled. Cancelling while a transaction is being committed lets that end first."""
        while True:
            # No name for the runs here: they would be held, and their bytes counted, until the next ones come.
            step = asyncio.ensure_future(self._step(await self._prepared(await self._gather())))
            try:
                await asyncio.shield(step)
            except asyncio.CancelledError:
                await step
                raise

    async def _gather(self) -> list[Run]:
        """The next runs: what comes within `step_ms` of the first, or none after a tick without any."""
        runs: list[Run] = []
        records = 0
        # Not `wait_for`, which before Python 3.12 swallows a cancellation that comes together with what it waits for.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TICK_S) as limit:
                while records < MAX_STEP_RECORDS:
                    runs.append(await self._queue.get())
                    records += len(runs[-1].records)
                    if len(runs) == 1:
                        limit.reschedule(asyncio.get_running_loop().time() + self._settings.step_ms / 1000)
        return runs

    async def _prepared(self, runs: list[Run]) -> list[Run]:
        """The runs, when all is there that reading them takes. It waits, and may be cancelled, while a registry is away."""
        if self._form:
            for run in runs:
                await self._formats.prepare(run.records, self._form)
        return runs

    async def _step(self, runs: list[Run]) -> None:
        began = time.perf_counter()
        memory = self._memory
        # What the step decides by is what it commits, so terms go before it and not after.
        memory.history = memory.history.pruned(*self.low_water()[:2])
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
                self._idle_since.pop(run.topic, None)
            if run.topic == self._names.impressions:
                step.impressions(events)
                after.impressions = run.after
            else:
                step.clicks(events)
                after.clicks = run.after
        allowed = watermark(
            memory,
            impressions_idle=self._idle(self._names.impressions, after.impressions),
            clicks_idle=self._idle(self._names.clicks, after.clicks),
        )
        plan = step.close(allowed, self._names.clicks, self.number)
        set_aside_too_large(plan, self._limits.example_bytes, self._names.impressions, self.number)
        self._metrics.decide_seconds.observe(time.perf_counter() - began)
        if runs or plan.settled or plan.examples or plan.dead or plan.forgotten:
            chunk = self._chunk(plan)
            try:
                await self._commit(plan, after)
                self._apply(plan, after, chunk)
            except BaseException as error:  # CancelledError too: whether the commit went through is not known any more
                self._fatal(f"join partition {self.number}: a transaction failed", error)
                raise
        self.steps += 1
        self._metrics.observe(self, plan)
        self._after_step(self)

    def is_idle(self, topic: str) -> bool:
        """Whether a source has stopped holding the watermark back."""
        names = self._names
        return self._idle(topic, self.positions.impressions if topic == names.impressions else self.positions.clicks)

    def _idle(self, topic: str, position: int) -> bool:
        """Whether a source is idle: its position at the end of the log, by a recent fetch, for `idle_timeout_ms`."""
        now, timeout_s = time.monotonic(), self._settings.idle_timeout_ms / 1000
        end = self._log_end(topic)
        recent = end is not None and time.time() * 1000 - end.seen_at_ms < self._settings.idle_timeout_ms
        # Of all that is written: behind an open transaction there are records to come.
        if end is None or not recent or position < end.highwater:
            self._idle_since.pop(topic, None)
            return False
        return now - self._idle_since.setdefault(topic, now) >= timeout_s

    def _chunk(self, plan: Plan) -> Chunk | None:
        """What this step remembers, with the position of `examples` before it."""
        if not plan.new_ids:
            return None
        latest = max(plan.remembered[key][0] for key in plan.new_ids)
        chunk = Chunk(plan.first_offset, latest, self.positions.examples)
        self._memory.add_chunk(chunk)
        return chunk

    async def _commit(self, plan: Plan, after: Positions) -> None:
        """One transaction: the outputs, and both sources' offsets with the progress that they stand for."""
        began = time.perf_counter()
        async with asyncio.timeout(TRANSACTION_S):
            await self._write(plan, after)
        # A commit that hangs may or may not have happened: past the broker's own limit only starting again can tell.
        async with asyncio.timeout(self._settings.transaction_timeout_ms / 1000):
            await self._producer.commit_transaction()
        self._metrics.commit_seconds.observe(time.perf_counter() - began)

    async def _write(self, plan: Plan, after: Positions) -> None:
        """All of a transaction but its end."""
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
            # Not beyond the end: the first batch's offset, all records and the marker; a replay's may lie between.
            after.examples = written[0].offset + record_count(plan) + 1
        metadata = encode_progress(self._progress(after))
        await producer.send_offsets_to_transaction(
            {
                TopicPartition(names.impressions, self.number): OffsetAndMetadata(after.impressions, metadata),
                TopicPartition(names.clicks, self.number): OffsetAndMetadata(after.clicks, metadata),
            },
            self._group,
        )

    def low_water(self) -> tuple[int, int, int]:
        """The earliest offsets of impressions, clicks and examples that taking over without local state would read."""
        return self._memory.low_water(self.positions.impressions, self.positions.clicks, self.positions.examples)

    def _progress(self, after: Positions) -> Progress:
        memory = self._memory
        impressions_low, clicks_low, examples_low = memory.low_water(after.impressions, after.clicks, after.examples)
        return Progress(
            watermark_ms=memory.watermark_ms,
            cut=memory.cut,
            impressions_seen_ms=memory.impressions_seen_ms,
            clicks_seen_ms=memory.clicks_seen_ms,
            impressions_low=impressions_low,
            clicks_low=clicks_low,
            examples_low=examples_low,
            terms=memory.history.terms,
            partitions=self._partitions,
            identity=self._identity,
            life=memory.life,
        )

    def _apply(self, plan: Plan, after: Positions, chunk: Chunk | None) -> None:
        """Bring the state to where the committed log now is, in one write."""
        began = time.perf_counter()
        memory, batch = self._memory, self._state.batch()
        batch.drop_pending_before(memory.expired_ms, plan.expired_until_ms)
        memory.expired_ms = max(memory.expired_ms, plan.expired_until_ms)
        batch.drop_pending(plan.dropped_pending)
        batch.remember(plan.remembered.items())
        batch.add_pending((*place, *row) for place, row in plan.new_pending.items())
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
        """Stop the producer and close the state; the loop must have ended."""
        self._let_go()
        await quietly_stopped(self._producer.stop)
        self._state.close()
