"""Versions: captured between two batches, written whole, then announced. Training continues meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec

from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.changes import Announcement
from state.errors import Refused, SnapshotError
from state.manifest import Manifest
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.errors import Fenced, NoAnswer, RegistryError
from stream.trainer.evaluation import manifest_metrics
from stream.trainer.letters import LetterBox
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.sanity import weight_problems
from stream.trainer.start import Start
from stream.trainer.training import Captured

__all__ = ["Announces", "Publisher"]

log = logging.getLogger(__name__)

# How often the publisher checks whether a version is due.
TICK_S = 0.05
# Wait before a version that is written is announced again, if announcing failed. The registry's own attempts take seconds.
ANNOUNCE_AGAIN_S = 1.0


class Announces(Protocol):
    """What publishing needs of a `stream.registry.RegistryWriter`."""

    async def announce(self, manifest: Manifest, *, gate: SnapshotSettings) -> Announcement: ...


class Publisher:
    """Writes and announces versions, one after another.

    - Every version is a full one. It is written only when every dead letter of the examples before its offsets is written, and
      announced only when the store has all of it.
    - Failures are logged and counted, and training goes on, since an older model serves better than none. Only being fenced
      ends the publisher.
    - A version that is written but not announced is announced again, and no other version is written before that.
    - After a version that couldn't be written, the next interval writes another one with a number of its own.

    `more_metrics` is called for each version. Its metrics are in the manifest next to those of the scores.
    """

    def __init__(
        self,
        *,
        store: SnapshotStore,
        registry: Announces,
        letters: LetterBox,
        settings: SnapshotSettings,
        schema: FeatureSchema,
        model: ModelSettings,
        epoch: int,
        start: Start,
        metrics: TrainerMetrics,
        more_metrics: Callable[[], Mapping[str, float]] = dict,
        topic_ids: Mapping[str, str] | None = None,
    ) -> None:
        self._store, self._registry, self._letters, self._settings = store, registry, letters, settings
        self._schema, self._model, self._epoch, self._metrics = schema, model, epoch, metrics
        self._more_metrics = more_metrics
        self._parent = start.version
        self._last_number = start.newest
        self._published = self._written = start.examples_seen
        self._unannounced: Manifest | None = None
        self._topic_ids = dict(topic_ids or {})
        self._closing = False

    async def run(self, examples_seen: Callable[[], int], capture: Callable[[], Awaitable[Captured]]) -> None:
        """Publish every `interval_ms` if at least `min_examples` were trained since the last version, until `close`.

        Raises:
            Fenced: another trainer has taken over.
        """
        interval_s = self._settings.interval_ms / 1000
        due_s = time.monotonic() + interval_s
        again_s = 0.0
        while not self._closing:
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            if self._unannounced is not None:
                if now_s >= again_s:
                    await self._announce()
                    again_s = time.monotonic() + ANNOUNCE_AGAIN_S
                continue
            if now_s < due_s or examples_seen() - self._written < self._settings.min_examples:
                continue
            due_s = now_s + interval_s
            await self.publish(await capture())
            again_s = time.monotonic() + ANNOUNCE_AGAIN_S

    def close(self) -> None:
        """Let `run` end after the version that it is publishing."""
        self._closing = True

    async def publish(self, captured: Captured) -> Announcement | None:
        """Write and announce one version; None when that failed, which is logged and counted.

        A version that is written and not announced yet is announced first. When that fails, nothing is written.

        Raises:
            Fenced: another trainer has taken over.
        """
        if self._unannounced is not None and await self._announce() is None and self._unannounced is not None:
            return None
        try:
            await self._letters.written_up_to(captured.letters)
            began = time.perf_counter()
            self._unannounced = await asyncio.to_thread(self._write, captured)
            self._written = captured.examples_seen
            self._metrics.snapshot_seconds.labels("write").observe(time.perf_counter() - began)
        except SnapshotError as error:
            self._metrics.snapshots.labels("failed").inc()
            log.error("no snapshot at %d examples, training goes on: %s", captured.examples_seen, error)
            return None
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
        self._parent, self._published = manifest.version, manifest.examples_seen
        self._metrics.announced(manifest, promoted=announcement.promoted)
        log.info("version %d, %d examples: %s", manifest.version, manifest.examples_seen, announcement.reason)
        return announcement

    def has_news(self, examples_seen: int) -> bool:
        """Whether examples were trained since the newest announced version."""
        return examples_seen > self._published or self._unannounced is not None

    def _write(self, captured: Captured) -> Manifest:
        """Write the version; called in a thread. A number is never used again, even if writing fails."""
        self._last_number = max(self._last_number + 1, self._store.next_version())
        report = captured.evaluation.report()
        self._metrics.report(report)
        verdict = captured.verdict
        if verdict is not None:
            verdict = msgspec.structs.replace(verdict, problems=(*verdict.problems, *weight_problems(captured.serving)))
        manifest = Manifest(
            version=self._last_number,
            parent=self._parent,
            kind="full",
            epoch=self._epoch,
            created_at_ms=captured.at_ms,
            offsets={str(partition): offset for partition, offset in sorted(captured.offsets.items())},
            watermark_ms=captured.watermark_ms,
            examples_seen=captured.examples_seen,
            negative_rate=captured.negative_rate,
            metrics={**manifest_metrics(report), **self._more_metrics()},
            verdict=verdict,
            topic_ids=self._topic_ids,
            schema_hash=self._schema.fingerprint(),
            features=self._schema.model_dump(mode="json"),
            model=self._model.model_dump(mode="json"),
        )
        return self._store.write(manifest, captured.serving, captured.trainer)
