"""A stream that changes abruptly: deltas are withheld, say why, and flow again by themselves, in time, or by an operator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.errors import ModelError
from model.features import FeatureDecoder
from model.hashing import missing_key
from model.learner import Learner
from model.schema import FeatureSchema, FieldSpec
from state.drift import BLOCK_EXAMPLES
from state.gate import GateState
from state.settings import SnapshotSettings
from stream.trainer.batching import BatchCutter
from stream.trainer.captured import CapturedDelta
from stream.trainer.drift import Drift
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import DecodedRun
from stream.trainer.judge import Anchor, Judge
from stream.trainer.sanity import Sanity
from stream.trainer.score_shift import HELD, ScoreShift
from stream.trainer.training import Training
from tests.stream.trainer.factory import FIRST_MS, MODEL, SCHEMA, columns, metrics

SETTINGS = SnapshotSettings(gate_block_clicks=10**9)
RUN = 250
MINUTE_MS = 60_000


class Constant:
    def predict(self, batch):
        return np.full(len(batch), 0.1, np.float32)


class Scene:
    """A trainer whose deltas are captured after every 250 examples, a second of event time apart."""

    def __init__(self) -> None:
        self.learner = Learner(SCHEMA, MODEL.model_copy(update={"batch_rows": RUN}), device="cpu")
        self.judge = Judge(SETTINGS, GateState(line=1, anchor=5))
        self.judge.compare_with(Anchor(5, Constant()))
        self.drift = Drift(SCHEMA, SETTINGS)
        self.metrics = metrics()
        self.training = Training(
            self.learner,
            BatchCutter(RUN, {0: 0}),
            Evaluation(100),
            self.metrics,
            max_batch_age_s=0.0,
            judge=self.judge,
            sanity=Sanity(self.judge, None, SETTINGS, drift=self.drift),
        )
        self.at, self.shown_ms = 0, FIRST_MS

    def examples(self, nulls: float, clicks: float) -> DecodedRun:
        random = np.random.default_rng(self.at)
        run = columns(range(self.at, self.at + RUN))
        keys = np.stack([run.offsets % 40, 1_000 + run.offsets % 7], 1)
        keys[random.random(RUN) < nulls, 0] = missing_key("user")
        shown_ms = np.full(RUN, self.shown_ms)
        labels = (random.random(RUN) < clicks).astype(np.float32)
        return replace(run, batch=replace(run.batch, keys=keys), labels=labels, impression_ms=shown_ms, reached_ms=shown_ms)

    def learn(self, blocks: float, *, nulls: float = 0.02, clicks: float = 0.1, ms: int = 1_000) -> list[CapturedDelta | None]:
        found = []
        for _ in range(int(blocks * BLOCK_EXAMPLES / RUN)):
            self.training.add(self.examples(nulls, clicks))
            while self.training.step(0.0):
                pass
            self.at += RUN
            self.shown_ms += ms
            found.append(self.training.capture_delta())
        return found


@pytest.fixture
def scene() -> Scene:
    found = Scene()
    assert all(found.learn(40))
    return found


def test_a_feature_that_loses_its_values_is_withheld_until_it_is_back(scene: Scene) -> None:
    scene.learn(1, nulls=0.5)
    assert scene.learn(2, nulls=0.5) == [None] * 8
    report = scene.judge.report()
    assert report.flow == "withheld"
    assert report.reason.startswith("features without a value more or less often than usual: user (")
    assert scene.metrics.null_rate_change._value.get() > 0.3
    assert scene.learn(2)[-1] is not None
    assert scene.judge.report().flow == "flowing"
    assert all(scene.learn(3))


def test_what_stays_is_normal_after_the_age_of_an_anchor(scene: Scene) -> None:
    scene.learn(2, nulls=0.5)
    assert scene.learn(1, nulls=0.5) == [None] * 4
    found = scene.learn(4, nulls=0.5, ms=MINUTE_MS)
    assert found[0] is None and found[-1] is not None
    assert scene.judge.report().flow == "flowing"
    assert all(scene.learn(25, nulls=0.5))


def test_an_operator_releases_it_at_once(scene: Scene) -> None:
    scene.learn(2, nulls=0.5)
    touched = set(scene.learner.touched_keys().tolist())
    scene.training.release("operation", "me", "a producer was changed")
    captured = scene.training.capture_delta()
    assert captured is not None and touched <= set(captured.delta.rows.keys.tolist()), "it has all that has changed"
    assert all(scene.learn(2, nulls=0.5))


def test_a_new_model_is_not_withheld_for_it(scene: Scene) -> None:
    scene.judge.compare_with(None)
    assert all(scene.learn(3, nulls=0.5))


def test_clicks_that_double_are_an_alarm_only(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    assert all(scene.learn(4, clicks=0.2))
    assert scene.metrics.click_rate_alarm._value.get() == 1
    assert "Nothing is withheld for that" in caplog.text


class Moving:
    """A model that gives everything the same score, and moves."""

    examples_seen = 0
    logit = -2.0

    def predict(self, batch):
        return np.full(len(batch), 1 / (1 + np.exp(-self.logit)), np.float32)


def test_what_clicks_explain_is_no_jump_of_the_scores(scene: Scene) -> None:
    model = Moving()
    shift = ScoreShift(model)
    cutter = BatchCutter(1, {0: 0})
    cutter.add(scene.examples(0.0, 0.1))
    for _ in range(HELD):
        shift.observe(cutter.cut(), np.zeros(1, np.float32))
    shift.served()
    model.logit += 0.9
    assert shift.measure() == pytest.approx(0.9, abs=1e-4)
    assert shift.measure(0.0, 0.7) == pytest.approx(0.2, abs=1e-4)
    assert shift.measure(-0.5, 0.0) == pytest.approx(0.9, abs=1e-4)
    # Clicks that double explain some 0.7 logits, give or take; clicks as usual explain nothing.
    assert scene.drift.explained == (0.0, 0.0)
    scene.learn(4, clicks=0.2)
    low, high = scene.drift.explained
    assert scene.drift.alarm and low == 0.0 and 0.5 < high < 1.2
    scene.training._sanity.shift = shift
    scene.learn(0.25, clicks=0.2)
    assert shift.last == pytest.approx(0.9 - min(0.9, high), abs=1e-4)
    scene.learn(2, clicks=0.0)
    assert scene.drift.problem and scene.drift.explained == (0.0, 0.0)


def test_clicks_that_are_lost_are_withheld(scene: Scene) -> None:
    scene.learn(1, clicks=0.0)
    assert scene.learn(1, clicks=0.0) == [None] * 4
    assert "a change beyond a factor of 4" in scene.judge.report().reason


def test_corrections_count_as_clicks_and_not_as_impressions() -> None:
    """With a hold of 0 every click is a correction: the click rate is the same."""
    drift = Drift(SCHEMA, SETTINGS)
    run = columns(range(RUN))
    cutter = BatchCutter(RUN, {0: 0})
    cutter.add(replace(run, labels=np.ones(RUN, np.float32), corrects=np.arange(RUN) % 2 == 1))
    drift.observe(cutter.cut(), np.full(RUN, 0.1, np.float32))
    drift.state()
    block = drift.watch.state.open
    assert (block.examples, block.weight, block.clicks) == (125, 125, 250)
    cutter.add(replace(columns(range(RUN, 2 * RUN)), labels=np.zeros(RUN, np.float32), corrects=np.ones(RUN, np.bool_)))
    drift.observe(cutter.cut(), np.full(RUN, 0.1, np.float32))
    drift.state()
    assert (drift.watch.state.open.examples, drift.watch.state.open.clicks) == (125, 0)


def test_an_empty_list_has_no_value() -> None:
    fields = (FieldSpec(name="tags", kind="list"), FieldSpec(name="user"), FieldSpec(name="more", kind="list"))
    schema = FeatureSchema(fields=fields)
    features = [
        b'{"tags":["a"],"user":"u","more":[]}',
        b'{"tags":[],"user":null,"more":["a","b"]}',
        b'{"user":"u"}',
        b'{"tags":null,"more":["c"]}',
    ]
    batch = FeatureDecoder(schema).impressions([b'{"features":%b}' % each for each in features]).batch
    # Single-valued fields come first.
    assert Drift(schema, SETTINGS)._nulls(batch).tolist() == [[0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 0]]


def test_a_restart_between_two_versions_changes_nothing(scene: Scene) -> None:
    scene.learn(1.25, nulls=0.5)
    saved = scene.drift.state()
    other = Drift(SCHEMA, SETTINGS)
    other.restore(saved)
    scene.training._observers = (scene.judge, scene.drift, other)
    scene.learn(2.5)
    for name, tensor in scene.drift.state().items():
        assert torch.equal(tensor, other.state()[name]), name
    with pytest.raises(ModelError, match="expected those of this schema's fields"):
        Drift(FeatureSchema(fields=(FieldSpec(name="user"),)), SETTINGS).restore(saved)
