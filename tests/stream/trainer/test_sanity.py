"""A delta alone: what is withheld, what ends it, and that one delta then has all that has changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.errors import ModelError
from model.learner import Learner
from model.predictor import Predictor
from model.rows import ModelDelta, Rows
from model.schema import FeatureSchema, FieldSpec
from state.gate import GateState
from state.settings import SnapshotSettings
from stream.trainer.batching import BatchCutter
from stream.trainer.bookkeeping import bookkeeping_in, restore_bookkeeping
from stream.trainer.captured import CapturedDelta
from stream.trainer.columns import ExampleColumns
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import DecodedRun
from stream.trainer.judge import Anchor, Judge
from stream.trainer.logits import logits
from stream.trainer.sanity import Sanity, delta_problems
from stream.trainer.score_shift import HELD, RENEWED_EXAMPLES, ScoreShift
from stream.trainer.training import Training
from tests.stream.trainer.factory import FIRST_MS, MODEL, SCHEMA, columns, metrics

SETTINGS = SnapshotSettings(gate_block_clicks=10**9)
MINUTE = 60_000


def examples(at: int, *, minute: float, clicks: float = 0.1, count: int = 64) -> DecodedRun:
    """Examples of the offsets from `at` on, of one event time; their labels are drawn."""
    run = columns(range(at, at + count))
    labels = (np.random.default_rng(at).random(count) < clicks).astype(np.float32)
    shown_ms = np.full(count, FIRST_MS + int(minute * MINUTE))
    keys = np.stack([run.offsets % 40, 1_000 + run.offsets % 7], 1)
    batch = run.batch.__class__(keys, run.batch.list_keys, run.batch.list_offsets, lists=0)
    changed = {"labels": labels, "impression_ms": shown_ms, "reached_ms": shown_ms, "batch": batch}
    return replace(run, **changed)


class Scene:
    """A trainer that has learned, whose deltas a predictor follows."""

    def __init__(self) -> None:
        self.learner = Learner(SCHEMA, MODEL.model_copy(update={"batch_rows": 64}), device="cpu")
        self.judge = Judge(SETTINGS, GateState(line=1, anchor=5))
        self.judge.compare_with(Anchor(5, Constant()))
        self.shift = ScoreShift(self.learner, SCHEMA)
        self.training = self._training()
        self.at, self.minute = 0, 0.0
        self.scorer: Predictor | None = None

    def _training(self) -> Training:
        return Training(
            self.learner,
            BatchCutter(64, {0: 0}),
            Evaluation(100),
            metrics(),
            max_batch_age_s=0.0,
            judge=self.judge,
            sanity=Sanity(self.judge, self.shift, SETTINGS),
        )

    def learn(self, batches: int, *, minutes: float, clicks: float = 0.1) -> None:
        for _ in range(batches):
            self.training.add(examples(self.at, minute=self.minute, clicks=clicks))
            while self.training.step(0.0):
                pass
            self.at += 64
            self.minute += minutes / batches

    def capture(self) -> CapturedDelta | None:
        captured = self.training.capture_delta()
        if captured is not None and self.scorer is not None:
            self.scorer.apply(self.scorer.prepare(captured.delta))
        return captured

    def begin(self) -> Scene:
        self.learn(400, minutes=20)
        self.capture()
        serving = self.learner.serving_state()
        self.scorer = Predictor.of(SCHEMA, MODEL, serving, device="cpu")
        for _ in range(4):
            self.learn(10, minutes=0.6)
            assert self.capture() is not None
        return self


class Constant:
    def predict(self, batch):
        return np.full(len(batch), 0.1, np.float32)


@pytest.fixture(scope="module")
def begun():
    """How a scene stands once it has begun: restoring this is faster than learning it again."""
    scene = Scene().begin()
    captured = scene.training.capture_version()
    captured.frozen.close()
    return scene, scene.learner.serving_state(), scene.learner.trainer_state(), captured.bookkeeping


@pytest.fixture
def scene(begun):
    return again(*begun)


def again(before: Scene, serving, trainer, bookkeeping) -> Scene:
    """A trainer that was started again."""
    scene = Scene()
    scene.learner.restore(serving, trainer)
    scene.training.restore(bookkeeping_in(bookkeeping))
    scene.at, scene.minute = before.at, before.minute
    scene.scorer = Predictor.of(SCHEMA, MODEL, serving, device="cpu")
    return scene


def touched_since(scene: Scene) -> set[int]:
    return set(scene.learner.touched_keys().tolist())


def test_scores_that_jump_are_withheld_and_released_by_themselves_with_one_delta(scene):
    served = scene.scorer.digest
    scene.learn(12, minutes=0.1, clicks=0.95)
    assert scene.capture() is None
    report = scene.judge.report()
    assert report.flow == "withheld"
    assert report.reason.startswith("scores of recent requests have shifted by ")
    captured = scene.training.capture_version()
    captured.frozen.close()
    assert not captured.on_chain
    assert captured.verdict.flow == "withheld"
    assert captured.verdict.score_shift > SETTINGS.score_shift_limit
    deltas, waited = [], 0
    while not deltas:
        assert scene.scorer.digest == served
        expected = touched_since(scene)
        scene.learn(5, minutes=0.05, clicks=0.1)
        expected |= touched_since(scene)
        deltas += [found for found in [scene.capture()] if found is not None]
        waited += 1
        assert waited < 400
    assert set(deltas[0].delta.rows.keys.tolist()) == expected
    assert scene.scorer.digest == scene.learner.digest != served
    assert scene.judge.report().reason == "released: the weights and their scores pass the checks of a delta"
    serving = scene.learner.serving_state()
    assert Predictor.of(SCHEMA, MODEL, serving, device="cpu").digest == scene.scorer.digest


def test_an_operators_release_is_one_delta_of_all_that_has_changed(scene):
    scene.learn(12, minutes=0.1, clicks=0.95)
    assert scene.capture() is None
    scene.learn(12, minutes=0.1, clicks=0.95)
    assert scene.capture() is None
    expected = touched_since(scene)
    scene.training.release("op", "anna@host", "the campaign is real")
    captured = scene.capture()
    assert captured is not None
    assert set(captured.delta.rows.keys.tolist()) == expected
    assert scene.scorer.digest == scene.learner.digest
    assert scene.judge.released == "op"
    scene.learn(1, minutes=0.01, clicks=0.95)
    assert scene.capture() is not None  # what was served before isn't compared with any more


def test_a_release_when_nothing_is_withheld_counts_as_carried_out(scene):
    scene.training.release("op", "anna@host", "in case")
    scene.learn(12, minutes=0.1, clicks=0.95)
    assert scene.capture() is None
    assert scene.judge.released == "op"


def test_a_jump_that_stays_is_let_through_after_the_age_of_the_anchor(scene):
    scene.learn(12, minutes=0.1, clicks=0.95)
    assert scene.capture() is None
    since = scene.judge.doubt
    scene.learn(20, minutes=9.8, clicks=0.95)
    assert scene.capture() is None
    assert scene.judge.doubt.since_ms == since.since_ms
    scene.learn(4, minutes=0.4, clicks=0.95)
    assert scene.capture() is not None
    assert scene.judge.report().flow == "flowing"


def test_a_trainer_that_starts_again_still_knows_what_was_served(scene, begun):
    scene.learn(12, minutes=0.1, clicks=0.95)
    captured = scene.training.capture_version()
    captured.frozen.close()
    after = again(scene, scene.learner.serving_state(), scene.learner.trainer_state(), captured.bookkeeping)
    assert after.judge.report().flow == "withheld"
    assert after.shift.measure() == pytest.approx(scene.shift.measure(), abs=1e-9)
    after.learn(1, minutes=0.01, clicks=0.1)
    assert after.capture() is None


def test_a_trainer_that_has_caught_up_compares_with_what_is_served_by_then(scene, begun):
    """What it learned again was published by the trainer before it, whatever its version says of a doubt."""
    scene.learn(12, minutes=0.1, clicks=0.95)
    captured = scene.training.capture_version()
    captured.frozen.close()
    after = again(scene, scene.learner.serving_state(), scene.learner.trainer_state(), captured.bookkeeping)
    assert after.judge.report().flow == "withheld"
    after.training.caught_up()
    assert after.judge.report().flow == "flowing"
    after.learn(1, minutes=0.01, clicks=0.95)
    assert after.capture() is not None
    after.learn(80, minutes=0.1, clicks=0.1)
    after.training.caught_up()
    after.learn(12, minutes=0.1, clicks=0.95)
    assert after.capture() is None, "a jump after that is found"


def test_without_an_anchor_a_young_model_may_jump(scene):
    scene.judge.compare_with(None)
    scene.learn(12, minutes=0.1, clicks=0.95)
    assert scene.capture() is not None
    assert scene.shift.last > SETTINGS.score_shift_limit


def test_weights_that_are_not_finite_are_withheld_until_they_are(scene):
    rows = scene.learner._rows["first_order"]
    scene.learn(1, minutes=0.01)
    number = int(scene.learner._rows.touched.listed()[0])
    before = rows[number, 0].clone()
    rows[number, 0] = torch.nan
    scene.shift.forget()
    assert scene.capture() is None
    assert scene.judge.report().reason == "weights not finite: first_order"
    scene.training.release("op", "anna@host", "let it through")
    assert scene.capture() is None
    rows[number, 0] = before
    scene.learn(1, minutes=0.01)
    assert scene.capture() is not None
    assert scene.judge.report().flow == "flowing"
    assert scene.scorer.digest == scene.learner.digest


def test_scores_that_do_not_vary_are_withheld(scene):
    flat = np.full(1_100, 0.1, np.float32)
    scene.judge.observe(observed(1_100), flat)
    scene.learn(1, minutes=0.01)
    assert scene.capture() is None
    assert scene.judge.report().reason.startswith("scores don't vary")


@pytest.mark.parametrize(("count", "problem"), [(2.0**20, None), (3e6, "too large: history"), (np.nan, "not finite: history")])
def test_counts_may_be_larger_than_weights(count, problem):
    rows = Rows(torch.tensor([7]), torch.ones(1, 2), torch.ones(1), torch.tensor([[count, 1.0]]))
    found = delta_problems(ModelDelta(rows, torch.empty(0, dtype=torch.int64), {"history.base": torch.tensor([2.0**20, 9])}, 0))
    assert len(found) == (problem is not None)
    assert not found or problem in found[0]


def observed(count: int) -> ExampleColumns:
    return examples(0, minute=0.0, count=count).slice(0, count)


class Shifted:
    """A model whose logits are all moved by `by`."""

    examples_seen = 10**9

    def __init__(self) -> None:
        self.by, self.asked = 0.0, []

    def predict(self, batch):
        self.asked.append(len(batch))
        base = (batch.keys[:, 0] % 5) / 5 - 3
        return (1 / (1 + np.exp(-(base + self.by)))).astype(np.float32)


def test_the_shift_is_since_the_older_and_the_newer_set():
    model = Shifted()
    shift = ScoreShift(model)
    assert shift.measure() is None
    for _ in range(HELD):
        shift.observe(observed(10), np.empty(0, np.float32))
    shift.served()
    model.by = 0.1
    assert shift.measure() == pytest.approx(0.1, abs=1e-5)
    model.examples_seen += RENEWED_EXAMPLES - 1
    shift.served()  # too early for a new set
    model.by = 0.3
    assert shift.measure() == pytest.approx(0.3, abs=1e-5)
    model.examples_seen += 1
    shift.served()
    assert shift.measure() == pytest.approx(0.3, abs=1e-5)
    model.examples_seen += RENEWED_EXAMPLES
    shift.served()  # the first set is gone
    assert shift.measure() == pytest.approx(0.0, abs=1e-5)
    assert max(model.asked) == 2 * HELD
    model.by = np.nan
    assert shift.measure() == np.inf


def test_damaged_saved_requests_are_refused():
    shift = ScoreShift(Shifted())
    for _ in range(HELD):
        shift.observe(observed(10), np.empty(0, np.float32))
    shift.served()
    state = dict(shift.state())
    for changed in ({"0.keys": state["0.keys"][:3], "0.logits": state["0.logits"]}, {"0.at": state["0.keys"]}):
        with pytest.raises(ModelError, match="saved"):
            ScoreShift(Shifted()).restore({**state, **changed})
    state.pop("0.logits")
    with pytest.raises(ModelError, match="'logits'"):
        ScoreShift(Shifted()).restore(state)


@pytest.mark.parametrize(
    ("fields", "saves_schema"),
    [(("item", "user"), True), (("user", "item", "page"), True), (("user", "item", "page"), False)],  # older releases save none
)
def test_requests_of_another_schema_are_not_scored_again(begun, fields, saves_schema):
    """A trainer that was stopped cleanly and starts with other fields has no gap to catch up over: it publishes at once."""
    *_, bookkeeping = begun
    schema = FeatureSchema(fields=tuple(FieldSpec(name=each) for each in fields), embedding_dim=4)
    learner = Learner(schema, MODEL, device="cpu")
    saved = {
        name: each for name, each in bookkeeping_in(bookkeeping).items() if saves_schema or not name.endswith("shift.schema")
    }
    assert any("shift.0." in name for name in saved)
    shift = ScoreShift(learner, schema)
    restore_bookkeeping({"shift": shift}, saved)
    assert shift.measure() is None
    same = ScoreShift(Learner(SCHEMA, MODEL, device="cpu"), SCHEMA)
    restore_bookkeeping({"shift": same}, saved)
    assert same.measure() is not None


def test_logits_are_clipped():
    assert logits(np.array([0.0, 0.5, 1.0])) == pytest.approx([-16.118, 0.0, 16.118], abs=1e-3)
