"""What every model must do, as a learner and as a scorer has it: one suite for all, with each optimizer of the first order."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch

from model.batch import FeatureBatch
from model.errors import ModelError, SnapshotMismatch, UpdateNotFinite
from model.features import FeatureDecoder
from model.learner import Learner
from model.metrics import auc
from model.predictor import Predictor
from model.schema import FeatureSchema, FieldSpec
from model.table_settings import TableSettings
from tests.model.dense.variants import VARIANTS, settings
from tests.model.test_learner import SCHEMA, assert_same, gpu, learn, records, snapshot
from tests.model.test_onnx_export import export, inputs_of, session_of

FTRL = {"first_order": "ftrl", "ftrl_alpha": 0.1, "ftrl_l1": 0.01, "ftrl_l2": 0.1}
LEARNERS = [*VARIANTS, "lr+ftrl", "deepfm+ftrl"]
every_learner = pytest.mark.parametrize("variant", LEARNERS)
BATCH, LABELS = records(1200)
FIRST = 300  # examples that `seen` learns
UNKNOWN = FeatureDecoder(SCHEMA).impressions([b'{"features": {"user": "new", "item": "new", "tags": ["new"]}}'] * 3).batch


def new(variant: str, *, device: str = "cpu", **more: object) -> Learner:
    name = variant.removesuffix("+ftrl")
    optimizer = FTRL if variant.endswith("+ftrl") else {}
    return Learner(SCHEMA, settings(name, **optimizer, **more), device=device)


def seen(variant: str, **more: object) -> Learner:
    learner = new(variant, **more)
    learn(learner, BATCH.slice(0, FIRST), LABELS[:FIRST])
    return learner


def predictor_of(learner: Learner, serving: dict[str, torch.Tensor] | None = None) -> Predictor:
    return Predictor.of(SCHEMA, learner.settings, serving or learner.serving_state(), device="cpu")


def part(start: int, stop: int) -> tuple[FeatureBatch, np.ndarray]:
    return BATCH.slice(start, stop), LABELS[start:stop]


@every_learner
def test_it_scores_before_it_learns_and_scorers_score_the_same(variant: str) -> None:
    learner = seen(variant)
    batch, labels = part(0, 64)
    before = learner.predict(batch)
    np.testing.assert_array_equal(learner.learn(batch, labels), before)
    after = learner.predict(BATCH)
    assert not np.array_equal(after[:64], before)
    assert len(np.unique(after)) > 500
    predictor = predictor_of(learner)
    np.testing.assert_array_equal(predictor.predict(BATCH), after)
    assert predictor.digest == learner.take_delta().digest


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("kind", ["categorical", "numeric", "list"])
@every_learner
def test_one_field_is_enough(variant: str, kind: Literal["categorical", "numeric", "list"], history: bool) -> None:
    """A list alone leaves nothing single-valued, a number alone has one row, and neither has pairs of fields."""
    schema = FeatureSchema(fields=(FieldSpec(name="x", kind=kind, buckets="standard"),), embedding_dim=2)
    values = {"categorical": ["a", "b", None], "numeric": [0.5, -3, None], "list": [["a", "b"], ["b"], []]}[kind]
    events = [json.dumps({"features": {"x": values[row % 3]}}).encode() for row in range(48)]
    batch, labels = FeatureDecoder(schema).impressions(events).batch, np.arange(48) % 2
    named = new(variant, row_history=history).settings
    learner = Learner(schema, named, table=TableSettings(admit_after=2, max_rows=2), device="cpu")
    for _ in range(3):
        learner.learn(batch, labels, None, np.arange(48) % 5 == 0, np.arange(48.0))
    predictor = Predictor.of(schema, named, learner.serving_state(), device="cpu")
    np.testing.assert_array_equal(predictor.predict(batch), learner.predict(batch))


@every_learner
def test_deltas_lead_a_scorer_to_the_learners_scores(variant: str) -> None:
    learner = seen(variant)
    predictor = predictor_of(learner)
    learner.take_delta()
    for start in (300, 600, 900):
        learner.learn(*part(start, start + 300))
        predictor.apply(predictor.prepare(learner.take_delta(dense=start != 600)))
    np.testing.assert_array_equal(predictor.predict(BATCH), learner.predict(BATCH))


@every_learner
def test_features_that_were_never_seen_and_that_are_missing(variant: str) -> None:
    """They read the average of their field, and nothing is made of them."""
    learner = seen(variant)
    nothing = FeatureDecoder(SCHEMA).impressions([b'{"features": {}}'] * 3).batch
    before = snapshot(learner)
    for batch in (UNKNOWN, nothing):
        scores = learner.predict(batch)
        assert np.isfinite(scores).all()
        assert len(np.unique(scores)) == 1
        learner.predict(batch.slice(0, 1))
    assert_same(snapshot(learner), before)
    learner.learn(UNKNOWN, np.ones(3))
    assert learner.rows == len(before["keys"]) + 4  # user, item, price (missing: a row of its own), tag; words is missing, too


@every_learner
def test_features_that_vanished_are_as_never_seen(variant: str) -> None:
    learner = seen(variant)
    predictor = predictor_of(learner)
    learner.take_delta()
    keys = learner.serving_state()["keys"]
    assert learner.evict(keys) == len(keys)
    predictor.apply(predictor.prepare(learner.take_delta()))
    scores = predictor.predict(BATCH)
    np.testing.assert_array_equal(scores, learner.predict(BATCH))
    assert np.isfinite(scores).all()
    learn(learner, *part(0, 600))  # the same values again, in rows that others had
    saved = learner.serving_state(), learner.trainer_state()
    other = new(variant)
    other.restore(*saved)
    np.testing.assert_array_equal(learn(other, *part(600, 900)), learn(learner, *part(600, 900)))


@every_learner
def test_saved_and_loaded_it_goes_on_bit_for_bit(variant: str) -> None:
    """By a freeze in pieces, as versions are written and read."""
    learner = seen(variant)
    with learner.freeze() as frozen:
        expected = learn(learner, *part(FIRST, 1200))  # while the version is written
        pieces = list(frozen.pieces(17))
        resumed = new(variant, initial_rows=1024)
        learn(resumed, *part(700, 800))  # what it was before doesn't matter
        resumed.begin_restore(frozen.rows)
        for piece in pieces:
            resumed.restore_rows(piece.serving, piece.trainer)
        resumed.finish_restore(frozen.dense, frozen.small)
    np.testing.assert_array_equal(learn(resumed, *part(FIRST, 1200)), expected)
    assert_same(snapshot(resumed), snapshot(learner))


@every_learner
def test_an_earlier_moment_scores_as_it_did(variant: str) -> None:
    learner = seen(variant)
    before = learner.predict(BATCH)
    earlier = learner.keep()
    learn(learner, *part(FIRST, 900))
    np.testing.assert_array_equal(earlier.predict(BATCH), before)
    earlier.close()


@every_learner
def test_the_same_seed_gives_the_same_model_and_another_another(variant: str) -> None:
    one, same, other = (snapshot(seen(variant, seed=seed)) for seed in (1, 1, 2))
    assert_same(one, same)
    assert not torch.equal(one["embedding"], other["embedding"])
    cross_or_mlp = next((name for name in one if name.endswith(".weight") or name == "cross.out"), None)
    assert cross_or_mlp is None or not torch.equal(one[cross_or_mlp], other[cross_or_mlp])


@every_learner
def test_one_row_and_many(variant: str) -> None:
    learner = seen(variant)
    many = learner.predict(BATCH)
    for row in (0, 700, 1199):
        np.testing.assert_allclose(learner.predict(BATCH.slice(row, row + 1)), many[row : row + 1], rtol=1e-5)
    learned = learner.learn(*part(700, 701))
    np.testing.assert_allclose(learned, many[700:701], rtol=1e-4)  # its new values have some noise already
    assert learner.examples_seen == FIRST + 1
    assert learner.learn(BATCH.slice(0, 0), LABELS[:0]).shape == (0,)


@every_learner
def test_nan_is_refused(variant: str) -> None:
    learner = seen(variant)
    before = snapshot(learner)
    batch, labels = part(0, 64)
    with pytest.raises(ModelError, match="labels: expected a number from 0 to 1, found nan in row 1"):
        learner.learn(batch, [0.0, math.nan, *labels[2:]])
    with pytest.raises(ModelError, match="weights: expected a finite number, 0 or more, found nan in row 0"):
        learner.learn(batch, labels, [math.nan, *np.ones(63)])
    assert_same(snapshot(learner), before)
    serving, trainer = learner.serving_state(), learner.trainer_state()
    read = "embedding" if variant not in ("lr", "lr+ftrl") else "first_order"
    serving[read][:] = math.nan
    learner.restore(serving, trainer)
    with pytest.raises(UpdateNotFinite, match="nothing was written"):
        learner.learn(batch, labels)
    for name, value in snapshot(learner).items():
        torch.testing.assert_close(value, {**serving, **trainer}[name], rtol=0, atol=0, equal_nan=True)


@every_learner
def test_only_what_the_model_reads_of_the_rows_of_a_batch_changes(variant: str) -> None:
    learner = seen(variant)
    before = snapshot(learner)
    batch, labels = part(0, 5)
    learner.learn(batch, labels)
    after = snapshot(learner)
    in_batch = torch.isin(before["keys"], torch.from_numpy(np.concatenate([batch.keys.ravel(), batch.list_keys])))
    reads_first_order = variant.split("+")[0] not in ("fnn", "ipnn", "opnn", "pnn")
    reads_embedding = variant not in ("lr", "lr+ftrl")
    for name, reads in (("embedding", reads_embedding), ("first_order", reads_first_order)):
        changed = (before[name] != after[name]).reshape(len(before["keys"]), -1).any(1)
        assert not changed[~in_batch].any()
        assert bool(changed[in_batch].all()) is bool(changed.any()) is reads


@every_learner
def test_it_learns(variant: str) -> None:
    learner = new(variant, row_learning_rate=0.1, ftrl_alpha=0.5) if "ftrl" not in variant else new(variant)
    batch, labels = records(4000, seed=4)
    scores = learn(learner, batch, labels)
    assert auc(scores[-2000:], labels[-2000:]) > auc(scores[:400], labels[:400]) + 0.05
    assert abs(float(scores[-2000:].mean() - labels[-2000:].mean())) < 0.03


@every_learner
def test_a_version_of_another_model_is_refused(variant: str) -> None:
    """Where the shapes differ; where they don't, the trainer compares names (`stream.trainer.start`)."""
    learner = seen(variant)
    before = snapshot(learner)
    for other in LEARNERS:
        found = new(other)
        if snapshot(found).keys() - before.keys() or before.keys() - snapshot(found).keys():
            with pytest.raises(SnapshotMismatch):
                found.restore(learner.serving_state(), learner.trainer_state())


@every_learner
def test_exported_it_scores_the_same(variant: str, tmp_path: Path) -> None:
    learner = seen(variant)
    serving = learner.serving_state()
    export(tmp_path / "model.onnx", serving, settings=learner.settings, rate=0.5)
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    session = session_of(tmp_path / "model.onnx")
    expected = Predictor.of(SCHEMA, learner.settings, serving, device="cpu", negative_rate=0.5)
    for batch in (BATCH, UNKNOWN):
        (scores,) = session.run(None, inputs_of(batch, session))
        np.testing.assert_allclose(scores, expected.predict(batch), rtol=3e-5, atol=1e-7)


@pytest.mark.gpu
@gpu
@every_learner
def test_cuda_gives_the_cpus_numbers(variant: str) -> None:
    one, other = new(variant), new(variant, device="cuda")
    np.testing.assert_allclose(learn(one, BATCH, LABELS), learn(other, BATCH, LABELS), rtol=1e-3, atol=1e-5)
    found = other.serving_state()
    for name, value in one.serving_state().items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
