from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from model.batch import FeatureBatch
from model.errors import ModelError, SnapshotMismatch, UpdateNotFinite
from model.features import FeatureDecoder
from model.intercept import HORIZON, LONGEST_STEP, START
from model.learner import Learner
from model.metrics import auc
from model.predictor import Predictor
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings

SCHEMA = FeatureSchema(
    fields=(
        FieldSpec(name="user"),
        FieldSpec(name="tags", kind="list"),
        FieldSpec(name="item"),
        FieldSpec(name="price", kind="numeric", buckets="scaled"),
        FieldSpec(name="words", kind="list", space="tags"),
    ),
    embedding_dim=4,
)
SETTINGS = ModelSettings(hidden=(16, 8), initial_rows=16, row_history=False, cross_layers=0)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=(gpu, pytest.mark.gpu))])


def records(count: int, seed: int = 0) -> tuple[FeatureBatch, np.ndarray]:
    """Impressions whose click depends on the user, the item, a tag and the price."""
    rng = np.random.default_rng(seed)
    payloads, odds = [], []
    for _ in range(count):
        user, item, price = int(rng.integers(40)), int(rng.integers(30)), float(rng.normal())
        tags = [f"t{t}" for t in rng.integers(0, 6, rng.integers(0, 4))]
        features: dict[str, Any] = {"user": user, "item": f"i{item}", "price": price, "tags": tags, "words": tags[:1]}
        payloads.append(msgspec.json.encode({"features": features}))
        odds.append(1.5 * (user % 3 - 1) * (1 + item % 3) + ("t0" in tags) - 0.5 * price)
    clicks = rng.random(count) < 1 / (1 + np.exp(-np.array(odds)))
    decoded = FeatureDecoder(SCHEMA).impressions(payloads)
    assert not decoded.bad
    return decoded.batch, clicks.astype(np.float32)


def learn(learner: Learner, batch: FeatureBatch, labels: np.ndarray, rows: int = 64) -> np.ndarray:
    starts = range(0, len(batch), rows)
    return np.concatenate([learner.learn(batch.slice(s, s + rows), labels[s : s + rows]) for s in starts])


