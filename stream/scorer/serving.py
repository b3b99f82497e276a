"""One version, ready to answer."""

from __future__ import annotations

import time
from dataclasses import dataclass

from model.errors import ModelError
from model.predictor import Predictor
from model.requests import RequestDecoder
from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.errors import SnapshotCorrupt
from state.registry import VersionRecord
from state.store import SnapshotStore

__all__ = ["Served", "load_version"]

# A first forward pass allocates and warms up; it happens before a version answers anybody.
_WARM_UP = [b'{"request_id":"","candidates":[%b]}' % b",".join([b'{"id":""}'] * 50)] * 4


@dataclass(frozen=True, slots=True)
class Served:
    """A version's weights with the decoder that belongs to them. What a request is scored with from start to end."""

    version: int
    created_at_ms: int
    decoder: RequestDecoder
    predictor: Predictor


def load_version(store: SnapshotStore, version: int, *, device: str, announced: VersionRecord | None = None) -> Served:
    """Read a version and make it ready to answer; blocks.

    Features, model and share of negatives are the manifest's own: a scorer serves what was trained, whatever its settings say.

    Args:
        announced: what the registry says of it. The same number in another store, or after the topic `snapshots` was made
            anew, is another version.

    Raises:
        SnapshotError: the version is missing or isn't what its manifest says.
    """
    manifest = store.manifest(version)
    if announced is not None and (announced.created_at_ms, announced.epoch) != (manifest.created_at_ms, manifest.epoch):
        raise SnapshotCorrupt(
            f"version {version}: expected the one announced (created at {announced.created_at_ms}, epoch {announced.epoch}), "
            f"found another of that number in {store.url} (created at {manifest.created_at_ms}, epoch {manifest.epoch}). "
            "Is snapshots.url the trainer's?"
        )
    try:
        schema = FeatureSchema.model_validate(manifest.features)
        settings = ModelSettings.model_validate(manifest.model)
        decoder = RequestDecoder(schema)
        rate = manifest.negative_rate
        predictor = Predictor(schema, settings, store.serving(version), device=device, negative_rate=rate)
    except (ModelError, ValueError) as error:
        raise SnapshotCorrupt(
            f"version {version}: expected weights of the model that its manifest names, found: {error}. "
            "Update this scorer where the version was made by a newer trainer, or roll back: `headrace snapshot rollback`."
        ) from error
    predictor.predict(decoder.requests(_WARM_UP).batch)
    created_at_ms = manifest.created_at_ms or int(time.time() * 1000)
    return Served(version, created_at_ms, decoder, predictor)
