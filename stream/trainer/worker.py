"""The trainer worker: hands runs of `examples` to the training pipeline, and publishes versions.

One trainer leads, and all others stand by (`stream.trainer.standby`). The leader's progress is in its snapshots and not in
Kafka: it commits nothing to the group, and positions are its own. Three things keep a former leader, which may have been
stopped or cut off, from doing harm or getting in the way:

- Each leader takes an epoch in the registry. With an older epoch nothing can be announced, and a trainer that reads of a newer
  one ends.
- The group of trainers no longer knows it, so it ends as soon as it hears from the group (`stream.trainer.leadership`).
- The group that reads `examples` knows every leader by one fixed instance id. So the new leader gets the partitions at once,
  without waiting for the old one's session to time out.

A leader that is sent back (`state.rewinds`) goes back by itself, in the same process: what it has under way is dropped, and all
parts that belong to the weights are replaced by those of the older version (`Parts`). It keeps its lead, its epoch and its
clients.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from aiokafka.errors import KafkaError
from faust.types import TP

from model.census import TableStats
from state.errors import SnapshotError
from state.registry import RegistryState
from state.rewinds import Rewind
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
from stream.trainer.calibration import CalibrationWatch
from stream.trainer.canary import CanaryWatch
from stream.trainer.challenge import ChallengeWatch
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import ExampleDecoder
from stream.trainer.judge import Judge
from stream.trainer.letters import LetterBox
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.pipeline import Pipeline
from stream.trainer.served import ServedWatch, act_on_alarm
from stream.trainer.skew import SkewCheck
from stream.trainer.snapshots import Publisher
from stream.trainer.table_metrics import TableMetrics
from stream.trainer.training import Training
from stream.worker import Part, Worker, fatal, guarded

__all__ = ["Parts", "TrainerWorker"]

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


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a trainer that belong to its weights.

    table   says what the table of rows is like now
    rewind  the rewind that these weights obey; None where nobody sent the trainer back
    """

    training: Training
    publisher: Publisher
    judge: Judge
    anchors: Anchors
    scores: Evaluation
    served: ServedWatch
    calibration: CalibrationWatch
    table: Callable[[], TableStats]
    rewind: Rewind | None = None


