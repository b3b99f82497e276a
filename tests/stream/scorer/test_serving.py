"""A version is served as its manifest says it was made."""

from __future__ import annotations

import msgspec
import pytest

from state.errors import SnapshotCorrupt
from state.manifest import Manifest
from state.registry import VersionRecord
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.scorer.serving import load_version
from tests.stream.scorer.factory import MODEL, SCHEMA, request, weights


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_scores_are_corrected_for_the_negatives_that_the_version_did_not_learn(tmp_path, rate):
    store = SnapshotStore(SnapshotSettings(url=str(tmp_path)))
    features, model = SCHEMA.model_dump(mode="json"), MODEL.model_dump(mode="json")
    store.write(Manifest(version=200, features=features, model=model, negative_rate=rate), weights(200), None)
    served = load_version(store, 200, device="cpu")
    [score] = served.predictor.predict(served.decoder.requests([request("r", 1)]).batch)
    assert score == pytest.approx(0.2 / (0.2 + 0.8 / rate))


def test_a_rate_that_is_none_is_refused(tmp_path):
    store = SnapshotStore(SnapshotSettings(url=str(tmp_path)))
    store.write(Manifest(version=1, negative_rate=0.0), weights(200), None)
    with pytest.raises(SnapshotCorrupt, match="negative_rate"):
        load_version(store, 1, device="cpu")


def test_the_same_number_in_another_store_is_another_version(tmp_path):
    store = SnapshotStore(SnapshotSettings(url=str(tmp_path)))
    features, model = SCHEMA.model_dump(mode="json"), MODEL.model_dump(mode="json")
    made = store.write(Manifest(version=7, epoch=1, created_at_ms=5, features=features, model=model), weights(7), None)
    announced = VersionRecord.of(made, now_ms=9, who="t", gate="")
    assert load_version(store, 7, device="cpu", announced=announced).version == 7
    with pytest.raises(SnapshotCorrupt, match=r"version 7: expected the one announced .* Is snapshots\.url the trainer's\?"):
        load_version(store, 7, device="cpu", announced=msgspec.structs.replace(announced, created_at_ms=6))
