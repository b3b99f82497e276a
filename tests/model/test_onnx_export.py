"""An exported model against ONNX Runtime: it scores as our own predictor does, known values and unknown ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from model import onnx_export
from model.batch import FeatureBatch
from model.errors import ModelError, SnapshotMismatch
from model.features import FeatureDecoder
from model.learner import Learner
from model.onnx_export import Exported, export_onnx
from model.predictor import Predictor
from model.rows import ROW_PARTS, Rows
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from tests.model.test_learner import SCHEMA, SETTINGS, learn, records

HISTORY = SETTINGS.model_copy(update={"row_history": True})


def trained(schema: FeatureSchema = SCHEMA, count: int = 600, settings: ModelSettings = SETTINGS) -> dict[str, torch.Tensor]:
    learner = Learner(schema, settings, device="cpu")
    batch, clicks = records(count)
    learn(learner, batch, clicks)
    return learner.serving_state()


def pieces(serving: dict[str, torch.Tensor], rows: int = 37) -> Iterator[Rows]:
    for start in range(0, len(serving["keys"]), rows):
        part = slice(start, start + rows)
        yield Rows.of(serving).map(lambda tensor, part=part: tensor[part])


def export(
    path: Path,
    serving: dict[str, torch.Tensor],
    schema: FeatureSchema = SCHEMA,
    settings: ModelSettings = SETTINGS,
    rate: float = 1.0,
) -> Exported:
    dense = {name: tensor for name, tensor in serving.items() if name not in ROW_PARTS}
    return export_onnx(path, schema, settings, dense, lambda: pieces(serving), negative_rate=rate, about={"version": "7"})


def inputs_of(batch: FeatureBatch, session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """A batch as the model's inputs: lists filled up with -1."""
    lengths = np.diff(batch.list_offsets)
    padded = np.full((len(lengths), max(int(lengths.max(initial=0)), 1) + 1), -1, np.int64)
    for row, (start, stop) in enumerate(pairwise(batch.list_offsets)):
        padded[row, : stop - start] = batch.list_keys[start:stop]
    all_of_them = {
        "keys": batch.keys,
        "scales": batch.scales,
        "list_keys": padded.reshape(len(batch), batch.lists, -1) if batch.lists else None,
    }
    return {each.name: all_of_them[each.name] for each in session.get_inputs()}  # type: ignore[misc]


def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("settings", [SETTINGS, HISTORY, HISTORY.model_copy(update={"name": "lr"})])
@pytest.mark.parametrize("rate", [1.0, 0.05])
def test_scores_are_those_of_the_predictor(tmp_path: Path, rate: float, settings: ModelSettings) -> None:
    serving = trained(settings=settings)
    exported = export(tmp_path / "model.onnx", serving, settings=settings, rate=rate)
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    session = session_of(tmp_path / "model.onnx")
    batch, _ = records(400, seed=5)  # other users and items among them, and lists of all lengths
    expected = Predictor.of(SCHEMA, settings, serving, device="cpu", negative_rate=rate).predict(batch)
    (scores,) = session.run(None, inputs_of(batch, session))
    np.testing.assert_allclose(scores, expected, rtol=2e-5, atol=1e-7)
    assert np.std(expected) > 0.01 * rate
    assert exported == Exported(
        (tmp_path / "model.onnx",),
        {"keys": "int64 (batch, 3)", "scales": "float32 (batch, 3)", "list_keys": "int64 (batch, 2, elements)"},
        len(serving["keys"]),
    )
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["version"] == "7" and json.loads(metadata["inputs"]) == exported.inputs
    assert [field["name"] for field in json.loads(metadata["fields"])] == ["user", "item", "price", "tags", "words"]


