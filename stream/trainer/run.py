"""A trainer's process: it stands by, leads once it is chosen, and takes every step before the worker in its order."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from prometheus_client import CollectorRegistry

from model.derived import as_served
from model.learner import Learner
from model.predictor import Predictor
from model.schema import FeatureSchema
from model.settings import ModelSettings
from model.table_settings import TableSettings
from state.chain_name import ChainName
from state.registry import RegistryState
from state.rewinds import Rewind, Rewinds, joined
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from state.tracks import MAIN, Track, numbers_of
from stream.deltas.newest_epoch import newest_epoch
from stream.deltas.writer import DeltaWriter
from stream.errors import Fenced
from stream.kafka.cluster import Cluster, describe_cluster
from stream.registry.follower import RegistryFollower
from stream.registry.tracks import registered_track
from stream.registry.writer import RegistryWriter
from stream.settings import HttpSettings, KafkaSettings, TrainerSettings
from stream.topics.names import TopicNames
from stream.trainer.anchors import Anchors
from stream.trainer.batching import BatchCutter
from stream.trainer.calibration import CalibrationWatch
from stream.trainer.canary import CanaryWatch
from stream.trainer.canary_metrics import CanaryMetrics
from stream.trainer.chain import NAME as CHAIN
from stream.trainer.chain import Chain
from stream.trainer.challenge import NAME as CHALLENGE
from stream.trainer.challenge import ChallengeWatch
from stream.trainer.challenge_metrics import ChallengeMetrics
from stream.trainer.drift import Drift
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import ExampleDecoder
from stream.trainer.judge import Judge
from stream.trainer.letters import LetterBox
from stream.trainer.log_retention import LogRetention, Mark
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.past import Past
from stream.trainer.prepare import Prepared, gate_state, place_again, prepare, topic_ids
from stream.trainer.rebase import go_on_in_place
from stream.trainer.sanity import Sanity
from stream.trainer.score_shift import ScoreShift
from stream.trainer.served import NAME as SERVED
from stream.trainer.served import ServedWatch
from stream.trainer.skew import SkewCheck, load_reference
from stream.trainer.skips import Skips
from stream.trainer.snapshots import Publisher
from stream.trainer.standby import Standby
from stream.trainer.start import Start
from stream.trainer.table_metrics import TableMetrics, table_figures
from stream.trainer.training import Training
from stream.trainer.worker import Parts, TrainerWorker
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
    table: TableSettings | None = None,
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
    track = await registered_track(kafka, names, who)
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
        table=table,
        new_model=new_model,
        row_precision=snapshots.row_precision,
    )
    epoch: int | None = None
    worker: TrainerWorker | None = None

    def on_change(state: RegistryState) -> None:
        if epoch is not None and state.trainer.epoch > epoch:
            taken = f"epoch {state.trainer.epoch} was taken by {state.trainer.who}, this trainer's is {epoch}"
            fatal("trainer", Fenced(f"expected to be the only trainer that leads: {taken}. Started again, this one stands by."))
        if worker is not None:
            worker.registry_changed(state)

    follower = RegistryFollower(kafka, names, on_change=on_change)
    tracks = follower if names.track == MAIN else RegistryFollower(kafka, names.of_track(MAIN))
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
    if tracks is not follower:
        closing.append(tracks.close)
    async with standby:
        try:
            # Taking an epoch ends the trainer that runs, so everything that could keep this one from starting is checked first.
            await standby.until_chosen()
            # From here on no other trainer announces a version that this one would not know of.
            above = max(await newest_epoch(kafka, names), track.first_number)
            epoch = await registry.take_trainer_epoch(above=above)
            await follower.start()
            if tracks is not follower:
                await tracks.start()
            prepared = await standby.newest(follower.state)
            start = prepared.start
            came_from = "a new model" if start.version is None else f"version {start.version}, {start.examples_seen} examples"
            log.info("epoch %d on %s, going on from %s at %s", epoch, prepared.learner.device, came_from, prepared.positions)
            deltas = DeltaWriter(kafka, names, epoch=epoch)
            closing.append(deltas.close)
            # From here on no older trainer writes a delta, so what the log holds by now is all that scorers can have applied.
            await deltas.open()
            trainer = _Trainer(
                epoch=epoch,
                track=track,
                tracks=tracks,
                who=who,
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
                deltas=deltas,
                prometheus=prometheus,
            )
            worker = await trainer.worker(prepared)
            standby.began(prepared, worker.positions, model.batch_rows)
            await serve(worker, http=http, prometheus=prometheus, server=standby.server)
        finally:
            for close in closing:
                await close()


@dataclass(slots=True)
class _Trainer:
    """Puts the worker together, and the parts that belong to its weights: at the start, and when it is sent back."""

    epoch: int
    track: Track
    tracks: RegistryFollower
    who: str
    kafka: KafkaSettings
    settings: TrainerSettings
    names: TopicNames
    cluster: Cluster
    schema: FeatureSchema
    model: ModelSettings
    snapshots: SnapshotSettings
    store: SnapshotStore
    registry: RegistryWriter
    follower: RegistryFollower
    deltas: DeltaWriter
    prometheus: CollectorRegistry
    metrics: TrainerMetrics = field(init=False)
    skew: SkewCheck = field(init=False)
    canary: CanaryWatch = field(init=False)
    challenge: ChallengeWatch = field(init=False)
    letters: LetterBox = field(init=False)
    chains: int = 0
    rewinds: Rewinds = field(default_factory=Rewinds)
    """The last that were known: they outlive the topic `snapshots`."""

    async def worker(self, prepared: Prepared) -> TrainerWorker:
        """The worker with all its parts."""
        self.metrics = metrics = TrainerMetrics(self.prometheus)
        letters_topic = self.names.dead_letters
        self.letters = LetterBox(
            self.kafka, letters_topic, self.cluster.partitions[letters_topic], metrics, fatal, wanted=self.serves
        )

        def reference(version: int) -> Predictor:
            return load_reference(self.store, version, self.schema, announced=self.follower.state.versions.get(version))

        def scored_by(version: int, delta: int) -> int | None:
            return self.follower.state.version_that_scored(version, delta)

        self.skew = SkewCheck(reference, scored_by, metrics, as_served=partial(as_served, schema=self.schema))
        self.canary = CanaryWatch(CanaryMetrics(self.prometheus))
        self.challenge = ChallengeWatch(self.track, ChallengeMetrics(self.prometheus))
        return TrainerWorker(
            kafka=self.kafka,
            cluster=self.cluster,
            group=f"{self.names.prefix}{self.settings.group}{self.names.suffix}",
            names=self.names,
            snapshots=self.snapshots,
            store=self.store,
            parts=await self.parts(prepared),
            go_back=partial(self.go_back, prepared.learner),
            decoder=ExampleDecoder(self.schema),
            threads=self.settings.threads,
            skew=self.skew,
            canary=self.canary,
            challenge=self.challenge,
            tracks=self.tracks,
            letters=self.letters,
            deltas=self.deltas,
            registry=self.registry,
            follower=self.follower,
            metrics=metrics,
            table_metrics=TableMetrics(self.prometheus),
        )

    def serves(self) -> bool:
        """Whether scorers answer with this trainer's track."""
        return self.tracks.state.serving.track == self.names.track

    async def go_back(self, learner: Learner) -> Parts:
        """The parts for the version that the registry sends the trainer back to. Its weights are put into `learner`."""
        prepared = await prepare(
            self.follower.state,
            kafka=self.kafka,
            settings=self.settings,
            names=self.names,
            cluster=self.cluster,
            store=self.store,
            schema=self.schema,
            model=self.model,
            new_model=False,
            row_precision=self.snapshots.row_precision,
            learner=learner,
        )
        return await self.parts(prepared)

    async def parts(self, prepared: Prepared) -> Parts:
        """The parts that belong to some weights. They begin a new chain."""
        start, learner, rewind = prepared.start, prepared.learner, prepared.rewind
        scores = Evaluation(self.settings.metrics_window, self.settings.evaluation_from_ms)
        base = await go_on_in_place(learner, start, self.kafka, self.names, sent_back=rewind is not None)
        chain = Chain(
            str(ChainName(self.names.chains or self.model.name, self.epoch, self.chains)),
            self.deltas,
            base,
            learner.touched_keys,
            row_precision=self.snapshots.row_precision,
            schema_hash=self.schema.fingerprint(),
        )
        self.chains += 1
        served = ServedWatch(self.snapshots, numbers_of(self.track))
        calibration = CalibrationWatch(self.schema, self.settings.calibration_fields, self.settings.settled_ms)
        judge = Judge(self.snapshots, gate_state(start, self.epoch))
        anchors = Anchors(judge, self.store, self.snapshots, self.schema, self.model, learner, self.settings.device)
        ids = topic_ids(self.cluster, self.names)
        if start.manifest is not None and start.manifest.rewinds is not None and self.rewinds == Rewinds():
            self.rewinds = start.manifest.rewinds
        known = () if start.manifest is None else start.manifest.skipped
        skips = Skips(joined(self._known_rewinds().skipped, known), ids["examples"])
        training = Training(
            learner,
            BatchCutter(self.model.batch_rows, prepared.positions),
            scores,
            self.metrics,
            max_batch_age_s=self.settings.max_batch_age_ms / 1000,
            watermark_ms=start.watermark_ms,
            observers=(self.skew, self.canary, self.challenge, served, calibration),
            bookkeeping={CHAIN: chain, "canary": self.canary, CHALLENGE: self.challenge, SERVED: served},
            judge=judge,
            skips=skips,
            sanity=Sanity(judge, ScoreShift(learner, self.schema), self.snapshots, drift=Drift(self.schema, self.snapshots)),
            anchors=anchors,
            past=None if start.manifest is None else Past.of(start.manifest.history),
        )
        training.restore(start.bookkeeping)
        retention = await self._retention(start, 0 if base is None else base.size)
        # The gate must know the champion's line before the first version is announced. Otherwise it would take a version of a
        # new line for one of the champion's line.
        await anchors.follow(self.follower.state, start.watermark_ms)
        self.canary.follow(self.follower.state)
        self.challenge.follow(self.tracks.state)
        publisher = Publisher(
            store=self.store,
            registry=self.registry,
            chain=chain,
            letters=self.letters,
            settings=self.snapshots,
            schema=self.schema,
            model=self.model,
            epoch=self.epoch,
            start=start,
            metrics=self.metrics,
            more_metrics=lambda: {
                **self.skew.manifest_metrics(),
                **served.manifest_metrics(),
                **table_figures(learner.table),
            },
            topic_ids=ids,
            skips=skips,
            rewinds=partial(self._as_of, rewind, chain.name),
            retention=retention,
            sent_back=None if rewind is None else partial(self._says_so, rewind, chain.name),
        )
        return Parts(training, publisher, judge, anchors, scores, served, calibration, lambda: learner.table, rewind)

    async def _retention(self, start: Start, came_after: int) -> LogRetention:
        """What `deltas` keeps, and how far it is from deleting what came after the version that training goes on from."""
        age_s = 0.0 if start.manifest is None else max(time.time() - start.manifest.created_at_ms / 1_000, 0.0)
        retention = LogRetention(newest=Mark(0, time.monotonic() - age_s), before=came_after)
        await retention.look(self.kafka, self.names.deltas)
        return retention

    def _known_rewinds(self) -> Rewinds:
        """The registry's, or the last that were known, if its topic is lost."""
        found = self.follower.state.rewinds
        if found != Rewinds():
            self.rewinds = found
        return self.rewinds

    def _as_of(self, rewind: Rewind | None, chain: str, version: int) -> Rewinds | None:
        """What the manifest of a version of this chain says of rewinds: the one that the chain obeys has ended before it."""
        known = self._known_rewinds()
        if rewind is not None:
            now_ms = time.time_ns() // 1_000_000
            known = known.ending(rewind.operation, up_to=version - 1, who=self.who, at_ms=now_ms, chain=chain)
        return None if known == Rewinds() else known

    async def _says_so(self, rewind: Rewind, chain: str, up_to: int | None) -> None:
        """Note in the registry that the trainer has gone back."""
        await self.registry.rewound(rewind.operation, epoch=self.epoch, chain=chain, up_to=up_to)
        log.warning("went back to version %d, as %s asked: %s", rewind.version, rewind.who, rewind.reason)
