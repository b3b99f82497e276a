"""One version, ready to answer."""

from __future__ import annotations

import time
from dataclasses import dataclass

from model.errors import ModelError
from model.predictor import Predictor
from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.errors import SnapshotCorrupt
from state.store import SnapshotStore
from stream.scorer.decode import RequestDecoder

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


def load_version(store: SnapshotStore, version: int, *, device: str) -> Served:
    """Read a version and make it ready to answer; blocks.

    Features, model and share of negatives are the manifest's own: a scorer serves what was trained, whatever its settings say.

    Raises:
        SnapshotError: the version is missing or isn't what its manifest says.
    """
    manifest = store.manifest(version)
    try:
        schema = FeatureSchema.model_validate(manifest.features)
        settings = ModelSettings.model_validate(manifest.model)
        decoder = RequestDecoder(schema)
        rate = manifest.negative_rate
        predictor = Predictor(schema, settings, store.serving(version), device=device, negative_rate=rate)
    except (ModelError, ValueError) as error:
        raise SnapshotCorrupt(
            f"version {version}: expected weights of the model that its manifest names, found: {error}. "
            "Roll back with `headrace snapshot rollback`; this scorer goes on with the version that it has."
        ) from error
    predictor.predict(decoder.requests(_WARM_UP).batch)
    created_at_ms = manifest.created_at_ms or int(time.time() * 1000)
    return Served(version, created_at_ms, decoder, predictor)
