"""Versions of another schema: the chain that follows, the gate's anchor, and served scores that are computed again."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from model.derived import as_served
from model.errors import SnapshotMismatch
from model.learner import Learner
from model.migration import moved_dense, moved_trainer
from model.predictor import Predictor
from model.requests import RequestDecoder
from model.schema import FeatureSchema, FieldSpec
from model.schema_change import SchemaChange
from state.errors import SnapshotCorrupt
from state.gate import GateState
from state.manifest import Manifest
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.trainer.batching import BatchCutter
from stream.trainer.examples import ExampleDecoder
from stream.trainer.schemas import comparable, schema_change
from stream.trainer.skew import SkewCheck, load_reference
from tests.stream.trainer.factory import FIRST_MS, MODEL, SCHEMA, metrics, record, run
from tests.stream.trainer.fakes import DeltaLog
from tests.stream.trainer.test_anchors import World
from tests.stream.trainer.test_rebase import Trainer, withhold
from tests.stream.trainer.test_row_precision import follow, loaded

MORE = SCHEMA.model_copy(update={"fields": (FieldSpec(name="page"), *SCHEMA.fields)})


async def go_on(trainer: Trainer, version, manifest: Manifest) -> None:
    change = SchemaChange.between(FeatureSchema.model_validate(manifest.features), trainer.schema)
    moved = replace(version, dense=moved_dense(change, version.dense, MODEL), small=moved_trainer(change, version.small, MODEL))
    await trainer.go_on(moved, manifest)


async def test_other_fields_begin_a_chain_with_a_version(tmp_path, caplog):
    log = DeltaLog()
    trainer = Trainer(log, epoch=1)
    trainer.learn(0, 64)
    version, manifest = trainer.version(on_chain=True)
    trainer.learn(64, 128)
    await trainer.publish()

    changed = Trainer(log, epoch=2, schema=MORE)
    await go_on(changed, version, manifest)
    assert "scorers have other features.fields at delta 1 of deepfm/1/0: the new chain begins with a version" in caplog.text
    assert not changed.chain.is_ready({0: 96})  # scorers don't go back in time
    changed.learn(64, 160)
    assert changed.chain.is_ready({0: 160})
    assert changed.chain.begins_with_a_version
    begun, manifest = changed.version(on_chain=True)
    assert (manifest.chain, manifest.sequence) == ("deepfm/2/0", 0)
    store = SnapshotStore(SnapshotSettings(url=str(tmp_path)))
    begun.write(store, manifest)
    scorer = Predictor.of(MORE, MODEL, store.serving(manifest.version), device="cpu")
    changed.learn(160, 192)
    await changed.publish()
    follow(scorer, log.deltas[-1:])
    assert scorer.digest == changed.learner.digest

    # From there on a restart with the same fields goes on in place.
    again = Trainer(log, epoch=3, schema=MORE)
    await go_on(again, begun, manifest)
    assert not again.chain.begins_with_a_version


async def test_the_old_fields_again_before_the_new_chain_has_begun(tmp_path):
    """A version that is written while nothing is published yet knows which fields scorers have."""
    log = DeltaLog()
    trainer = Trainer(log, epoch=1)
    trainer.learn(0, 64)
    version, manifest = trainer.version(on_chain=True)
    scorer = loaded(tmp_path, version, manifest)
    changed = Trainer(log, epoch=2, schema=MORE)
    await go_on(changed, version, manifest)
    withhold(changed.training)
    changed.learn(64, 96)
    version, manifest = changed.version(on_chain=False)
    same = Trainer(log, epoch=3, schema=MORE)
    await go_on(same, version, manifest)
    assert same.chain.begins_with_a_version
    back = Trainer(log, epoch=4)
    await go_on(back, version, manifest)
    assert not back.chain.begins_with_a_version
    back.learn(96, 160)
    await back.publish()
    follow(scorer, log.deltas[-1:])
    assert scorer.digest == back.learner.digest


async def test_the_gate_goes_on_comparing_with_versions_of_fewer_fields(tmp_path):
    world = World(tmp_path)
    for minute in range(1, 14):
        world.version(minute)
    change = SchemaChange.between(SCHEMA, MORE)
    learner = Learner(MORE, MODEL, device="cpu")
    state = world.learner.serving_state(), world.learner.trainer_state()
    learner.restore(moved_dense(change, state[0], MODEL), moved_trainer(change, state[1], MODEL))
    world.start(learner, GateState(line=1))
    found = await world.follow(14)
    examples = run([record(n) for n in range(40)])
    expected = world.predictors[found].predict(ExampleDecoder(SCHEMA).decode(examples).batch)
    batch = ExampleDecoder(MORE).decode(examples).batch
    np.testing.assert_allclose(world.judge.anchor.predictor.predict(batch), expected, rtol=1e-6)
    learner.learn(batch, np.ones(40))
    np.testing.assert_allclose(world.judge.anchor.predictor.predict(batch), expected, rtol=1e-6)


def test_versions_that_score_otherwise_are_not_comparable():
    fewer = SCHEMA.model_copy(update={"fields": SCHEMA.fields[:1]})
    manifest = Manifest(version=7, schema_hash=SCHEMA.fingerprint(), features=SCHEMA.model_dump(mode="json"))
    with pytest.raises(SnapshotCorrupt, match=r"version 7: expected .* or a part of it, found another: item is gone"):
        comparable(manifest, fewer)
    with pytest.raises(SnapshotCorrupt, match=r"version 7: expected the trainer's feature schema, found another"):
        comparable(Manifest(version=7, schema_hash="x", features={"fields": [{"kind": "from the future"}]}), SCHEMA)
    assert comparable(manifest, SCHEMA).is_none


def test_a_model_of_pairs_of_fields_is_refused_before_anything_is_loaded():
    features, model = SCHEMA.model_dump(mode="json"), {"name": "ipnn", "hidden": [8]}
    manifest = Manifest(version=7, schema_hash=SCHEMA.fingerprint(), features=features, model=model)
    with pytest.raises(SnapshotMismatch, match=r"model.name = ipnn: .* has inputs for pairs of fields"):
        schema_change(manifest, MORE)
    placed = SCHEMA.model_copy(update={"fields": (SCHEMA.fields[0], FieldSpec(name="item", serve_as="none"))})
    assert schema_change(manifest, placed).moves_nothing


PLACED = FeatureSchema(
    fields=(
        FieldSpec(name="user"),
        FieldSpec(name="position", serve_as=1),
        FieldSpec(name="user × position", kind="cross", of=("user", "position")),
        FieldSpec(name="hour", kind="hour"),
    ),
    embedding_dim=4,
)


def test_served_scores_are_computed_again_with_what_was_served(tmp_path):
    store = SnapshotStore(SnapshotSettings(url=str(tmp_path)))
    learner = Learner(PLACED, MODEL.model_copy(update={"init_std": 0.5}), device="cpu")
    shown = [{"user": f"u{n % 7}", "position": n % 5} for n in range(60)]

    def batch(answers):
        events = [{"features": each, **more} for each, more in zip(shown, answers, strict=True)]
        cutter = BatchCutter(len(shown), {0: 0})
        cutter.add(ExampleDecoder(PLACED).decode(run([record(n, json.dumps(each).encode()) for n, each in enumerate(events)])))
        return cutter.cut()

    for _ in range(4):
        learned = batch([{}] * len(shown))
        learner.learn(learned.batch, learned.labels)
    described = {"features": PLACED.model_dump(mode="json"), "model": learner.settings.model_dump(mode="json")}
    store.write(Manifest(version=1, schema_hash=PLACED.fingerprint(), **described), learner.serving_state(), None)
    requests = [
        json.dumps({"request_id": "r", "timestamp": FIRST_MS + n, "context": each, "candidates": [{"id": "c"}]}).encode()
        for n, each in enumerate(shown)
    ]
    scores = learner.predict(RequestDecoder(PLACED).requests(requests).batch)
    answered = batch([{"score": float(score), "model_version": 1} for score in scores])

    def share(change):
        check = SkewCheck(
            lambda version: load_reference(store, version, PLACED), lambda version, delta: version, metrics(), as_served=change
        )
        check._since_s -= 60
        check.observe(answered, scores)
        check.check(1_000.0)
        return check.figures().share

    assert share(lambda found: as_served(found, PLACED)) == 0
    assert share(lambda found: found) > 0.5
