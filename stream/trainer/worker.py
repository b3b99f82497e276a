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
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial

from aiokafka.errors import KafkaError
from faust.types import TP
from prometheus_client import CollectorRegistry

from model.predictor import Predictor
from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.chain_name import ChainName
from state.errors import SnapshotError
from state.registry import RegistryState
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.deltas.writer import DeltaWriter
from stream.errors import Fenced, NoAnswer, RegistryError
from stream.kafka.cluster import Cluster, describe_cluster
from stream.kafka.transport import Run
from stream.records.dead_letter import DeadLetter
from stream.registry.collect import collect_by_itself
from stream.registry.follower import RegistryFollower
from stream.registry.writer import RegistryWriter
from stream.settings import HttpSettings, KafkaSettings, TrainerSettings
from stream.topics.names import TopicNames
from stream.trainer.anchors import Anchors
from stream.trainer.batching import BatchCutter
from stream.trainer.chain import NAME as CHAIN
from stream.trainer.chain import Chain
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import ExampleDecoder
from stream.trainer.judge import Judge
from stream.trainer.letters import LetterBox
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.pipeline import Pipeline
from stream.trainer.prepare import Prepared, gate_state, place_again, prepare, topic_ids
from stream.trainer.rebase import go_on_in_place
from stream.trainer.skew import SkewCheck, load_reference
from stream.trainer.snapshots import Publisher
from stream.trainer.standby import Standby
from stream.trainer.training import Training
from stream.worker import Part, Worker, fatal, guarded, new_prometheus, serve

__all__ = ["TrainerWorker", "run_trainer"]

log = logging.getLogger(__name__)

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
        self._scores, self._metrics = scores, metrics
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
            if time.monotonic() >= anchor_due:
                anchor_due = time.monotonic() + ANCHOR_S
                await self._show_gate()
            try:
                await self._registry.tag_due(self._snapshots)
            except (RegistryError, NoAnswer) as error:  # also when fenced: then the next announcement says so
                log.warning("tagging good versions: %s", error)

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
        await self._anchors.follow(state, self._training.watermark_ms)
        newer = sum(1 for version in state.versions if version > (state.champion.version or 0))
        self._metrics.judged(self._judge.report(), newer)

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
    take_over: bool = False,
) -> None:
    """Run a trainer until it gets a signal to stop. It stands by while another one leads.

    Args:
        new_model: begin from nothing at the start of the log, whatever the store holds. Takes over, too.
        take_over: replace a trainer that leads.

    Raises:
        TopicError: topics are missing.
        NoAnswer: Kafka can't be reached.
        ModelError: no features are named, or the newest version is of another schema or model.
        SnapshotError: the store can't be read, or it and the registry don't know of each other's versions.
        PositionError: the log isn't the one that the newest version was trained on, or lost examples.
        StreamError: the port for metrics is taken, the group of trainers doesn't let this one in, or a new model can't lead.
    """
    cluster = await describe_cluster(kafka, (names.examples, names.dead_letters, names.snapshots, names.deltas))
    who = f"trainer@{socket.gethostname()}:{os.getpid()}"
    registry = RegistryWriter(kafka, names, who=who)
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
            fatal("trainer", Fenced(f"expected to be the only trainer that leads: {taken}. Started again, this one stands by."))

    follower = RegistryFollower(kafka, names, on_change=end_if_replaced)
    prometheus = new_prometheus()
    standby = Standby(
        kafka=kafka,
        settings=settings,
        names=names,
        cluster=cluster,
        http=http,
        prometheus=prometheus,
        who=who,
        look=look,
        place_again=partial(place_again, kafka=kafka, settings=settings, names=names, cluster=cluster),
        take_over=take_over,
        new_model=new_model,
    )
    closing: list[Callable[[], Awaitable[None]]] = [follower.close, registry.close]
    async with standby:
        try:
            # Taking an epoch ends the trainer that runs, so everything that could keep this one from starting is checked first.
            await standby.until_chosen()
            # From here on no other trainer announces a version that this one would not know of.
            epoch = await registry.take_trainer_epoch()
            await follower.start()
            prepared = await standby.newest(follower.state)
            start = prepared.start
            came_from = "a new model" if start.version is None else f"version {start.version}, {start.examples_seen} examples"
            log.info("epoch %d on %s, going on from %s at %s", epoch, prepared.learner.device, came_from, prepared.positions)
            deltas = DeltaWriter(kafka, names, epoch=epoch)
            closing.append(deltas.close)
            # From here on no older trainer writes a delta, so what the log holds by now is all that scorers can have applied.
            await deltas.open()
            worker = await _built(
                prepared,
                epoch,
                deltas,
                kafka=kafka,
                settings=settings,
                names=names,
                cluster=cluster,
                schema=schema,
                model=model,
                snapshots=snapshots,
                store=store,
                registry=registry,
                follower=follower,
                prometheus=prometheus,
            )
            standby.began(prepared, worker.positions, model.batch_rows)
            await serve(worker, http=http, prometheus=prometheus, server=standby.server)
        finally:
            for close in closing:
                await close()