@pytest.mark.parametrize("settings", [SETTINGS, HISTORY])
def test_missing_and_unknown_values(tmp_path: Path, settings: ModelSettings) -> None:
    """-1 is a missing value, as the decoder's own key for it is; another key that the table lacks reads its field's average."""
    serving = trained(settings=settings)
    export(tmp_path / "model.onnx", serving, settings=settings)
    session = session_of(tmp_path / "model.onnx")
    decoder = FeatureDecoder(SCHEMA)
    nothing = decoder.impressions([b'{"features": {}}', b'{"features": {"user": "never seen", "tags": ["nor this"]}}']).batch
    expected = Predictor.of(SCHEMA, settings, serving, device="cpu").predict(nothing)
    (scores,) = session.run(None, inputs_of(nothing, session))
    np.testing.assert_allclose(scores, expected, rtol=2e-5)
    by_minus_one = {
        "keys": np.full((1, 3), -1, np.int64),
        "scales": np.ones((1, 3), np.float32),
        "list_keys": np.full((1, 2, 3), -1, np.int64),
    }
    (scores,) = session.run(None, by_minus_one)
    np.testing.assert_allclose(scores, expected[:1], rtol=2e-5)
    extreme = {**by_minus_one, "keys": np.array([[2**63 - 1, -(2**63), 0]], np.int64)}
    assert np.isfinite(session.run(None, extreme)[0]).all()


@pytest.mark.parametrize(
    "fields", [("user",), ("user", "item", "other"), ("tags",), ("user", "tags")], ids=lambda fields: "-".join(fields)
)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 64, 65])
def test_tables_of_any_size_and_fields_of_any_kind(tmp_path: Path, fields: tuple[str, ...], rows: int) -> None:
    schema = FeatureSchema(
        fields=tuple(FieldSpec(name=name, kind="list" if name == "tags" else "categorical") for name in fields), embedding_dim=3
    )
    settings = ModelSettings(hidden=(5,), row_history=False, cross_layers=0)
    generator = torch.Generator().manual_seed(rows)
    features = [{"user": f"u{i % 9}", "item": i % 4, "tags": ["a", "b", f"t{i % 5}"][: i % 4]} for i in range(40)]
    decoded = FeatureDecoder(schema).impressions([json.dumps({"features": each}).encode() for each in features])
    known = np.unique(np.concatenate((decoded.batch.keys.ravel(), decoded.batch.list_keys)))
    more = np.array([2**63 - 1, -(2**63), 0, 5, -2], np.int64)
    keys = torch.from_numpy(np.resize(np.concatenate((known, more, np.arange(10**6, 10**6 + 65))), rows))
    dense = Learner(schema, settings, device="cpu").serving_state()
    serving = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in dense.items()}
    serving["keys"] = keys[torch.randperm(rows, generator=generator)]
    serving["embedding"] = torch.randn((rows, 3), generator=generator)
    serving["first_order"] = torch.randn(rows, generator=generator)
    exported = export(tmp_path / "model.onnx", serving, schema, settings)
    session = session_of(tmp_path / "model.onnx")
    (scores,) = session.run(None, inputs_of(decoded.batch, session))
    expected = Predictor.of(schema, settings, serving, device="cpu").predict(decoded.batch)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)
    assert exported.rows == rows


def test_a_large_table_lies_in_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = trained()
    batch, _ = records(50, seed=5)
    export(tmp_path / "small.onnx", serving)
    small = session_of(tmp_path / "small.onnx")
    monkeypatch.setattr(onnx_export, "LARGEST_INSIDE", 100)
    exported = export(tmp_path / "large.onnx", serving)
    assert exported.files == (tmp_path / "large.onnx", tmp_path / "large.onnx.data")
    onnx.checker.check_model(tmp_path / "large.onnx")
    large = session_of(tmp_path / "large.onnx")
    (expected,), (scores,) = small.run(None, inputs_of(batch, small)), large.run(None, inputs_of(batch, large))
    assert np.array_equal(scores, expected)


def test_weights_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(SnapshotMismatch, match=r"mlp\.0\.weight"):
        export(tmp_path / "model.onnx", trained(), settings=ModelSettings(hidden=(7,), row_history=False, cross_layers=0))
    assert list(tmp_path.iterdir()) == []


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModelError, match=r"export: expected the Python package onnx, found none\. Install it"):
        export(tmp_path / "model.onnx", trained(count=64))
