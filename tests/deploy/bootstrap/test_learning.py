"""Learning from history: the same weights however often it is interrupted, by the labels that the join would give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.bootstrap.learning import Checkpoints, Progress, Run
from deploy.bootstrap.reader import HistoryReader, Records
from deploy.bootstrap.source import Source
from deploy.datasets import Columns
from deploy.errors import DataSetError
from model.features import FeatureDecoder
from model.learner import Learner
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings

SCHEMA = FeatureSchema(fields=(FieldSpec(name="u"), FieldSpec(name="item"), FieldSpec(name="price", kind="numeric")))
MODEL = ModelSettings(hidden=(8, 4), batch_rows=64, row_history=False, cross_layers=0)
ROWS = 1_500
WINDOW_MS = 1_000


def log(folder: Path, **changed: object) -> Source:
    """A source of impressions, a third of them with a click, and some clicks later than the window."""
    file = folder / "log.jsonl"
    random = np.random.default_rng(5)
    with file.open("w") as out:
        for row in range(ROWS):
            event = {
                "timestamp": 1_700_000_000_000 + 10 * row,
                "u": f"u{random.integers(40)}",
                "item": f"i{random.integers(9)}",
            }
            event["price"] = float(random.integers(100))
            click = event["timestamp"] + (2_000 if row % 5 == 0 else 300)
            out.write(json.dumps({**event, "click_timestamp": click if random.random() < 0.4 else None}) + "\n")
    columns = Columns(clicked=None, click_timestamp="click_timestamp")
    return Source(**{"name": "jsonl", "schema": SCHEMA, "window_ms": WINDOW_MS, "path": file, "columns": columns, **changed})  # type: ignore[arg-type]


def run_of(source: Source, folder: Path, name: str = "one", **options: float) -> Run:
    return Run(source, MODEL, Checkpoints(folder, name), device="cpu", window=500, **options)  # type: ignore[arg-type]


def weights(run: Run) -> dict[str, torch.Tensor]:
    learner = run.training._learner
    assert isinstance(learner, Learner)
    return {**learner.serving_state(), **learner.trainer_state()}


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.bootstrap.learning.SHOWN_S", 0.0)
    source = log(tmp_path)
    whole = run_of(source, tmp_path, "whole")
    assert whole.learn()
    seen = []
    for stop_at in (400, 900, ROWS):
        run = run_of(source, tmp_path, checkpoint_s=0.0)
        seen.append(run.resumed_at)

        def stop(progress: Progress, run: Run = run, stop_at: int = stop_at) -> None:
            if progress.examples >= stop_at:
                run.stop()

        finished = run.learn(stop)
    assert seen[0] == 0 and 400 <= seen[1] < seen[2] < ROWS
    assert not finished or run.training.examples_seen == ROWS
    again = run_of(source, tmp_path)
    assert again.learn()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name
    one, other = whole.capture(), again.capture()
    assert one.on_chain and one.digest == other.digest
    assert whole.history("f") == again.history("f")
    assert whole.history("f").until_ms == 1_700_000_000_000 + 10 * (ROWS - 1)
    for scope in ("window", "total"):
        found, wanted = (each.evaluation.freeze().report()["progressive", scope] for each in (again, whole))
        assert (found.examples, found.positives) == (wanted.examples, wanted.positives)
        assert (found.auc, found.log_loss) == pytest.approx((wanted.auc, wanted.log_loss))
    one.frozen.close()
    other.frozen.close()


def test_it_is_the_trainers_own_learning_of_final_labels(tmp_path: Path) -> None:
    source = log(tmp_path)
    run = run_of(source, tmp_path)
    assert run.learn()
    plain = Learner(SCHEMA, MODEL, device="cpu")
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    features = [{name: each[name] for name in ("u", "item", "price")} for each in events]
    payloads = [json.dumps({"impression_id": "", "timestamp": 0, "features": each}).encode() for each in features]
    decoded = FeatureDecoder(SCHEMA).impressions(payloads)
    labels = [
        each["click_timestamp"] is not None and each["click_timestamp"] - each["timestamp"] <= WINDOW_MS for each in events
    ]
    times = np.array([each["timestamp"] for each in events])
    assert any(each["click_timestamp"] and not label for each, label in zip(events, labels, strict=True))
    for at in range(0, ROWS, 64):
        part = slice(at, at + 64)
        plain.learn(decoded.batch.slice(at, at + 64), np.array(labels[part], np.float32), None, None, times[part])
    for name, tensor in {**plain.serving_state(), **plain.trainer_state()}.items():
        assert torch.equal(tensor, weights(run)[name]), name


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    source = log(tmp_path)
    whole = run_of(source, tmp_path, "whole")
    assert whole.learn()
    run_of(source, tmp_path, checkpoint_s=0.0).learn()
    newest = sorted((tmp_path / "one").iterdir())[-1]
    dense = next(newest.glob("dense*"))
    dense.write_bytes(dense.read_bytes()[:-1])
    again = run_of(source, tmp_path)
    assert 0 < again.resumed_at < ROWS
    assert again.learn()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name


@pytest.mark.parametrize("file", ["serving-*", "trainer-*", "trainer.*", "dense*"])
def test_where_every_checkpoint_is_damaged_it_begins_again(tmp_path: Path, file: str) -> None:
    source = log(tmp_path, limit=200)
    whole = run_of(source, tmp_path)
    assert whole.learn()
    (only,) = (each for each in (tmp_path / "one").iterdir() if each.is_dir())
    part = next(only.glob(file))
    part.write_bytes(bytes(reversed(part.read_bytes())))
    again = run_of(source, tmp_path)
    assert again.resumed_at == 0
    assert again.learn()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name


def test_what_the_model_would_reject_is_an_error_that_names_it(tmp_path: Path) -> None:
    source = log(tmp_path)
    assert source.path is not None
    source.path.write_text('{"timestamp":1700000000000,"clicked":0,"u":"a","price":"dear"}\n')
    with pytest.raises(DataSetError, match="price"), HistoryReader(Source("jsonl", SCHEMA, 10, path=source.path)):
        pass


def test_records_are_the_same_one_by_one_and_all_at_once() -> None:
    records = Records("log", 100, ["a", "b", "é", "d"], np.array([5, 6, 7, 8]))
    assert (
        list(records[1:3])
        == [records[1], records[2]]
        == [("log", 101, 6, b"b", 0, None, ()), ("log", 102, 7, "é".encode(), 0, None, ())]
    )
    assert len(records) == len(list(records)) == 4
    with pytest.raises(IndexError):
        records[4]


def test_a_reading_process_that_ends_too_early_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with (
        pytest.raises(DataSetError, match=r"jsonl: expected the process that reads it to go on, .* ended with exit code 1"),
        HistoryReader(log(tmp_path)),
    ):
        pass


def test_nothing_to_learn_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataSetError, match="expected at least one impression"):
        run_of(log(tmp_path, until_ms=5), tmp_path).learn()
