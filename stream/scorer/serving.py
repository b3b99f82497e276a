"""Weights that are ready to answer: those of one version, or of a replica that follows its chain."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from model.errors import ModelError
from model.predictor import Predictor
from model.requests import RequestDecoder
from model.schema import FeatureSchema
from model.settings import ModelSettings
from state.chain import ChainPoint
from state.chain_versions import point_of
from state.errors import SnapshotCorrupt
from state.registry import VersionRecord
from state.store import SnapshotStore
from stream.records.heartbeat import Mark

__all__ = ["Served", "WeightsState", "load_version"]

# The first forward pass allocates memory and is slow. It is done before the version answers requests.
_WARM_UP = [b'{"request_id":"","candidates":[%b]}' % b",".join([b'{"id":""}'] * 50)] * 4


class WeightsState(NamedTuple):
    """What weights are at one moment, for answers and heartbeats.

    version         the version, or the newest announced one at or below their point
    captured_at_ms  when the trainer captured them
    delta           number of deltas since `version`
    point           of their chain; None for a version that is no point of a published chain
    digest          of the weights
    recent          the last points that they were at, this one last
    """

    version: int
    captured_at_ms: int
    delta: int = 0
    point: ChainPoint | None = None
    digest: int = 0
    recent: tuple[Mark, ...] = ()


@dataclass(slots=True, eq=False)
class Served:
    """Weights and the decoder that belongs to them. A request is scored with one of these from start to end.

    `state` is replaced as a whole. The weights of a version stay as they are. Those of a replica change only in the thread that
    scores, between two batches, and `state` with them.
    """

    state: WeightsState
    decoder: RequestDecoder
    predictor: Predictor
    size: int = 0
    """Bytes of the weights in the store, which are about those in memory."""
    is_replica: bool = False
    """Whether deltas are put into these weights: then they aren't exactly a version's."""

    @property
    def version(self) -> int:
        return self.state.version


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
    manifest = store.manifest(version) if announced is None else store.announced(announced)
    try:
        schema = FeatureSchema.model_validate(manifest.features)
        settings = ModelSettings.model_validate(manifest.model)
        decoder = RequestDecoder(schema)
        reader = store.read(version, manifest)
        predictor = Predictor(
            schema,
            settings,
            reader.dense(),
            expected_rows=reader.row_count,
            device=device,
            negative_rate=manifest.negative_rate,
        )
        for rows in reader.rows():
            predictor.add(rows)
        predictor.ready()
    except (ModelError, ValueError) as error:
        raise SnapshotCorrupt(
            f"version {version}: expected weights of the model that its manifest names, found: {error}. "
            "Update this scorer where the version was made by a newer trainer, or roll back: `headrace snapshot rollback`."
        ) from error
    if manifest.digest and predictor.digest != int(manifest.digest, 16):
        raise SnapshotCorrupt(
            f"version {version}: expected weights with the digest {manifest.digest}, found {predictor.digest:016x}. The files "
            "are as they were written, so the trainer wrote others than it had. Roll back: `headrace snapshot rollback`."
        )
    predictor.predict(decoder.requests(_WARM_UP, np.zeros(len(_WARM_UP), np.int64)).batch)
    created_at_ms = manifest.created_at_ms or int(time.time() * 1000)
    point = None if announced is None else point_of(announced)
    digest = predictor.digest
    recent = () if point is None else (Mark(point.sequence, f"{digest:016x}"),)
    state = WeightsState(version, created_at_ms, point=point, digest=digest, recent=recent)
    size = sum(entry.size for name, entry in manifest.files.items() if not name.startswith("trainer"))
    return Served(state, decoder, predictor, size)
