"""The trainer of a run: the product's learner, chain, writers and store, driven step by step, and hooks to hurt what it writes.

Each point is noted before it is published: with weights that are read from the learner's whole table, not from its deltas.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from model.learner import Learner
from model.rows import ModelDelta
from state.chain_name import ChainName
from state.changes import Announcement
from state.registry import RegistryState
from state.rewinds import Rewinds, SkippedRange, joined
from state.store import SnapshotStore
from stream.deltas.writer import DeltaWriter, Sent
from stream.errors import TopicError
from stream.kafka.cluster import describe_cluster
from stream.kafka.transport import Run as Records
from stream.records.delta import DeltaHeader
from stream.registry.collect import collect_by_itself
from stream.registry.log import read_registry
from stream.registry.writer import RegistryWriter
from stream.trainer.batching import BatchCutter
from stream.trainer.chain import NAME as CHAIN
from stream.trainer.chain import Chain
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import ExampleDecoder
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.rebase import go_on_in_place
from stream.trainer.skips import Skips
from stream.trainer.snapshots import Publisher
from stream.trainer.start import first_positions, go_on
from stream.trainer.training import Training
from tests.faults.snapshots.weights import Point, Weights
from tests.faults.snapshots.where import MODEL, SCHEMA, Noted, Where, example
from tests.judged import JUDGED

__all__ = ["PIECE_BYTES", "Trainer", "never_saw", "weights_of"]

# Of a delta's records: deltas of some 50 rows are cut into several.
PIECE_BYTES = 1_500
END = 1 << 40  # of the log of examples, which goes on for ever

Pieces = list[bytes]


class HurtWriter(DeltaWriter):
    """A writer whose records can be changed after they were made, and before they are written.

    mangle      changes the records of the next delta; several deltas may come of it
    mangle_model  changes what the next delta holds, after its digest was computed
    around      called instead of the commit, with the commit
    """

    mangle: Callable[[Pieces], Pieces] | None = None
    mangle_model: Callable[[DeltaHeader, ModelDelta], tuple[DeltaHeader, ModelDelta]] | None = None
    around: Callable[[Pieces, Callable[[Sequence[bytes]], Awaitable[Sent]]], Awaitable[Sent]] | None = None

    async def publish(self, header: DeltaHeader, delta: ModelDelta) -> Sent:
        if self.mangle_model is not None:
            change, self.mangle_model = self.mangle_model, None
            header, delta = change(header, delta)
        return await super().publish(header, delta)

    async def _commit(self, pieces: Sequence[bytes]) -> Sent:
        if self.around is not None:
            around, self.around = self.around, None
            return await around(list(pieces), super()._commit)
        if self.mangle is not None:
            mangle, self.mangle = self.mangle, None
            pieces = mangle(list(pieces))
            if not pieces:
                return Sent(self.position, self.position, 0, 0)
        return await super()._commit(pieces)


class Trainer:
    """One life of a trainer."""

    def __init__(self, where: Where, who: str = "trainer") -> None:
        self.where, self.who = where, who
        self.store = SnapshotStore(where.snapshots)
        self.metrics = TrainerMetrics(CollectorRegistry())
        self.registry = RegistryWriter(where.kafka, where.names, who=who)
        self._decoder = ExampleDecoder(SCHEMA)
        self._lock = asyncio.Lock()
        self._chains = 0
        self.writer: HurtWriter
        self.training: Training

    async def start(self) -> Trainer:
        """Take an epoch and go on from the newest usable version, as `stream.trainer.run` does."""
        where = self.where
        self.epoch = await self.registry.take_trainer_epoch()
        state = await read_registry(where.kafka, where.names)
        self.learner = Learner(SCHEMA, MODEL, device="cpu")
        self.writer = HurtWriter(where.kafka, where.names, epoch=self.epoch)
        await self.writer.open()
        self.writer.limit = PIECE_BYTES
        await self._go_on(state)
        return self

    async def obey(self) -> bool:
        """Go back, if somebody has asked for it. Returns whether that was so."""
        async with self._lock:
            state = await read_registry(self.where.kafka, self.where.names)
            if state.rewinds.pending is None:
                return False
            await self._go_on(state)
            return True

    async def _go_on(self, state: RegistryState) -> None:
        """The parts that belong to the weights of the version to go on from, and what is published at once."""
        where, rewind = self.where, state.rewinds.pending
        start = await asyncio.to_thread(go_on, self.learner, state, self.store, SCHEMA, MODEL)
        positions = first_positions(start, "examples", {0: 0}, {0: END}, lost_examples="stop")
        base = await go_on_in_place(self.learner, start, where.kafka, where.names, sent_back=rewind is not None)
        name = str(ChainName(MODEL.name, self.epoch, self._chains))
        self._chains += 1
        self.chain = Chain(name, self.writer, base, self.learner.touched_keys)
        ids = await _topic_ids(where)
        known = () if start.manifest is None else start.manifest.skipped
        self.skips = Skips(joined(state.rewinds.skipped, known), ids.get("examples", ""))
        self.training = Training(
            self.learner,
            BatchCutter(MODEL.batch_rows, positions),
            Evaluation(1_000),
            self.metrics,
            max_batch_age_s=0.0,
            watermark_ms=start.watermark_ms,
            bookkeeping={CHAIN: self.chain},
            skips=self.skips,
        )
        self.training.restore(start.bookkeeping)
        letters: Any = SimpleNamespace(written_up_to=_at_once)

        def rewinds(version: int) -> Rewinds | None:
            if rewind is None:
                return state.rewinds if state.rewinds.rewinds else None
            return state.rewinds.ending(rewind.operation, up_to=version - 1, who=self.who, at_ms=0, chain=name)

        async def says_so(up_to: int | None) -> None:
            assert rewind is not None
            await self.registry.rewound(rewind.operation, epoch=self.epoch, chain=name, up_to=up_to)

        self.publisher = Publisher(
            store=self.store,
            registry=self.registry,
            chain=self.chain,
            letters=letters,
            settings=where.snapshots,
            schema=SCHEMA,
            model=MODEL,
            epoch=self.epoch,
            start=start,
            metrics=self.metrics,
            topic_ids=ids,
            skips=self.skips,
            rewinds=rewinds,
            sent_back=None if rewind is None else says_so,
        )
        self.base = base
        if rewind is not None and self.chain.begins_with_a_version:
            await self._publish_version()
        elif rewind is not None:
            captured = self.training.capture_delta()
            if captured is not None:
                self._note(self.learner)
                await self.publisher.publish_delta(captured)
            await self.publisher._has_gone_back(None)
        while not self.chain.is_ready(self.training.positions):  # silently, up to where scorers are
            self.learn(1)

    @property
    def point(self) -> Point | None:
        """The newest point that was published."""
        published = self.chain.published
        return None if published is None else Point(published.point.chain, published.point.sequence)

    def learn(self, batches: int = 1) -> None:
        """Learn the next batches of `examples`, each from as many offsets as a batch has rows."""
        for _ in range(batches):
            at = self.training.positions[0]
            offsets = range(at, at + MODEL.batch_rows)
            run = Records("examples", 0, at, offsets.stop, [example(self.where.seed, offset) for offset in offsets])
            self.training.add(self._decoder.decode(run))
            while self.training.step(0.0):
                pass

    async def delta(self, count: int = 1, batches: int = 1) -> None:
        """Learn and publish, some times."""
        for _ in range(count):
            async with self._lock:
                self.learn(batches)
                while (captured := self.training.capture_delta()) is None:  # all of it was left out
                    self.learn()
                self._note(self.learner)
                await self.publisher.publish_delta(captured)

    async def version(self) -> Announcement | None:
        """Learn, and publish a version and the delta that leads to it; None if that failed."""
        async with self._lock:
            self.learn()
            announcement = await self._publish_version()
            if announcement is not None:
                await self.registry.tag_good(announcement.version)
            return announcement

    async def _publish_version(self) -> Announcement | None:
        captured = replace(self.training.capture_version(), verdict=JUDGED)
        self._note(self.learner)
        return await self.publisher.publish(captured)

    async def collect(self) -> None:
        """Delete versions as the trainer does from time to time."""
        await collect_by_itself(self.where.kafka, self.where.names, self.registry, self.store, self.where.snapshots)

    async def stop(self) -> None:
        """Disconnect."""
        with contextlib.suppress(AttributeError):
            await self.writer.close()
        await self.registry.close()

    def _note(self, learner: Learner) -> None:
        published, base = self.chain.published, self.base
        if published is not None:
            parent = Point(published.point.chain, published.point.sequence)
            point = Point(self.chain.name, parent.sequence + 1)
        elif base is not None:
            parent, point = Point(base.published.point.chain, base.published.point.sequence), Point(self.chain.name, 1)
        else:
            parent, point = None, Point(self.chain.name, 0)
        self.where.note(Noted(point, parent, weights_of(learner)))


async def _at_once(count: int) -> None:
    pass


async def _topic_ids(where: Where) -> dict[str, str]:
    """Kafka's id of `examples`, in the runs that have that topic."""
    try:
        return {"examples": (await describe_cluster(where.kafka, (where.names.examples,))).topic_ids[where.names.examples]}
    except TopicError:
        return {}


def never_saw(where: Where, left_out: Sequence[SkippedRange], end: int) -> Weights:
    """The weights of a run from the beginning of `examples` to an offset that never saw what is left out."""
    learner, decoder = Learner(SCHEMA, MODEL, device="cpu"), ExampleDecoder(SCHEMA)
    metrics = TrainerMetrics(CollectorRegistry())
    training = Training(learner, BatchCutter(MODEL.batch_rows, {0: 0}), Evaluation(1_000), metrics, max_batch_age_s=0.0)
    for at in range(0, end, MODEL.batch_rows):
        offsets = range(at, at + MODEL.batch_rows)
        seen = [each for each in offsets if not any(one.first <= each < one.to for one in left_out)]
        if not seen:
            continue
        training.add(decoder.decode(Records("examples", 0, at, offsets.stop, [example(where.seed, each) for each in seen])))
        while training.step(0.0):
            pass
    return weights_of(learner)


def weights_of(learner: Learner) -> Weights:
    """All serving weights of a learner."""
    return Weights.of({name: tensor.numpy() for name, tensor in learner.serving_state().items()}, learner.negative_rate)