def snapshot(learner: Learner) -> dict[str, torch.Tensor]:
    return {**learner.serving_state(), **learner.trainer_state()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# A plain DeepFM with autograd over the same rows, which the hand-written passes must equal.


def autograd_step(
    learner: Learner, batch: FeatureBatch, labels: np.ndarray, weights: np.ndarray, corrects: np.ndarray
) -> dict[str, Any]:
    serving, trainer = learner.serving_state(), learner.trainer_state()
    row_of = {key: row for row, key in enumerate(serving["keys"].tolist())}
    leaves = {name: value.double().requires_grad_() for name, value in serving.items() if name != "keys"}

    def pooled(table: torch.Tensor) -> torch.Tensor:
        out = []
        for row in range(len(batch)):
            single = [table[row_of[key]] * float(batch.scales[row, i]) for i, key in enumerate(batch.keys[row].tolist())]
            bounds = batch.list_offsets[row * batch.lists : (row + 1) * batch.lists + 1]
            lists = [table[[row_of[k] for k in batch.list_keys[a:b].tolist()]].mean(0) for a, b in pairwise(bounds)]
            out.append(torch.stack(single + lists))
        return torch.stack(out)

    embedded, linear = pooled(leaves["embedding"]), pooled(leaves["first_order"])
    hidden = embedded.flatten(1)
    for layer in range(3):
        hidden = torch.nn.functional.linear(hidden, leaves[f"mlp.{layer}.weight"], leaves[f"mlp.{layer}.bias"])
        hidden = hidden.relu() if layer < 2 else hidden
    pairs = sum((embedded[:, i] * embedded[:, j]).sum(1) for i in range(embedded.shape[1]) for j in range(i))
    logits = hidden.squeeze(1) + linear.sum(1) + pairs + leaves["bias"]
    clicked, target = torch.nn.functional.softplus(-logits), torch.from_numpy(labels)
    not_clicked = torch.nn.functional.softplus(logits)
    known = target * clicked + (1 - target) * not_clicked
    corrected = (2 * target - 1) * (
        clicked - learner.negative_rate * not_clicked
    )  # loss of the new label less that of the old label
    loss = (torch.where(torch.from_numpy(corrects), corrected, known) * torch.from_numpy(weights)).sum()
    loss.backward()
    out: dict[str, Any] = {"scores": torch.sigmoid(logits).detach().numpy()}
    for name in ("embedding", "first_order"):
        gradient = leaves[name].grad
        total = trainer[f"adagrad.{name}"].double() + gradient**2
        out[name] = serving[name] - learner.settings.row_learning_rate * gradient / total.sqrt()
    # Newton step: the gradient over the decayed curvature of first labels, which began at START (model/intercept.py).
    curvature = (torch.sigmoid(logits) * torch.sigmoid(-logits) * torch.from_numpy(weights * ~corrects)).sum().detach()
    curvature += START * torch.exp(-curvature / HORIZON)
    out["bias"] = serving["bias"] - (leaves["bias"].grad / curvature).clamp(-LONGEST_STEP, LONGEST_STEP)
    dense = {name: leaf for name, leaf in leaves.items() if name.startswith("mlp.")}
    for leaf in dense.values():
        leaf.grad /= len(batch)
    torch.optim.Adam(dense.values(), lr=learner.settings.dense_learning_rate).step()
    return out | {name: leaf.detach() for name, leaf in dense.items()}


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_a_step_equals_autograds(rate: float) -> None:
    """Against float64, with first labels and both kinds of corrections."""
    batch, labels = records(60)
    rng = np.random.default_rng(1)
    weights, corrects = rng.uniform(0, 3, 60).astype(np.float32), rng.random(60) < 0.4
    learner = Learner(SCHEMA, SETTINGS.model_copy(update={"init_std": 0.3}), device="cpu")
    learner.negative_rate = rate
    learner.learn(batch, labels, np.zeros(60, np.float32))  # creates the rows and changes no weight
    learner._adam.restore({**learner._adam.state(), "step": torch.tensor(0)})
    expected = autograd_step(learner, batch, labels, weights, corrects)
    scores = learner.learn(batch, labels, weights, corrects)
    np.testing.assert_allclose(scores / (scores + (1 - scores) * rate), expected.pop("scores"), rtol=1e-5)
    serving = learner.serving_state()
    for name, value in expected.items():
        torch.testing.assert_close(serving[name].double(), value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_a_version_whose_step_is_a_float_is_taken_over() -> None:
    """Headrace 0.1.0 wrote it so."""
    batch, labels = records(60)
    one, other = (Learner(SCHEMA, SETTINGS, device="cpu") for _ in range(2))
    one.learn(batch, labels)
    state = one.trainer_state()
    other.restore(one.serving_state(), {**state, "adam.step": state["adam.step"].float()})
    assert torch.equal(other.trainer_state()["adam.step"], state["adam.step"])
    np.testing.assert_array_equal(one.learn(batch, labels), other.learn(batch, labels))


@devices
def test_it_learns(device: str) -> None:
    batch, labels = records(6000)
    learner = Learner(SCHEMA, SETTINGS.model_copy(update={"row_learning_rate": 0.1}), device=device)
    scores = learn(learner, batch, labels)
    assert auc(scores[:600], labels[:600]) < auc(scores[-2000:], labels[-2000:])
    assert auc(scores[-2000:], labels[-2000:]) > 0.75
    assert learner.examples_seen == 6000
    assert abs(float(scores[-2000:].mean() - labels[-2000:].mean())) < 0.03


@pytest.mark.gpu
@gpu
def test_cuda_gives_the_cpus_numbers() -> None:
    batch, labels = records(1000)
    one, other = (Learner(SCHEMA, SETTINGS, device=device) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(learn(one, batch, labels), learn(other, batch, labels), rtol=1e-3)
    for name, value in one.serving_state().items():
        torch.testing.assert_close(other.serving_state()[name], value, rtol=1e-3, atol=1e-4)


def test_scores_are_those_from_before_the_update() -> None:
    batch, labels = records(200)
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learn(learner, batch, labels)
    before = learner.predict(batch)
    np.testing.assert_array_equal(learner.learn(batch, labels), before)
    assert not np.array_equal(learner.predict(batch), before)


def test_a_restored_learner_continues_bit_for_bit() -> None:
    batch, labels = records(2560)
    straight = Learner(SCHEMA, SETTINGS, device="cpu")
    scores = learn(straight, batch, labels)
    stopped = Learner(SCHEMA, SETTINGS, device="cpu")
    learn(stopped, batch.slice(0, 1280), labels[:1280])
    saved = stopped.serving_state(), stopped.trainer_state()
    learn(stopped, batch, labels)  # doesn't change the saved state, which is a copy
    resumed = Learner(SCHEMA, SETTINGS.model_copy(update={"initial_rows": 1024}), device="cpu")
    learn(resumed, batch.slice(7, 99), labels[7:99])  # its weights before the restore don't matter
    resumed.restore(*saved)
    assert resumed.examples_seen == 1280
    np.testing.assert_array_equal(learn(resumed, batch.slice(1280, 2560), labels[1280:]), scores[1280:])
    assert_same(snapshot(resumed), snapshot(straight))


def test_the_same_seed_gives_the_same_model_and_another_another() -> None:
    batch, labels = records(500)
    one, same, other = (Learner(SCHEMA, SETTINGS.model_copy(update={"seed": seed}), device="cpu") for seed in (1, 1, 2))
    for learner in (one, same, other):
        learn(learner, batch, labels)
    assert_same(snapshot(one), snapshot(same))
    assert not torch.equal(one.serving_state()["mlp.0.weight"], other.serving_state()["mlp.0.weight"])


@devices
def test_the_predictor_gives_the_learners_scores(device: str) -> None:
    batch, labels = records(700)
    learner = Learner(SCHEMA, SETTINGS, device=device)
    learn(learner, batch.slice(0, 300), labels[:300])
    predictor = Predictor.of(SCHEMA, SETTINGS, learner.serving_state(), device=device)
    scores = predictor.predict(batch)  # with features never learned
    np.testing.assert_array_equal(scores, learner.predict(batch))
    for row in (0, 17, 699):  # a row alone gets the same score, but for rounding in GEMM kernels
        np.testing.assert_allclose(predictor.predict(batch.slice(row, row + 1)), scores[row : row + 1], rtol=1e-5)
    rows = learner.rows
    learner.predict(batch)
    assert learner.rows == rows
    learn(learner, batch, labels)
    np.testing.assert_array_equal(predictor.predict(batch), scores)


def test_unknown_features_count_as_zero() -> None:
    batch, _ = records(50)
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    scores = learner.predict(batch)
    assert learner.rows == 0
    assert len(np.unique(scores)) == 1


def test_empty_batches() -> None:
    batch, labels = records(10)
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    assert learner.learn(batch.slice(0, 0), labels[:0]).shape == (0,)
    assert learner.predict(batch.slice(0, 0)).shape == (0,)
    assert learner.examples_seen == 0
    state = learner.serving_state()
    assert state["embedding"].shape == (0, 4)
    np.testing.assert_array_equal(Predictor.of(SCHEMA, SETTINGS, state).predict(batch), learner.predict(batch))


@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        ([0, math.nan, 1], None, "labels: expected a number from 0 to 1, found nan in row 1"),
        ([0, 0, 2], None, "labels: expected a number from 0 to 1, found 2.0 in row 2"),
        ([0, 0, 1], [1, 1, math.inf], "weights: expected a finite number, 0 or more, found inf in row 2"),
        ([0, 0, 1], [-1, 1, 1], "weights: expected a finite number, 0 or more, found -1.0 in row 0"),
        ([0, 0], None, r"labels: expected one for each of the batch's 3 rows, found shape \(2,\)"),
        ([0, 0, 1], [[1, 1, 1]], r"weights: expected one for each of the batch's 3 rows, found shape \(1, 3\)"),
    ],
)
def test_labels_and_weights_that_are_refused(labels: list[float], weights: list[float] | None, message: str) -> None:
    batch, _ = records(3)
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    before = snapshot(learner)
    with pytest.raises(ModelError, match=message):
        learner.learn(batch, labels, weights)
    assert_same(snapshot(learner), before)


@pytest.mark.parametrize("name", ["bias", "embedding", "mlp.1.weight"])
def test_a_step_that_isnt_finite_writes_nothing(name: str) -> None:
    batch, labels = records(100)
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learn(learner, batch, labels)
    serving, trainer = learner.serving_state(), learner.trainer_state()
    serving[name].view(-1)[0] = math.inf
    learner.restore(serving, trainer)
    expected = UpdateNotFinite if name == "embedding" else ModelError  # a bad row spoils batches with that row alone
    with pytest.raises(expected, match=r"nothing was written") as raised:
        learner.learn(batch, labels)
    assert type(raised.value) is expected
    assert_same(snapshot(learner), {**serving, **trainer})


@pytest.mark.parametrize("weight", [1e17, 1e30])
def test_a_weight_that_would_overflow_writes_nothing(weight: float) -> None:
    batch, labels = records(10)
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    learner.learn(batch, labels)
    before = snapshot(learner)
    with pytest.raises(
        UpdateNotFinite, match=r"update of 10 examples: expected norms below 1e\+16, found .*nothing was written"
    ):
        learner.learn(batch, labels, np.full(10, weight))
    assert_same(snapshot(learner), before)


@pytest.mark.parametrize("buckets", ["log", "linear", "scaled"])
@pytest.mark.parametrize("value", [1e38, -1e38, 1.7e308, 5e-324])
def test_absurd_numbers_as_features_are_learned_and_leave_the_model_finite(buckets: str, value: float) -> None:
    schema = FeatureSchema(
        fields=(FieldSpec(name="user"), FieldSpec(name="x", kind="numeric", buckets=buckets)), embedding_dim=4
    )
    payload = msgspec.json.encode({"features": {"user": "a", "x": value}})
    batch = FeatureDecoder(schema).impressions([payload] * 64).batch
    learner = Learner(schema, SETTINGS, device="cpu")
    for _ in range(30):
        learner.learn(batch, np.arange(64) % 2, np.full(64, 1e4))
    assert all(torch.isfinite(tensor).all() for tensor in snapshot(learner).values())
    assert np.isfinite(learner.predict(batch)).all()


def test_a_snapshot_of_another_model_is_refused() -> None:
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    serving, trainer = learner.serving_state(), learner.trainer_state()
    before = snapshot(learner)
    wider = Learner(SCHEMA, SETTINGS.model_copy(update={"hidden": (32, 8)}), device="cpu")
    with pytest.raises(SnapshotMismatch, match=r"tensor 'mlp.0.weight': expected 16×20 of torch.float32, found 32×20"):
        learner.restore(wider.serving_state(), trainer)
    with pytest.raises(SnapshotMismatch, match=r"tensor 'adam.exp_avg': expected .*, found"):
        learner.restore(serving, wider.trainer_state())
    with pytest.raises(SnapshotMismatch, match=r"'keys': expected n of torch.int64, found no such tensor"):
        Predictor.of(SCHEMA, SETTINGS, {name: value for name, value in serving.items() if name != "keys"})
    assert_same(snapshot(learner), before)


def test_a_batch_of_another_schema_is_refused() -> None:
    batch, labels = records(5)
    other = FeatureSchema(fields=SCHEMA.fields[:3])
    with pytest.raises(ModelError, match=r"batch: expected 2 single-valued fields and 1 lists, .* found 3 and 2"):
        Learner(other, SETTINGS, device="cpu").learn(batch, labels)


def test_missing_devices_and_empty_schemas_are_rejected() -> None:
    with pytest.raises(ModelError, match="device: expected auto, cpu or cuda, found 'abacus'"):
        Learner(SCHEMA, SETTINGS, device="abacus")
    with pytest.raises(ModelError, match="device: expected auto, cpu or cuda, found 'meta'"):
        Learner(SCHEMA, SETTINGS, device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="expected a CUDA device for 'cuda', found none on this machine; use cpu or auto"):
            Learner(SCHEMA, SETTINGS, device="cuda")
    with pytest.raises(ModelError, match=r"features\.fields is empty"):
        Learner(FeatureSchema(), SETTINGS)


def test_read_only_arrays_are_fine() -> None:
    batch, labels = records(20)
    for array in (batch.keys, batch.list_keys, batch.list_offsets, batch.scales, labels):
        array.setflags(write=False)
    learner = Learner(SCHEMA, SETTINGS, device="cpu")
    assert len(learner.learn(batch, labels)) == 20


def test_a_step_costs_the_same_whatever_the_table_holds() -> None:
    schema = FeatureSchema(fields=tuple(FieldSpec(name=f"f{i}") for i in range(8)), embedding_dim=8)
    rng = np.random.default_rng(0)

    def batch(rows: int) -> FeatureBatch:
        return FeatureBatch(rng.integers(0, 2**62, (rows, 8)), np.empty(0, np.int64), np.zeros(1, np.int64), lists=0)

    def cost(learner: Learner, hot: FeatureBatch) -> float:
        labels = np.zeros(len(hot), np.float32)
        learner.learn(hot, labels)
        times = []
        for _ in range(30):
            began = time.process_time()  # without other processes' time
            learner.learn(hot, labels)
            times.append(time.process_time() - began)
        return min(times)

    settings = ModelSettings(hidden=(16,), row_history=False, cross_layers=0)
    small, large = Learner(schema, settings, device="cpu"), Learner(schema, settings, device="cpu")
    large.learn(batch(30_000), np.zeros(30_000, np.float32))
    hot = batch(256)
    # A pass over the 240,000 rows would take fifty times as long or more; noise and caches make a factor of two or three.
    assert cost(large, hot) < 5 * cost(small, hot)
