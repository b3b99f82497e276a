"""What lies beside the model travels with the versions; what isn't there or can't be read leaves a part as it began."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest
import torch

from model.errors import ModelError
from model.learner import Learner
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.trainer.batching import BatchCutter
from stream.trainer.bookkeeping import bookkeeping_in, from_json, to_json
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import ExampleDecoder
from stream.trainer.start import go_on
from stream.trainer.training import Training
from tests.stream.trainer.factory import MODEL, SCHEMA, metrics, record, run
from tests.stream.trainer.fakes import whole
from tests.stream.trainer.test_start import announced, write


@dataclass
class Block:
    clicks: int
    loss: float


class Gate:
    """A part with figures and a tensor."""

    def __init__(self):
        self.blocks, self.tensor = [], torch.zeros(2)

    def state(self):
        return {"blocks": to_json(self.blocks), "anchor": self.tensor.clone()}

    def restore(self, state):
        blocks = from_json(state.get("blocks"), list[Block])
        self.blocks, self.tensor = blocks, state["anchor"]


def training(learner, gate):
    return Training(
        learner,
        BatchCutter(32, {0: 0}),
        Evaluation(100),
        metrics(),
        max_batch_age_s=0,
        bookkeeping={"gate": gate} if gate else None,
    )


def trained(gate):
    one = training(Learner(SCHEMA, MODEL, device="cpu"), gate)
    one.add(ExampleDecoder(SCHEMA).decode(run([record(offset) for offset in range(200)])))
    while one.step(0.0):
        pass
    return one


def restarted(tmp_path, captured, gate):
    store = SnapshotStore(SnapshotSettings(url=str(tmp_path)))
    manifest = write(store, 1)  # for its fields; the tensors follow
    captured.write(store, msgspec.structs.replace(manifest, version=2, examples_seen=200))
    learner = Learner(SCHEMA, MODEL, device="cpu")
    start = go_on(learner, announced(store.manifest(2)), store, SCHEMA, MODEL)
    two = training(learner, gate)
    two.restore(start.bookkeeping)
    return two


def test_parts_and_metrics_go_on_after_a_restart(tmp_path):
    gate = Gate()
    gate.blocks, gate.tensor = [Block(200, 0.25)], torch.tensor([1.5, 2])
    one = trained(gate)
    captured = whole(one.capture_version())
    gate.blocks.append(Block(9, 9.0))
    gate.tensor[0] = 7  # what was captured is a copy
    other = Gate()
    two = restarted(tmp_path, captured, other)
    assert other.blocks == [Block(200, 0.25)]
    assert other.tensor.tolist() == [1.5, 2]
    report, before = two.capture_version().evaluation.report(), captured.captured.evaluation.report()
    assert report["progressive", "window"] == before["progressive", "window"]
    assert report["progressive", "total"] == before["progressive", "total"]
    assert report["progressive", "total"].examples == 200


def test_a_version_without_them_leaves_parts_as_they_began(tmp_path):
    captured = whole(trained(None).capture_version())
    for name in bookkeeping_in(captured.small):
        del captured.small[name]
    gate = Gate()
    two = restarted(tmp_path, captured, gate)
    assert gate.blocks == []
    assert two.capture_version().evaluation.report()["progressive", "total"].examples == 0


def test_a_part_that_cannot_read_its_state_begins_anew_and_the_others_go_on(tmp_path, caplog):
    captured = whole(trained(None).capture_version())
    captured.small["kept.gate.blocks"] = to_json([{"clicks": "many"}])
    gate = Gate()
    two = restarted(tmp_path, captured, gate)
    assert gate.blocks == []
    assert two.capture_version().evaluation.report()["progressive", "total"].examples == 200
    assert "the version's state of 'gate' can't be used, it begins from nothing" in caplog.text


@pytest.mark.parametrize("tensor", [None, torch.zeros(3), to_json({"a": 1})])
def test_json_that_is_not_there_or_not_that_is_one_kind_of_error(tensor):
    with pytest.raises(ModelError, match=r"saved state: expected JSON of list\[int\], found"):
        from_json(tensor, list[int])
    assert from_json(to_json([1, 2]), list[int]) == [1, 2]
