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

# The first forward pass allocates memory and is slow. It is done before the version answers requests.
_WARM_UP = [b'{"request_id":"","candidates":[%b]}' % b",".join([b'{"id":""}'] * 50)] * 4


@dataclass(frozen=True, slots=True)
class Served:
    """A version's weights and the decoder that belongs to them. A request is scored with one of these from start to end."""

    version: int
    created_at_ms: int
    decoder: RequestDecoder
    predictor: Predictor


def load_version(store: SnapshotStore, version: int, *, device: str, announced: VersionRecord | None = None) -> Served:
    """Read a version and make it ready to answer. Blocks.

    Features, model and sampling rate of negatives come from the manifest: a scorer serves what was trained, whatever its own
    settings say.

    Args:
        announced: the version's record in the registry. The same number in another store, or from before the topic `snapshots`
            was created again, is another version.

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
        predictor = Predictor.of(schema, settings, store.serving(version), device=device, negative_rate=rate)
    except (ModelError, ValueError) as error:
        raise SnapshotCorrupt(
            f"version {version}: expected weights of the model that its manifest names, found: {error}. "
            "Update this scorer where the version was made by a newer trainer, or roll back: `headrace snapshot rollback`."
        ) from error
    predictor.predict(decoder.requests(_WARM_UP).batch)
    created_at_ms = manifest.created_at_ms or int(time.time() * 1000)
    return Served(version, created_at_ms, decoder, predictor)
