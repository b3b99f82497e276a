"""One version, ready to answer."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

from model.errors import ModelError
from model.features import FeatureDecoder
from model.predictor import Predictor
from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.errors import SnapshotCorrupt
from state.store import SnapshotStore

__all__ = ["Ready", "Served"]

# A first forward pass allocates and warms up; it happens before a version answers anybody.
_WARM_UP = [b'{"impression_id":"","timestamp":0,"features":{}}'] * 8


@dataclass(frozen=True, slots=True)
class Served:
    """A version's weights with the decoder that belongs to them. What a request is scored with from start to end."""

    version: int
    created_at_ms: int
    decoder: FeatureDecoder
    predictor: Predictor


class Ready:
    """Loads versions and keeps the last `keep` of them, so that going back costs no download. For one thread."""

    def __init__(self, store: SnapshotStore, *, keep: int, device: str) -> None:
        self._store, self._keep, self._device = store, keep, device
        self._kept: OrderedDict[int, Served] = OrderedDict()

    def get(self, version: int) -> Served:
        """A version ready to answer; blocks while it is read.

        Features and model are the manifest's own: a scorer serves what was trained, whatever its settings say.

        Raises:
            SnapshotError: the version is missing or isn't what its manifest says.
        """
        served = self._kept.pop(version, None) or self._load(version)
        self._kept[version] = served
        while len(self._kept) > self._keep:
            self._kept.popitem(last=False)
        return served

    def _load(self, version: int) -> Served:
        manifest = self._store.manifest(version)
        try:
            schema = FeatureSchema.model_validate(manifest.features)
            settings = ModelSettings.model_validate(manifest.model)
            predictor = Predictor(schema, settings, self._store.serving(version), device=self._device)
        except (ModelError, ValueError) as error:
            raise SnapshotCorrupt(
                f"version {version}: expected weights of the model that its manifest names, found: {error}. "
                "Roll back with `headrace snapshot rollback`; this scorer goes on with the version that it has."
            ) from error
        decoder = FeatureDecoder(schema)
        predictor.predict(decoder.impressions(_WARM_UP).batch)
        created_at_ms = manifest.created_at_ms or int(time.time() * 1000)
        return Served(version, created_at_ms, decoder, predictor)