class TrainerWorker(Worker):
    """One process of the trainer. Must be built inside a running event loop. It is the owner of its `Pipeline`.

    Args:
        go_back: gives the parts for a rewind. The weights that are in use are overwritten, so nothing may use them by then.
        tracks: the registry of `main`, which knows all tracks; `follower` is that of the trainer's own.
    """

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
        parts: Parts,
        go_back: Callable[[], Awaitable[Parts]],
        decoder: ExampleDecoder,
        threads: int,
        skew: SkewCheck,
        letters: LetterBox,
        deltas: DeltaWriter,
        registry: RegistryWriter,
        follower: RegistryFollower,
        canary: CanaryWatch,
        challenge: ChallengeWatch,
        tracks: RegistryFollower,
        metrics: TrainerMetrics,
        table_metrics: TableMetrics,
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
        self._snapshots, self._store, self._skew = snapshots, store, skew
        self._letters, self._deltas, self._registry = letters, deltas, registry
        self._follower, self._metrics, self._decoder, self._threads = follower, metrics, decoder, threads
        self._canary, self._go_back, self._table_metrics = canary, go_back, table_metrics
        self._challenge, self._tracks = challenge, tracks
        self._intake = asyncio.Lock()  # held while the trainer goes back: nothing is handed over
        self._going: asyncio.Task[None] | None = None
        self._alarm = ""
        self._publishing: asyncio.Task[None] | None = None
        self._housekeeping: asyncio.Task[None] | None = None
        self._take(parts)

    def _take(self, parts: Parts) -> None:
        """Go on with these parts."""
        self._training, self._publisher, self._scores = parts.training, parts.publisher, parts.scores
        self._served, self._calibration, self._table = parts.served, parts.calibration, parts.table
        self._judge, self._anchors, self._rewind = parts.judge, parts.anchors, parts.rewind
        self._pipeline = Pipeline(self, parts.training, self._decoder, self._metrics, threads=self._threads)
        self._accepted = dict(parts.training.positions)
        """Next offset to hand over, by partition."""

    async def start(self) -> None:
        await super().start()
        await self._letters.start()
        self._begin()
        self.background(self._skew.run(), self._collect())
        self.registry_changed(self._follower.state)

    def _begin(self) -> None:
        self._pipeline.start()
        self._publishing = guarded(self._publisher.run(self._training, self._pipeline.between_batches), self.name)
        self._housekeeping = guarded(self._keep_house(), self.name)

    # Going back

    def registry_changed(self, state: RegistryState) -> None:
        """Take the registry: go back if somebody asks for it. Called on the event loop, once the worker has started."""
        if self._publishing is not None and self._asked_to_go_back() and (self._going is None or self._going.done()):
            self._going = guarded(self._rewound(), self.name)

    def _asked_to_go_back(self) -> bool:
        pending = self._follower.state.rewinds.pending
        return pending is not None and (self._rewind is None or pending.operation != self._rewind.operation)

    async def _rewound(self) -> None:
        """Drop what is under way, and go on from the version that the trainer was sent back to."""
        while self._asked_to_go_back():
            began = time.monotonic()
            if self._housekeeping is not None:  # it may be waiting for the training thread
                self._housekeeping.cancel()
                await asyncio.wait([self._housekeeping])
            self._publisher.close()
            if self._publishing is not None:
                await self._publishing  # a version under way is completed: it is of the line that is left
            await self._pipeline.stop()
            self._anchors.close()  # they are read through the live weights, which are overwritten
            async with self._intake:
                was, self.waiting_for = self.waiting_for, "going back to an older version"
                self._take(await self._go_back())
                await self.app.consumer.seek_runs({TP(self._topic, at): offset for at, offset in self._accepted.items()})
                self._begin()
                self.waiting_for = was
            self._metrics.rewinds.inc()
            log.info("went back within %.2f s, training on from %s", time.monotonic() - began, self._training.positions)

    # Runs and positions

    def next_offset(self, tp: TP) -> int | None:
        return self._accepted.get(tp.partition)

    async def deliver(self, run: Run) -> None:
        async with self._intake:
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
        reported = -1
        anchor_due = 0.0
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            training = self._training
            for partition, lag in self.lags(self._topic, training.positions):
                self._metrics.lag.labels(str(partition)).set(lag)
            if training.batches != reported:
                reported = training.batches
                self._metrics.watermark.set(training.watermark_ms / 1000)
                self._table_metrics.show(self._table())
                report = await asyncio.to_thread(lambda: self._scores.freeze().report())
                self._metrics.report(report)
                self._metrics.served(report["served", "window"], self._snapshots.served_calibration_band)
            await self._release(self._follower.state)
            if time.monotonic() >= anchor_due:
                anchor_due = time.monotonic() + ANCHOR_S
                await self._show_gate()
                self._metrics.calibrated(await asyncio.to_thread(self._calibration.report))
            await self._watch_served()
            try:
                await self._registry.tag_due(self._snapshots)
                await self._canary.conduct(self._registry, self._follower.state)
                await self._challenge.report(self._registry, self._tracks.state)
            except (RegistryError, NoAnswer) as error:  # also when fenced: then the next announcement says so
                log.warning("tagging good versions, or a canary: %s", error)

    async def _watch_served(self) -> None:
        """Act on served scores that are out of their band, while the trainer's track serves."""
        if self._tracks.state.serving.track != self._names.track:
            return
        state = self._follower.state
        self._served.follow(state)
        alarm = self._served.alarm
        if alarm != self._alarm:
            self._alarm = alarm
            log.log(logging.ERROR if alarm else logging.INFO, "served scores: %s", alarm or "in their band again")
        await act_on_alarm(self._served, state, self._registry, self._store, self._snapshots, self._metrics)

    async def _collect(self) -> None:
        """Delete versions that nothing needs any more, from time to time, and look how long Kafka keeps deltas."""
        while True:
            await asyncio.sleep(COLLECT_S)
            await self._publisher.retention.look(self._kafka, self._names.deltas)
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
        if self._going is not None and not self._going.done():
            # On the way back there is nothing to publish. The next trainer that starts goes back.
            self._going.cancel()
            await asyncio.wait([self._going])
            await self._deltas.close()
            await self._letters.close()
            return
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