async def _built(
    prepared: Prepared,
    epoch: int,
    deltas: DeltaWriter,
    *,
    kafka: KafkaSettings,
    settings: TrainerSettings,
    names: TopicNames,
    cluster: Cluster,
    schema: FeatureSchema,
    model: ModelSettings,
    snapshots: SnapshotSettings,
    store: SnapshotStore,
    registry: RegistryWriter,
    follower: RegistryFollower,
    prometheus: CollectorRegistry,
) -> TrainerWorker:
    """The worker with all its parts."""
    start = prepared.start
    metrics = TrainerMetrics(prometheus)
    scores = Evaluation(settings.metrics_window, settings.evaluation_from_ms)
    base = await go_on_in_place(prepared.learner, start, kafka, names)
    chain = Chain(str(ChainName(model.name, epoch, 0)), deltas, base, prepared.learner.touched_keys)
    judge = Judge(snapshots, gate_state(start, epoch))
    anchors = Anchors(judge, store, snapshots, schema, model, settings.device)

    def reference(version: int) -> Predictor:
        return load_reference(store, version, schema, announced=follower.state.versions.get(version))

    skew = SkewCheck(reference, metrics)
    training = Training(
        prepared.learner,
        BatchCutter(model.batch_rows, prepared.positions),
        scores,
        metrics,
        max_batch_age_s=settings.max_batch_age_ms / 1000,
        watermark_ms=start.watermark_ms,
        observers=(skew,),
        bookkeeping={CHAIN: chain},
        judge=judge,
    )
    training.restore(start.bookkeeping)
    # The gate must know the champion's line before the first version is announced. Otherwise it would take a version of a new
    # line for one of the champion's line.
    await anchors.follow(follower.state, start.watermark_ms)
    letters = LetterBox(kafka, names.dead_letters, cluster.partitions[names.dead_letters], metrics, fatal)
    publisher = Publisher(
        store=store,
        registry=registry,
        chain=chain,
        letters=letters,
        settings=snapshots,
        schema=schema,
        model=model,
        epoch=epoch,
        start=start,
        metrics=metrics,
        more_metrics=skew.manifest_metrics,
        topic_ids=topic_ids(cluster, names),
    )
    return TrainerWorker(
        kafka=kafka,
        cluster=cluster,
        group=f"{names.prefix}{settings.group}",
        names=names,
        snapshots=snapshots,
        store=store,
        training=training,
        decoder=ExampleDecoder(schema),
        threads=settings.threads,
        skew=skew,
        publisher=publisher,
        letters=letters,
        deltas=deltas,
        registry=registry,
        follower=follower,
        judge=judge,
        anchors=anchors,
        scores=scores,
        metrics=metrics,
    )
