"""Loads the version that the live weights are compared with."""

from __future__ import annotations

import asyncio
import logging

from model.errors import ModelError
from model.predictor import Predictor
from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.errors import SnapshotError
from state.registry import RegistryState
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.trainer.judge import Anchor, Judge, choose_anchor

__all__ = ["Anchors"]

log = logging.getLogger(__name__)


class Anchors:
    """Keeps the judge's anchor: the weights of one version in memory, read from the store when another version is due.

    await anchors.follow(registry_state, watermark_ms)   # every few seconds, on the event loop

    When the champion is of another line and its weights can't score these features (another schema, another store), the scores
    that impressions were shown with are used instead of its own.
    """

    def __init__(
        self,
        judge: Judge,
        store: SnapshotStore,
        settings: SnapshotSettings,
        schema: FeatureSchema,
        model: ModelSettings,
        device: str,
    ) -> None:
        self._judge, self._store, self._settings = judge, store, settings
        self._schema, self._model, self._device = schema, model, device
        self._broken: set[int] = set()

    async def follow(self, registry: RegistryState, watermark_ms: int) -> None:
        """Load the anchor that is due, and compare with it from now on."""
        judge = self._judge
        judge.follow(registry.champion_line)
        report = judge.report()
        wanted = choose_anchor(registry, report, watermark_ms=watermark_ms, settings=self._settings, broken=self._broken)
        current = judge.anchor
        if wanted is None:
            by_served = registry.champion_line not in (None, report.line, *report.passed)
            if by_served and (current is None or current.predictor is not None):
                log.warning("gate: the champion can't score these features; the scores that were served are compared instead")
                judge.compare_with(Anchor(None, None))
            elif not by_served and current is not None:
                judge.compare_with(None)
            return
        if current is not None and current.version == wanted:
            return
        try:
            anchor = await asyncio.to_thread(self._load, wanted)
        except (SnapshotError, ModelError) as error:
            self._broken.add(wanted)
            log.warning("gate: version %d can't be compared with: %s", wanted, error)
            return
        log.info("gate: comparing with version %d from now on", wanted)
        judge.compare_with(anchor)

    def _load(self, version: int) -> Anchor:
        manifest = self._store.manifest(version)
        if manifest.schema_hash != self._schema.fingerprint():
            raise SnapshotError(f"version {version} is of another feature schema than the one trained")
        model = ModelSettings.model_validate(manifest.model)
        serving = self._store.serving(version)
        rate = manifest.negative_rate
        return Anchor(version, Predictor.of(self._schema, model, serving, device=self._device, negative_rate=rate))
