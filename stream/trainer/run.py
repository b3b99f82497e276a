"""A trainer's process: it stands by, leads once it is chosen, and takes every step before the worker in its order."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Awaitable, Callable
from functools import partial

from prometheus_client import CollectorRegistry

from model.predictor import Predictor
from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.chain_name import ChainName
from state.registry import RegistryState
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.deltas.writer import DeltaWriter
from stream.errors import Fenced
from stream.kafka.cluster import Cluster, describe_cluster
from stream.registry.follower import RegistryFollower
from stream.registry.writer import RegistryWriter
from stream.settings import HttpSettings, KafkaSettings, TrainerSettings
from stream.topics.names import TopicNames
from stream.trainer.anchors import Anchors
from stream.trainer.batching import BatchCutter
from stream.trainer.canary import CanaryWatch
from stream.trainer.canary_metrics import CanaryMetrics
from stream.trainer.chain import NAME as CHAIN
from stream.trainer.chain import Chain
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import ExampleDecoder
from stream.trainer.judge import Judge
from stream.trainer.letters import LetterBox
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.prepare import Prepared, gate_state, place_again, prepare, topic_ids
from stream.trainer.rebase import go_on_in_place
from stream.trainer.sanity import Sanity
from stream.trainer.score_shift import ScoreShift
from stream.trainer.skew import SkewCheck, load_reference
from stream.trainer.snapshots import Publisher
from stream.trainer.standby import Standby
from stream.trainer.training import Training
from stream.trainer.worker import TrainerWorker
from stream.worker import fatal, new_prometheus, serve

__all__ = ["run_trainer"]

log = logging.getLogger(__name__)


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
        row_precision=snapshots.row_precision,
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
    chain = Chain(
        str(ChainName(model.name, epoch, 0)),
        deltas,
        base,
        prepared.learner.touched_keys,
        row_precision=snapshots.row_precision,
    )
    judge = Judge(snapshots, gate_state(start, epoch))
    anchors = Anchors(judge, store, snapshots, schema, model, prepared.learner, settings.device)

    def reference(version: int) -> Predictor:
        return load_reference(store, version, schema, announced=follower.state.versions.get(version))

    def scored_by(version: int, delta: int) -> int | None:
        return follower.state.version_that_scored(version, delta)

    skew = SkewCheck(reference, scored_by, metrics)
    canary = CanaryWatch(CanaryMetrics(prometheus))
    training = Training(
        prepared.learner,
        BatchCutter(model.batch_rows, prepared.positions),
        scores,
        metrics,
        max_batch_age_s=settings.max_batch_age_ms / 1000,
        watermark_ms=start.watermark_ms,
        observers=(skew, canary),
        bookkeeping={CHAIN: chain, "canary": canary},
        judge=judge,
        sanity=Sanity(judge, ScoreShift(prepared.learner), snapshots),
        anchors=anchors,
    )
    training.restore(start.bookkeeping)
    # The gate must know the champion's line before the first version is announced. Otherwise it would take a version of a new
    # line for one of the champion's line.
    await anchors.follow(follower.state, start.watermark_ms)
    canary.follow(follower.state)
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
        canary=canary,
        scores=scores,
        metrics=metrics,
    )
