"""The trainer worker: hands runs of `examples` to the training pipeline, and publishes versions.

One trainer leads, and all others stand by (`stream.trainer.standby`). The leader's progress is in its snapshots and not in
Kafka: it commits nothing to the group, and positions are its own. Three things keep a former leader, which may have been
stopped or cut off, from doing harm or getting in the way:

- Each leader takes an epoch in the registry. With an older epoch nothing can be announced, and a trainer that reads of a newer
  one ends.
- The group of trainers no longer knows it, so it ends as soon as it hears from the group (`stream.trainer.leadership`).
- The group that reads `examples` knows every leader by one fixed instance id. So the new leader gets the partitions at once,
  without waiting for the old one's session to time out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from aiokafka.errors import KafkaError
from faust.types import TP

from state.errors import SnapshotError
from state.registry import RegistryState
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.deltas.writer import DeltaWriter
from stream.errors import NoAnswer, RegistryError
from stream.kafka.cluster import Cluster
from stream.kafka.transport import Run
from stream.records.dead_letter import DeadLetter
from stream.registry.collect import collect_by_itself
from stream.registry.follower import RegistryFollower
from stream.registry.writer import RegistryWriter
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames
from stream.trainer.anchors import Anchors
from stream.trainer.canary import CanaryWatch
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import ExampleDecoder
from stream.trainer.judge import Judge
from stream.trainer.letters import LetterBox
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.pipeline import Pipeline
from stream.trainer.skew import SkewCheck
from stream.trainer.snapshots import Publisher
from stream.trainer.training import Training
from stream.worker import Part, Worker, fatal, guarded

__all__ = ["TrainerWorker"]

log = logging.getLogger(__name__)

T = TypeVar("T")

# In the group that reads `examples` a leader is replaced at once under its instance id. This time-out is for one that hangs and
# has no replacement.
SESSION_TIMEOUT_MS = 10_000
# The group that reads `examples` knows every leader by this id, and the newest one that joins is the member. A former leader
# may join again, since aiokafka 0.14 does so after it was replaced; it ends soon, by the group of trainers or by its epoch.
INSTANCE_ID = "trainer"
# How often gauges are updated, and how often to check which versions are due to be tagged good.
HOUSEKEEPING_S = 1.0
# How often versions are deleted that nothing needs any more. It reads the registry whole, and lists the store.
COLLECT_S = 60.0
# How often to check whether another anchor is due. The check looks at every version, and the rule counts in minutes.
ANCHOR_S = 5.0


class TrainerWorker(Worker):
    """One process of the trainer. Must be built inside a running event loop. It is the owner of its `Pipeline`."""

    name = "trainer"

    def __init__(
        self,
        *,
        kafka: KafkaSettings,
        cluster: Cluster,
        group: str,
        names: TopicNames,
        snapshots: SnapshotSettings,
        store: SnapshotStore,
        training: Training,
        decoder: ExampleDecoder,
        threads: int,
        skew: SkewCheck,
        publisher: Publisher,
        letters: LetterBox,
        deltas: DeltaWriter,
        registry: RegistryWriter,
        follower: RegistryFollower,
        judge: Judge,
        anchors: Anchors,
        canary: CanaryWatch,
        scores: Evaluation,
        metrics: TrainerMetrics,
    ) -> None:
        super().__init__(
            kafka,
            cluster,
            group=group,
            topics=(names.examples,),
            session_timeout_ms=SESSION_TIMEOUT_MS,
            instance_id=INSTANCE_ID,
        )
        self._kafka, self._names, self._topic = kafka, names, names.examples
        self._snapshots, self._store, self._training, self._skew = snapshots, store, training, skew
        self._pipeline = Pipeline(self, training, decoder, metrics, threads=threads)
        self._publisher, self._letters, self._deltas, self._registry = publisher, letters, deltas, registry
        self._follower, self._judge, self._anchors = follower, judge, anchors
        self._canary, self._scores, self._metrics = canary, scores, metrics
        # Next offset to hand over, by partition.
        self._accepted = dict(training.positions)
        self._publishing: asyncio.Task[None] | None = None
        self._housekeeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await super().start()
        await self._letters.start()
        self._pipeline.start()
        training = self._training
        self._publishing = guarded(self._publisher.run(training, self._pipeline.between_batches), self.name)
        self._housekeeping = guarded(self._keep_house(), self.name)
        self.background(self._skew.run(), self._collect())

    # Runs and positions

    def next_offset(self, tp: TP) -> int | None:
        return self._accepted.get(tp.partition)

    async def deliver(self, run: Run) -> None:
        expected = self._accepted[run.partition]
        if run.before > expected:
            await self.app.consumer.seek_runs({TP(run.topic, run.partition): expected})
        elif run.after > expected:  # otherwise the run was read before a rebalance, and again after it
            self._accepted[run.partition] = run.after
            await self._pipeline.put(_from(run, expected))

    async def revoked(self) -> None:
        """Nothing to do: positions are the trainer's own, and what it has taken is trained."""

    async def assigned(self) -> str | None:
        ours = {tp.partition for tp in self.app.consumer.assignment() if tp.topic == self._topic}
        others = sorted(self._accepted.keys() - ours)
        if not others:
            return None
        missing = f"partitions {others} of {self._topic} belong to another member of the group {self.group}"
        log.error("expected to be alone: %s. Give only trainers that group, and run one at a time.", missing)
        return missing

    # What the pipeline reports (`Owner`)

    def take_letters(self, letters: list[DeadLetter]) -> None:
        self._letters.put(letters)

    def failed(self, what: str, error: BaseException) -> None:
        fatal(what, error)

    # Housekeeping

    async def _keep_house(self) -> None:
        training = self._training
        reported = -1
        anchor_due = 0.0
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            for partition, lag in self.lags(self._topic, training.positions):
                self._metrics.lag.labels(str(partition)).set(lag)
            if training.batches != reported:
                reported = training.batches
                self._metrics.watermark.set(training.watermark_ms / 1000)
                report = await asyncio.to_thread(lambda: self._scores.freeze().report())
                self._metrics.report(report)
                self._metrics.served(report["served", "window"], self._snapshots.served_calibration_band)
            await self._release(self._follower.state)
            if time.monotonic() >= anchor_due:
                anchor_due = time.monotonic() + ANCHOR_S
                await self._show_gate()
            try:
                await self._registry.tag_due(self._snapshots)
                await self._canary.conduct(self._registry, self._follower.state)
            except (RegistryError, NoAnswer) as error:  # also when fenced: then the next announcement says so
                log.warning("tagging good versions, or a canary: %s", error)

    async def _collect(self) -> None:
        """Delete versions that nothing needs any more, from time to time."""
        while True:
            await asyncio.sleep(COLLECT_S)
            try:
                done = await collect_by_itself(self._kafka, self._names, self._registry, self._store, self._snapshots)
                if done.versions:
                    self._metrics.deleted_versions.inc(len(done.versions))
                    log.info("deleted %d versions, %d MB: %s", len(done.versions), done.size // 1_000_000, done.versions)
            except (RegistryError, NoAnswer, SnapshotError, KafkaError) as error:  # the next time deletes what is left
                log.warning("deleting versions that nothing needs: %s", error)

    async def _show_gate(self) -> None:
        """Change to the anchor that is due, and update the metrics of the gate."""
        state = self._follower.state
        await self._anchors.follow(state, self._training.watermark_ms, self._between_batches)
        self._metrics.anchor_rows.set(self._anchors.saved_rows)
        newer = sum(1 for version in state.versions if version > (state.champion.version or 0))
        self._metrics.judged(self._judge.report(), newer)

    async def _release(self, state: RegistryState) -> None:
        """Carry out an operator's release of this line, once."""
        release, judge = state.release, self._judge
        if release.line == judge.report().line and release.operation != judge.released:
            training = self._training
            await self._between_batches(lambda: training.release(release.operation, release.who, release.reason))

    async def _between_batches(self, work: Callable[[], T]) -> T:
        return await self._pipeline.between_batches(lambda training: work())

    # Progress and shutdown

    def positions(self) -> Mapping[int, int]:
        """The next offset to train, by partition."""
        return self._training.positions

    def work(self) -> Iterable[Part]:
        """Partitions, by the positions that are trained."""
        return self.source_parts(self._topic, self._training.positions)

    async def drain(self) -> None:
        """Train the batch under way to its end, publish what is trained, and close everything."""
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        self._publisher.close()
        if self._publishing is not None:
            await self._publishing  # a version under way is completed
        await self._pipeline.stop()
        await self._publisher.drain(self._training)
        await self._deltas.close()
        await self._letters.close()


def _from(run: Run, offset: int) -> Run:
    """The part of a run that begins at an offset."""
    if run.before == offset:
        return run
    records = [record for record in run.records if record.offset >= offset]
    return Run(run.topic, run.partition, offset, run.after, records)
