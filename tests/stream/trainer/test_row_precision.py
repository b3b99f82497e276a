"""Rows that scorers have in float16: the same bits by deltas, by versions and after restarts, and never a wrong digest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.batch import FeatureBatch
from model.predictor import Predictor
from model.rows import ModelDelta, Rows, rounded
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.records.delta import encode_delta
from stream.records.delta_assembly import assemble
from stream.trainer.sanity import delta_problems
from tests.stream.records.made_deltas import header
from tests.stream.trainer.factory import MODEL, SCHEMA
from tests.stream.trainer.fakes import NO_KEYS, DeltaLog
from tests.stream.trainer.test_rebase import Trainer, withhold

LARGEST = 65_504.0
"""Of float16."""


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30))
def test_rows_arrive_as_the_trainer_rounds_them(weights):
    found = torch.tensor(weights)
    rows = rounded(Rows(torch.arange(len(found)), found.view(-1, 1), found), "float16")
    with np.errstate(over="ignore"):
        expected = found.numpy().astype(np.float16).astype(np.float32)
    delta = ModelDelta(rows, NO_KEYS, None, 7)
    received = assemble(encode_delta(header(dtype="float16"), delta, 65_536)).model.rows
    for column in (rows.first_order, received.first_order, received.embedding.view(-1)):
        assert column.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("weight", "arrives"),
    [
        (0.1, 0.0999755859375),
        (-0.0, -0.0),
        (6e-8, 2.0**-24),  # the smallest number of float16
        (1e-8, 0.0),
        (LARGEST, LARGEST),
        (65_519.0, LARGEST),
        (65_520.0, float("inf")),
    ],
)
def test_small_and_large_weights(weight, arrives):
    rows = rounded(Rows(torch.tensor([1]), torch.tensor([[weight]]), torch.tensor([weight])), "float16")
    assert rows.first_order.numpy().tobytes() == np.float32(arrives).tobytes()
    problems = delta_problems(ModelDelta(rows, NO_KEYS, {}, 0))
    assert bool(problems) == np.isinf(arrives)  # then nothing is published


def loaded(folder, version, manifest):
    """A scorer's weights of a version from a store."""
    store = SnapshotStore(SnapshotSettings(url=str(folder / f"{manifest.chain.replace('/', '-')}-{manifest.sequence}")))
    version.write(store, manifest)
    predictor = Predictor.of(SCHEMA, MODEL, store.serving(manifest.version), device="cpu")
    assert f"{predictor.digest:016x}" == manifest.digest
    return predictor


def follow(predictor, deltas):
    for each in deltas:
        predictor.apply(predictor.prepare(each.model))


def scores(predictor):
    keys = np.arange(SCHEMA.embedding_dim * 7, dtype=np.int64).reshape(-1, len(SCHEMA.fields))
    return predictor.predict(FeatureBatch(keys, np.empty(0, np.int64), np.zeros(1, np.int64), lists=0))


async def test_a_scorer_that_starts_has_what_one_that_followed_has(tmp_path):
    log = DeltaLog()
    trainer = Trainer(log, epoch=1, precision="float16")
    trainer.learn(0, 64)
    first = loaded(tmp_path, *trainer.version(on_chain=True))
    trainer.learn(64, 128)
    await trainer.publish()
    trainer.learner.evict(log.deltas[-1].model.rows.keys[:2])
    trainer.learn(128, 160)
    await trainer.publish()
    version, manifest = trainer.version(on_chain=True)
    follow(first, log.deltas)
    second = loaded(tmp_path, version, manifest)
    assert {each.header.dtype for each in log.deltas} == {"float16"}
    assert first.digest == second.digest == trainer.learner.digest
    np.testing.assert_array_equal(scores(first), scores(second))

    # What training goes on from has all digits, and the restarted trainer knows what scorers have.
    exact = trainer.learner.serving_state()
    assert torch.equal(torch.cat([piece.serving.embedding for piece in version.pieces]), exact["embedding"])
    assert not torch.equal(exact["embedding"], exact["embedding"].half().float())
    trainer.learn(160, 192)
    await trainer.publish()
    again = Trainer(log, epoch=2, precision="float16")
    await again.go_on(version, manifest)
    assert again.learner.digest == int(manifest.digest, 16)
    again.learn(160, 224)
    await again.publish()
    follow(first, log.deltas[2:])
    follow(second, log.deltas[2:])
    assert first.digest == second.digest == again.learner.digest


@pytest.mark.parametrize(("before", "after"), [("float32", "float16"), ("float16", "float32")])
async def test_another_precision_begins_a_chain_with_a_version(tmp_path, caplog, before, after):
    log = DeltaLog()
    trainer = Trainer(log, epoch=1, precision=before)
    trainer.learn(0, 64)
    version, manifest = trainer.version(on_chain=True)
    scorer = loaded(tmp_path, version, manifest)
    trainer.learn(64, 128)
    await trainer.publish()
    follow(scorer, log.deltas)

    again = Trainer(log, epoch=2, precision=after)
    await again.go_on(version, manifest)
    assert f"snapshots.row_precision is {after}, and was {before} at delta 1 of deepfm/1/0" in caplog.text
    assert not again.chain.is_ready({0: 96})  # scorers don't go back in time
    again.learn(64, 160)
    assert again.chain.is_ready({0: 160})
    assert again.chain.begins_with_a_version
    begun, manifest = again.version(on_chain=True)
    assert (manifest.chain, manifest.sequence, manifest.deltas_offset) == ("deepfm/2/0", 0, log.position)
    scorer = loaded(tmp_path, begun, manifest)
    again.learn(160, 192)
    await again.publish()
    assert (log.deltas[-1].header.dtype, log.deltas[-1].header.rebase) == (after, False)
    follow(scorer, log.deltas[-1:])
    assert scorer.digest == again.learner.digest


async def test_the_old_precision_again_before_the_chain_has_begun(tmp_path):
    """A version that is written while nothing is published yet knows all rows in which scorers may differ."""
    log = DeltaLog()
    trainer = Trainer(log, epoch=1)
    trainer.learn(0, 64)
    version, manifest = trainer.version(on_chain=True)
    scorer = loaded(tmp_path, version, manifest)
    trainer.learn(64, 128, "other")
    await trainer.publish()
    follow(scorer, log.deltas)
    changed = Trainer(log, epoch=2, precision="float16")
    await changed.go_on(version, manifest)
    withhold(changed.training)
    changed.learn(64, 96)
    version, manifest = changed.version(on_chain=False)
    back = Trainer(log, epoch=3)
    await back.go_on(version, manifest)
    back.learn(96, 160)
    await back.publish()
    follow(scorer, log.deltas[-1:])
    assert scorer.digest == back.learner.digest
