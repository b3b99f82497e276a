"""Publishes deltas on a topic and versions in the store. Both are captured between two batches; training goes on meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Protocol, TypeVar

from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.changes import Announcement
from state.errors import Refused, SnapshotError
from state.manifest import Manifest
from state.rewinds import Rewinds
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.errors import Fenced, NoAnswer, RegistryError
from stream.trainer.captured import CapturedDelta, CapturedVersion
from stream.trainer.chain import Chain, Published
from stream.trainer.evaluation import manifest_metrics
from stream.trainer.letters import LetterBox
from stream.trainer.log_retention import LogRetention, Mark
from stream.trainer.manifests import new_manifest, write_captured
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.skips import Skips
from stream.trainer.start import Start
from stream.trainer.training import Training

__all__ = ["YOUNG_GROWTH", "Announces", "BetweenBatches", "Publisher"]

log = logging.getLogger(__name__)

# How often the publisher checks what is due. A delta leaves at most this much later than it should.
TICK_S = 0.02
# Interval of the first versions of a new model, so that there is a first champion soon, and of a chain that begins with a
# version, since scorers get nothing until then. It grows to `interval_ms`.
FIRST_INTERVAL_S = 5.0
INTERVAL_GROWTH = 1.5
# Dense weights leave before their interval has passed if the model has seen this many times the examples by then. The bias of a
# new model moves fast. At 2,000 examples a second this is over after 10 s.
YOUNG_GROWTH = 1.1
# Wait before a delta is sent again. The producer's own attempts take seconds.
SEND_AGAIN_S = 1.0
# Wait before a version that is written is announced again, if announcing failed. The registry's own attempts take seconds.
ANNOUNCE_AGAIN_S = 1.0


class Announces(Protocol):
    """What publishing needs of a `stream.registry.RegistryWriter`."""

    async def announce(self, manifest: Manifest, *, gate: SnapshotSettings) -> Announcement: ...


T = TypeVar("T")

# Says that the chain of a trainer that was sent back has begun. The argument is the newest version that may be of the line that
# was left; None: the newest announced. Raises Fenced, NoAnswer.
SentBack = Callable[[int | None], Awaitable[object]]


class BetweenBatches(Protocol):
    """`stream.trainer.pipeline.Pipeline.between_batches`."""

    async def __call__(self, capture: Callable[[Training], T]) -> T: ...


class Publisher:
    """Publishes deltas, one after another, and beside them versions, one after another.

    - A version's weights are those at a point of the chain: a delta brings scorers there, and is committed before the version
      is announced. While the gate withholds what is learned, no delta leaves. Versions are still written then, for a restart;
      they are no points of the chain.
    - A delta or version leaves only when every dead letter of the examples before its offsets is written. A version is
      announced only when the store has all of it.
    - A delta that can't be written is tried again until it is, and training goes on.
    - Failures of versions are logged and counted, and training goes on, since an older model serves better than none. Only
      being fenced ends the publisher.
    - A version that is written but not announced is announced again, and no other version is written before that.
    - After a version that couldn't be written, the next interval writes another one with a number of its own.

    `more_metrics` is called for each version. Its metrics are in the manifest next to those of the scores.

    Args:
        skips: what is left out of the log, which manifests say.
        rewinds: what the manifest of a version says of rewinds; called in a thread.
        retention: says when a version is due lest Kafka deletes deltas that came after the newest one.
        sent_back: the trainer was sent back, and says by this that its new chain has begun. None: it wasn't.
    """

    def __init__(
        self,
        *,
        store: SnapshotStore,
        registry: Announces,
        chain: Chain,
        letters: LetterBox,
        settings: SnapshotSettings,
        schema: FeatureSchema,
        model: ModelSettings,
        epoch: int,
        start: Start,
        metrics: TrainerMetrics,
        more_metrics: Callable[[], Mapping[str, float]] = dict,
        topic_ids: Mapping[str, str] | None = None,
        skips: Skips | None = None,
        rewinds: Callable[[int], Rewinds | None] = lambda version: None,
        retention: LogRetention | None = None,
        sent_back: SentBack | None = None,
    ) -> None:
        self._store, self._registry, self._chain, self._letters = store, registry, chain, letters
        self._settings, self._schema, self._model, self._epoch, self._metrics = settings, schema, model, epoch, metrics
        self._more_metrics, self._skips, self._sent_back = more_metrics, skips or Skips(()), sent_back
        self._rewinds, self.retention = rewinds, retention or LogRetention()
        self._captured_at = self._written_at = Mark(0, 0.0)
        self._parent = start.version
        self._last_number = start.newest
        self._announced = self._written = self._sent = self._dense_sent = start.examples_seen
        self._unannounced: Manifest | None = None
        self._topic_ids = dict(topic_ids or {})
        self._history = None if start.manifest is None else start.manifest.history
        self._closing = False
        whole_s = settings.interval_ms / 1000
        soon = start.version is None or chain.begins_with_a_version
        self._interval_s = min(whole_s, FIRST_INTERVAL_S) if soon else whole_s
        if sent_back is not None:
            self._written = -1  # a version comes at once, by which answers name the weights

    async def run(self, training: Training, between_batches: BetweenBatches) -> None:
        """Publish until `close`.

        A delta leaves every `delta_interval_ms`, with the dense weights when `dense_interval_ms` have passed. A version leaves
        every `interval_ms` in which at least `min_examples` were trained; the first versions of a new model come sooner. One
        also leaves when Kafka will soon delete deltas after the newest one.

        Raises:
            Fenced: another trainer has taken over.
        """
        writing: asyncio.Task[Announcement | None] | None = None
        delta_s, due_delta_s = self._settings.delta_interval_ms / 1000, 0.0
        dense_s, due_dense_s = self._settings.dense_interval_ms / 1000, 0.0
        due_version_s = time.monotonic() + (self._interval_s if self._sent_back is None else 0.0)
        is_behind = False
        try:
            if self._sent_back is not None and not self._chain.begins_with_a_version:
                await self._go_back(between_batches)
            while not self._closing:
                early_s = due_delta_s - time.monotonic()
                await asyncio.sleep(min(TICK_S, early_s) if early_s > 0 else TICK_S)
                if writing is not None and writing.done():
                    writing.result()
                    writing = None
                now_s = time.monotonic()
                if not self._chain.is_ready(training.positions):
                    is_behind = True
                    continue
                if is_behind:
                    is_behind = False
                    await between_batches(Training.caught_up)
                if self._unannounced is not None and writing is None:
                    writing = asyncio.create_task(self._announce_later())
                elif writing is None and (
                    (now_s >= due_version_s and self._has_news(training.examples_seen))
                    or (self.retention.is_due(now_s) and not training.withheld)
                ):
                    self._interval_s = min(self._interval_s * INTERVAL_GROWTH, self._settings.interval_ms / 1000)
                    due_version_s, due_delta_s = now_s + self._interval_s, now_s + delta_s
                    due_dense_s = now_s + dense_s
                    captured = await between_batches(Training.capture_version)
                    point = await self._point(captured)
                    writing = asyncio.create_task(self._finish(captured, point))
                    continue
                dense = now_s >= due_dense_s or training.examples_seen > YOUNG_GROWTH * self._dense_sent
                sent = self._dense_sent if dense else self._sent
                if now_s >= due_delta_s and training.examples_seen > sent and not self._chain.begins_with_a_version:
                    due_delta_s = max(due_delta_s, now_s - delta_s) + delta_s  # no drift, and no burst after a standstill
                    if dense:
                        due_dense_s = max(due_dense_s, now_s - dense_s) + dense_s
                    delta = await between_batches(partial(Training.capture_delta, dense=dense))
                    if delta is not None:
                        await self.publish_delta(delta)
        finally:
            if writing is not None:
                await writing

    async def _go_back(self, between_batches: BetweenBatches) -> None:
        """Bring scorers that follow to the version that the trainer was sent back to, before anything else."""
        delta = await between_batches(Training.capture_delta)
        if delta is not None:  # None: nothing has changed since that version, or the gate withheld it
            await self.publish_delta(delta)
        await self._has_gone_back(None)

    async def _has_gone_back(self, begun_with: int | None) -> None:
        """Say that the new chain has begun: by a delta, or by a version.

        Raises:
            Fenced: another trainer has taken over.
        """
        while self._sent_back is not None:
            try:
                await self._sent_back(None if begun_with is None else begun_with - 1)
                self._sent_back = None
            except NoAnswer as error:
                log.error("the registry doesn't know yet that the trainer has gone back; trying again: %s", error)
                await asyncio.sleep(ANNOUNCE_AGAIN_S)

    async def publish_delta(self, captured: CapturedDelta) -> None:
        """Write a delta. While Kafka can't be reached it is tried again and again: without it the chain would have a gap.

        Raises:
            Fenced: another trainer has taken over.
        """
        await self._letters.written_up_to(captured.position.letters)
        began = time.perf_counter()
        while True:
            try:
                sent = await self._chain.publish(captured)
                break
            except NoAnswer as error:
                self._metrics.deltas.labels("failed").inc()
                log.error("a delta isn't written, it is published again; training goes on: %s", error)
                await asyncio.sleep(SEND_AGAIN_S)
        self.retention.sent(sent.size)
        self._sent = captured.position.examples_seen
        if captured.delta.dense is not None:
            self._dense_sent = self._sent
        self._metrics.delta_sent(len(captured.delta.rows), sent.size, time.perf_counter() - began)

    async def publish(self, captured: CapturedVersion) -> Announcement | None:
        """Write and announce one version, and the delta that leads to it; None when that failed, which is logged and counted.

        A version that is written and not announced yet is announced first. When that fails, nothing is written.

        Raises:
            Fenced: another trainer has taken over.
        """
        return await self._finish(captured, await self._point(captured))

    async def drain(self, training: Training) -> None:
        """Publish what was trained since the last delta, and a version. Training must have stopped."""
        if not self._chain.is_ready(training.positions):
            return
        if training.examples_seen > self._announced or self._unannounced is not None:
            await self.publish(training.capture_version())

    def close(self) -> None:
        """Let `run` end after the version that it is publishing."""
        self._closing = True

    async def _point(self, captured: CapturedVersion) -> Published | None:
        """Bring scorers to a version's weights by the log, and return the point; None for a version that is none."""
        if not captured.on_chain:
            return None
        if captured.delta is not None and not self._chain.begins_with_a_version:
            await self.publish_delta(captured.delta)
        self._captured_at = self.retention.tried(time.monotonic())
        if self._chain.begins_with_a_version:
            self._sent = self._dense_sent = captured.position.examples_seen
            return self._chain.begin()
        return self._chain.published

    async def _finish(self, captured: CapturedVersion, point: Published | None) -> Announcement | None:
        """Write a version and announce it."""
        captured_at = self._captured_at
        try:
            if self._unannounced is not None and await self._announce() is None and self._unannounced is not None:
                return None
            await self._letters.written_up_to(captured.position.letters)
            began = time.perf_counter()
            self._unannounced = await asyncio.to_thread(self._write, captured, point)
            self._written, self._written_at = captured.position.examples_seen, captured_at
            self._metrics.snapshot_seconds.labels("write").observe(time.perf_counter() - began)
        except SnapshotError as error:
            self._metrics.snapshots.labels("failed").inc()
            log.error("no snapshot at %d examples, training goes on: %s", captured.position.examples_seen, error)
            return None
        finally:
            captured.frozen.close()
        return await self._announce()

    def _has_news(self, examples_seen: int) -> bool:
        # Scorers get nothing of a chain that begins with a version until that one comes, however few examples there are.
        least = 1 if self._parent is not None and self._chain.begins_with_a_version else self._settings.min_examples
        return examples_seen - self._written >= least

    async def _announce_later(self) -> Announcement | None:
        """Announce the version that is written, after a wait."""
        await asyncio.sleep(ANNOUNCE_AGAIN_S)
        return await self._announce()

    async def _announce(self) -> Announcement | None:
        """Announce the version that is written; None when that failed.

        It will be announced again, unless the rules forbid it.
        """
        manifest = self._unannounced
        assert manifest is not None
        began = time.perf_counter()
        try:
            announcement = await self._registry.announce(manifest, gate=self._settings)
        except Fenced:
            raise
        except (RegistryError, NoAnswer) as error:
            self._metrics.snapshots.labels("failed").inc()
            refused = isinstance(error.__cause__, Refused)
            if refused:
                self._unannounced = None
            what = "the next one has another number" if refused else "it will be announced again"
            log.error("version %d is written but not announced, %s; training goes on: %s", manifest.version, what, error)
            return None
        self._unannounced = None
        self._metrics.snapshot_seconds.labels("announce").observe(time.perf_counter() - began)
        self._parent, self._announced = manifest.version, manifest.examples_seen
        if manifest.sequence is not None:
            self.retention.announced(self._written_at)
        await self._has_gone_back(manifest.version)
        self._metrics.announced(manifest, promoted=announcement.promoted)
        log.info("version %d, %d examples: %s", manifest.version, manifest.examples_seen, announcement.reason)
        return announcement

    def _write(self, captured: CapturedVersion, point: Published | None) -> Manifest:
        """Write the version; called in a thread. A number is never used again, even if writing fails."""
        self._last_number = max(self._last_number + 1, self._store.next_version())
        report = captured.evaluation.report()
        self._metrics.report(report)
        manifest = new_manifest(
            captured,
            version=self._last_number,
            parent=self._parent,
            epoch=self._epoch,
            point=point,
            metrics={**manifest_metrics(report), **self._more_metrics()},
            topic_ids=self._topic_ids,
            skipped=self._skips.begun(captured.position.offsets),
            rewinds=self._rewinds(self._last_number),
            history=self._history,
            row_precision=self._settings.row_precision,
            schema=self._schema,
            model=self._model,
        )
        return write_captured(self._store, manifest, captured, self._schema)
