"""The trainer worker: a Faust app that hands runs of `examples` to the training pipeline, and publishes versions.

One trainer is active at a time. Its progress is in its snapshots and not in Kafka: nothing is committed to the group, and
positions are the trainer's own. A new trainer puts the old one out: it takes an epoch in the registry, with which the old one
can announce no more and ends as soon as it reads of it; and the group knows the trainer by a fixed name, so that the new one
has the partitions at once, without waiting for the old one's session to time out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from faust.types import TP

from model.predictor import Predictor
from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.registry import RegistryState
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.errors import Fenced, RegistryError
from stream.kafka.cluster import ClusterWatch, describe_cluster
from stream.kafka.transport import LogEnd, Run, RunSchema
from stream.registry.follower import RegistryReader
from stream.registry.log import read_registry
from stream.registry.writer import RegistryWriter
from stream.settings import HttpSettings, KafkaSettings, TrainerSettings
from stream.topics.names import TopicNames
from stream.trainer.anchors import Anchors
from stream.trainer.batching import BatchCutter
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import ExampleDecoder
from stream.trainer.judge import Judge
from stream.trainer.letters import LetterBox
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.pipeline import Pipeline
from stream.trainer.prepare import gate_state, prepare, topic_ids
from stream.trainer.skew import SkewCheck, load_reference
from stream.trainer.snapshots import Publisher
from stream.trainer.training import Training
from stream.worker.http import require_free
from stream.worker.runtime import build_app, fatal, new_registry, serve, source_part
from stream.worker.watchdog import Part

__all__ = ["TrainerWorker", "run_trainer"]

log = logging.getLogger(__name__)

# A trainer that was killed is replaced at once by its name; this is for one that hangs and has no replacement.
SESSION_TIMEOUT_MS = 10_000
# The group knows every trainer by this name: the newest one that joins is it. (The old one would join again under it, which
# aiokafka 0.14 doesn't know to be an end, and the two would push each other out; so the epoch decides.)
INSTANCE_ID = "trainer"
# How often gauges are brought up to date and a champion's time as `good` is looked at.
HOUSEKEEPING_S = 1.0
# How often it is looked whether another anchor is due: it looks at every version, and the rule counts in minutes.
ANCHOR_S = 5.0


class TrainerWorker:
    """One process of the trainer. Must be built inside a running event loop."""

    def __init__(
        self,
        *,
        kafka: KafkaSettings,
        group: str,
        topic: str,
        snapshots: SnapshotSettings,
        pipeline: Pipeline,
        publisher: Publisher,
        letters: LetterBox,
        registry: RegistryWriter,
        follower: RegistryReader,
        judge: Judge,
        anchors: Anchors,
        scores: Evaluation,
        metrics: TrainerMetrics,
        watch: ClusterWatch,
    ) -> None:
        self._topic, self._snapshots, self._watch = topic, snapshots, watch
        self._pipeline, self._publisher, self._letters, self._registry = pipeline, publisher, letters, registry
        self._follower, self._judge, self._anchors = follower, judge, anchors
        self._training = pipeline.training
        self._scores, self._metrics = scores, metrics
        # Next offset to hand over, by partition.
        self._accepted = dict(self._training.positions)
        self._standing = "joining the group"
        self._publishing: asyncio.Task[None] | None = None
        self._housekeeping: asyncio.Task[None] | None = None
        self.app = build_app(
            group,
            kafka,
            next_offset=lambda tp: self._accepted.get(tp.partition),
            session_timeout_ms=SESSION_TIMEOUT_MS,
            instance_id=INSTANCE_ID,
        )
        # Acks are off since positions are ours.
        runs = self.app.topic(topic, schema=RunSchema(), acks=False)
        self.app.agent(runs, name="trainer")(self._consume)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_rebalance_complete.connect(self._on_rebalance_complete)

    async def start(self) -> None:
        """Start the threads and the background tasks; `serve` starts the app."""
        await self._letters.start()
        self._pipeline.start()
        training = self._training
        self._publishing = asyncio.ensure_future(self._publisher.run(lambda: training.examples_seen, self._pipeline.capture))
        self._housekeeping = asyncio.ensure_future(self._keep_house())
        for task in (self._publishing, self._housekeeping):
            task.add_done_callback(_ended)

    async def _consume(self, stream: Any) -> None:
        try:
            async for run in stream:
                await self._deliver(run)
        except Exception as error:  # an exception that leaves an agent would count as handled
            fatal("trainer agent", error)

    async def _deliver(self, run: Run) -> None:
        expected = self._accepted[run.partition]
        if run.before > expected:
            await self.app.consumer.seek_runs({TP(run.topic, run.partition): expected})
        elif run.after > expected:  # else it was read before a rebalance, and again after it
            self._accepted[run.partition] = run.after
            await self._pipeline.put(_from(run, expected))

    async def _on_revoked(self, *args: Any, **kwargs: Any) -> None:
        self._standing = "partitions are being assigned"

    async def _on_rebalance_complete(self, *args: Any, **kwargs: Any) -> None:
        ours = {tp.partition for tp in self.app.consumer.assignment() if tp.topic == self._topic}
        others = sorted(self._accepted.keys() - ours)
        if others:
            self._standing = f"partitions {others} of {self._topic} belong to another member of the group {self.app.conf.id}"
            log.error("expected to be alone: %s. Give only trainers that group, and run one at a time.", self._standing)
        else:
            self._standing = ""

    async def _keep_house(self) -> None:
        training = self._training
        reported = -1
        anchor_due = 0.0
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            for partition, position in training.positions.items():
                end = self._log_end(partition)
                if end is not None:
                    self._metrics.lag.labels(str(partition)).set(max(0, end.offset - position))
            if training.batches != reported:
                reported = training.batches
                self._metrics.watermark.set(training.watermark_ms / 1000)
                report = await asyncio.to_thread(lambda: self._scores.freeze().report())
                self._metrics.report(report)
                self._metrics.served(report["served", "window"], self._snapshots.served_calibration_band)
            if time.monotonic() >= anchor_due:
                anchor_due = time.monotonic() + ANCHOR_S
                await self._show_gate()
            try:
                await self._registry.tag_due(self._snapshots)
            except RegistryError as error:  # also when fenced: then the next announcement says so
                log.warning("tagging good versions: %s", error)

    async def _show_gate(self) -> None:
        """Take up the anchor that is due, and show what the gate knows."""
        state = self._follower.state
        await self._anchors.follow(state, self._training.watermark_ms)
        newer = sum(1 for version in state.versions if version > (state.champion.version or 0))
        self._metrics.judged(self._judge.report(), newer)

    def _log_end(self, partition: int) -> LogEnd | None:
        end: LogEnd | None = self.app.consumer.log_end(TP(self._topic, partition))
        return end

    def ready(self) -> str | None:
        return self._standing or None

    def parts(self) -> Iterable[Part]:
        """Partitions by the positions that are trained; before that, the way into the group."""
        if self._standing:
            yield Part("the group's assignment", self.app.consumer_generation_id, self._standing)
            return
        for number, position in self._training.positions.items():
            yield source_part(self.app, self._watch, TP(self._topic, number), position)

    async def drain(self) -> None:
        """Learn the batch under way to its end, publish what is trained, and close everything."""
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        self._publisher.close()
        if self._publishing is not None:
            await self._publishing  # a version under way becomes whole
        await self._pipeline.stop()
        training = self._training
        if self._publisher.has_news(training.examples_seen):
            await self._publisher.publish(training.capture())
        await self._letters.close()


def _from(run: Run, offset: int) -> Run:
    """The part of a run that begins at an offset."""
    if run.before == offset:
        return run
    records = [record for record in run.records if record.offset >= offset]
    return Run(run.topic, run.partition, offset, run.after, run.end, records)


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        fatal("trainer", error)


async def run_trainer(
    *,
    kafka: KafkaSettings,
    settings: TrainerSettings,
    names: TopicNames,
    http: HttpSettings,
    schema: FeatureSchema,
    model: ModelSettings,
    snapshots: SnapshotSettings,
    new_model: bool = False,
) -> None:
    """Run a trainer until it is told to stop.

    Args:
        new_model: begin from nothing at the start of the log, whatever the store holds.

    Raises:
        TopicError: topics are missing.
        NoAnswer: Kafka can't be reached.
        ModelError: no features are named, or the newest version is of another schema or model.
        SnapshotError: the store can't be read, or it and the registry don't know of each other's versions.
        PositionError: the log isn't the one that the newest version was trained on, or lost examples.
        StreamError: the port for metrics is taken.
    """
    cluster = await describe_cluster(kafka, (names.examples, names.dead_letters, names.snapshots))
    registry = RegistryWriter(kafka, names, who=f"trainer@{socket.gethostname()}:{os.getpid()}")
    store = SnapshotStore(snapshots)
    log.info("snapshots at %s", store.url)
    look = partial(
        prepare,
        kafka=kafka,
        settings=settings,
        names=names,
        cluster=cluster,
        store=store,
        schema=schema,
        model=model,
        new_model=new_model,
    )
    epoch: int | None = None

    def end_if_replaced(state: RegistryState) -> None:
        if epoch is not None and state.trainer.epoch > epoch:
            taken = f"epoch {state.trainer.epoch} was taken by {state.trainer.who}, this trainer's is {epoch}"
            fatal("trainer", Fenced(f"expected to be the only trainer: {taken}. Run one at a time."))

    follower = RegistryReader(kafka, names, on_change=end_if_replaced)
    try:
        # An epoch ends the trainer that runs, so first everything that could keep this one from starting.
        require_free(http)
        prepared = await look(await read_registry(kafka, names))
        # From here on no other trainer announces a version that we would not know of.
        epoch = await registry.take_trainer_epoch()
        await follower.start()
        if follower.state.newest != prepared.newest:
            prepared = await look(follower.state)
        learner, start, positions = prepared.learner, prepared.start, prepared.positions
        came_from = "a new model" if start.version is None else f"version {start.version}, {start.examples_seen} examples"
        log.info("epoch %d on %s, going on from %s at %s", epoch, learner.device, came_from, positions)

        prometheus = new_registry()
        metrics = TrainerMetrics(prometheus)
        scores = Evaluation(settings.metrics_window, settings.evaluation_from_ms)
        judge = Judge(snapshots, gate_state(start, epoch))
        anchors = Anchors(judge, store, snapshots, schema, model, settings.device)

        def reference(version: int) -> Predictor:
            return load_reference(store, version, schema, announced=follower.state.versions.get(version))

        skew = SkewCheck(reference, metrics)
        training = Training(
            learner,
            BatchCutter(model.batch_rows, positions),
            scores,
            metrics,
            max_batch_age_s=settings.max_batch_age_ms / 1000,
            watermark_ms=start.watermark_ms,
            observers=(skew,),
            judge=judge,
        )
        training.restore(start.bookkeeping)
        watch = ClusterWatch(kafka, cluster, changed=lambda error: fatal("trainer", error))
        # Before the first version: one of a new line must not be taken for the champion's.
        await anchors.follow(follower.state, start.watermark_ms)
        letters = LetterBox(kafka, names.dead_letters, cluster.partitions[names.dead_letters], metrics, fatal)
        worker = TrainerWorker(
            kafka=kafka,
            group=f"{names.prefix}{settings.group}",
            topic=names.examples,
            snapshots=snapshots,
            pipeline=Pipeline(
                training, ExampleDecoder(schema), metrics, letters=letters.put, fatal=fatal, threads=settings.threads
            ),
            publisher=Publisher(
                store=store,
                registry=registry,
                letters=letters,
                settings=snapshots,
                schema=schema,
                model=model,
                epoch=epoch,
                start=start,
                metrics=metrics,
                more_metrics=skew.manifest_metrics,
                topic_ids=topic_ids(cluster, names),
            ),
            letters=letters,
            registry=registry,
            follower=follower,
            judge=judge,
            anchors=anchors,
            scores=scores,
            metrics=metrics,
            watch=watch,
        )
        await worker.start()
        await serve(worker, name="trainer", http=http, registry=prometheus, beside=(watch.run, skew.run))
    finally:
        await follower.close()
        await registry.close()
