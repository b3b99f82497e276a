"""The trainer's side of the gate: what is compared, with which anchor, and what travels over a restart."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest

from model.learner import Learner
from model.schema import FieldSpec
from state.gate import GateState
from state.gate_blocks import Block
from state.manifest import Manifest
from state.registry import Champion, RegistryState, VersionRange, VersionRecord
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.trainer.anchor_rule import choose_anchor
from stream.trainer.anchors import Anchors
from stream.trainer.batching import BatchCutter
from stream.trainer.bookkeeping import from_json
from stream.trainer.columns import ExampleColumns
from stream.trainer.evaluation import Evaluation
from stream.trainer.judge import GATHERED_ROWS, SPREAD_EXAMPLES, Anchor, Judge
from stream.trainer.training import Training
from tests.judged import judged
from tests.stream.trainer.factory import MODEL, SCHEMA, columns, metrics

# Every impression is compared, so that sums can be checked.
ALL = SnapshotSettings(gate_sample=1, gate_block_clicks=200)
RNG = np.random.default_rng(1)


def batch(labels, ids=None, *, corrects=None, served=None, rates=None) -> ExampleColumns:
    rows = len(labels)
    hashed = np.arange(rows) if ids is None else np.asarray(ids)
    return ExampleColumns(
        batch=columns(range(rows)).batch,
        labels=np.asarray(labels, np.float32),
        weights=None,
        impression_ms=np.zeros(rows, np.int64),
        reached_ms=np.zeros(rows, np.int64),
        records=(),
        served=np.full(rows, np.nan, np.float32) if served is None else np.asarray(served, np.float32),
        versions=np.full(rows, -1),
        deltas=np.full(rows, -1),
        id_hashes=hashed.astype(np.int64) * 7_919 + 12_345,
        rates=rates,
        corrects=corrects,
    )


class Constant:
    """An anchor that says the same of everything, and counts what it is asked."""

    def __init__(self, score: float) -> None:
        self.score, self.asked = score, []

    def predict(self, batch):
        self.asked.append(len(batch))
        return np.full(len(batch), self.score, np.float32)


def opened(judge: Judge) -> Block:
    """The block that is filled now, with everything that is gathered."""
    return from_json(judge.state()["state"], GateState).open


def labels_of(rows: int, share: float = 0.1):
    return (RNG.random(rows) < share).astype(np.float32)


def test_the_anchor_scores_the_sample_of_several_batches_at_once():
    judge, anchor = Judge(SnapshotSettings(gate_block_clicks=10**9), GateState()), Constant(0.05)
    judge.compare_with(Anchor(3, anchor))
    for index in range(600):
        judge.observe(batch(labels_of(128, 0.02), np.arange(128) + 128 * index), np.full(128, 0.05, np.float32))
    assert anchor.asked
    assert min(anchor.asked[:-1]) >= GATHERED_ROWS
    judge.state()
    # One impression in 32, and every click among the others: 600 × 128 × (1/32 + 0.02 × 31/32) is 3,888.
    assert sum(anchor.asked) == pytest.approx(3_888, rel=0.1)


def test_live_weights_that_are_worse_are_withheld():
    judge = Judge(ALL, GateState())
    judge.compare_with(Anchor(3, Constant(0.1)))
    for index in range(40):
        judge.observe(batch(labels_of(256), np.arange(256) + 256 * index), np.full(256, 0.3, np.float32))
    assert judge.report().flow == "withheld"
    assert "against version 3's" in judge.report().reason


def test_a_correction_is_compared_by_the_scores_of_its_first_label():
    """The live weights have learned it as a non-click since: what they say by now would count against them."""
    settled, corrected = (Judge(ALL, GateState()) for _ in range(2))
    scores = RNG.uniform(0.05, 0.2, 256).astype(np.float32)
    for judge, first in ((settled, np.ones(256)), (corrected, np.zeros(256))):
        judge.compare_with(Anchor(3, Constant(0.1)))
        judge.observe(batch(first), scores)
        judge.state()
    late = batch(np.ones(256), corrects=np.ones(256, bool))
    corrected.observe(late, scores / 2)
    one, other = (msgspec.to_builtins(opened(judge).clicked) for judge in (settled, corrected))
    # First labels that are clicks are compared more often where they are few, and count less each; here all are compared.
    assert other == pytest.approx(one, rel=1e-5)
    assert opened(corrected).passed_over.weight == pytest.approx(0)
    assert opened(corrected).passed_over.stream == 0


def test_the_features_compared_are_those_of_the_sampled_rows():
    """Over several batches at once; the anchor's score tells which row it was."""

    class ByKey:
        def predict(self, batch):
            return (batch.keys[:, 0] / 10_000).astype(np.float32)

    judge = Judge(SnapshotSettings(gate_sample=3, gate_block_clicks=10**9), GateState())
    judge.compare_with(Anchor(3, ByKey()))
    at = 1
    for _ in range(7):
        rows = np.arange(at, at + 300)
        features = columns(rows).batch
        made = dataclasses.replace(batch(labels_of(300), rows), batch=features)
        judge.observe(made, (rows / 10_000).astype(np.float32))
        at += 300
    block = opened(judge)
    assert block.passed_over.weight > 500
    assert (block.clicked.gap2, block.passed_over.gap2) == pytest.approx((0, 0), abs=1e-6)  # the same row, the same score


def test_a_correction_within_the_same_gathering_finds_its_first_label():
    judge = Judge(ALL, GateState())
    judge.compare_with(Anchor(3, Constant(0.1)))
    judge.observe(batch(np.zeros(20)), np.full(20, 0.2, np.float32))
    judge.observe(batch(np.ones(20), corrects=np.ones(20, bool)), np.full(20, 0.01, np.float32))
    block = opened(judge)
    expected = -np.log(0.2) + np.log(0.1)
    assert block.clicked.d == pytest.approx(20 * expected, rel=1e-4)
    assert block.passed_over.weight == pytest.approx(0)


def test_a_correction_that_is_not_remembered_is_compared_by_the_present_scores():
    judge = Judge(ALL, GateState())
    judge.compare_with(Anchor(3, Constant(0.1)))
    judge.observe(batch(np.ones(20), corrects=np.ones(20, bool)), np.full(20, 0.05, np.float32))
    assert opened(judge).clicked.d == pytest.approx(20 * (-np.log(0.05) + np.log(0.1)), rel=1e-4)


def test_a_click_taken_back_counts_as_one_non_click_at_any_share_of_negatives():
    judge = Judge(ALL, GateState())
    judge.compare_with(Anchor(3, Constant(0.1)))
    tenth = np.full(20, 0.1)
    judge.observe(batch(np.ones(20), rates=tenth), np.full(20, 0.2, np.float32))
    judge.observe(batch(np.zeros(20), rates=tenth, corrects=np.ones(20, bool)), np.full(20, 0.2, np.float32))
    block = opened(judge)
    assert (block.clicks, block.clicked.stream, block.passed_over.stream) == (0, 0, 20)
    assert (block.clicked.weight, block.passed_over.weight) == pytest.approx((0, 20))


def test_served_scores_stand_in_for_an_anchor_that_cannot_score_these_features():
    judge = Judge(ALL, GateState(line=2))
    judge.follow(1)
    judge.compare_with(Anchor(None, None))
    served = np.where(np.arange(256) < 200, 0.1, np.nan)
    judge.observe(batch(labels_of(256), served=served), np.full(256, 0.1, np.float32))
    block = opened(judge)
    assert block.clicked.weight + block.passed_over.weight == 200
    assert block.clicked.stream + block.passed_over.stream == 200
    assert (block.clicked.d, block.passed_over.d) == pytest.approx((0, 0), abs=1e-4)


def test_scores_that_do_not_vary_are_a_problem():
    judge = Judge(SnapshotSettings(), GateState())
    judge.observe(batch(np.ones(SPREAD_EXAMPLES - 1)), np.ones(SPREAD_EXAMPLES - 1, np.float32))
    judge.state()
    assert judge.report().problems == ()  # too few to say
    judge.observe(batch(np.ones(10)), np.ones(10, np.float32))  # saturated: 1.0 to everything
    judge.state()
    assert judge.report().problems[0].startswith("scores don't vary: the logits of the last 1000 examples differ by ")
    judge.observe(batch(np.ones(SPREAD_EXAMPLES)), RNG.uniform(0.1, 0.2, SPREAD_EXAMPLES).astype(np.float32))
    judge.state()
    assert judge.report().problems == ()
    assert judge.report().spread > 0.1


def test_what_is_frozen_goes_on_as_if_nothing_had_happened():
    def some(judge, first):
        for index in range(first, first + 30):
            rng = np.random.default_rng(index)
            labels = (rng.random(256) < 0.1).astype(np.float32)
            judge.observe(batch(labels, np.arange(256) + 256 * index), rng.uniform(0.05, 0.2, 256).astype(np.float32))

    whole = Judge(ALL, GateState(line=5))
    whole.compare_with(Anchor(3, Constant(0.1)))
    some(whole, 0)
    again = Judge(ALL, GateState(line=5))
    again.restore(whole.state())
    again.compare_with(Anchor(3, Constant(0.1)))  # found again from the store
    for judge in (whole, again):
        some(judge, 30)
    one, other = (from_json(judge.state()["state"], GateState) for judge in (whole, again))
    assert one.compared_clicks > 400
    assert other == one


def test_training_captures_the_gate_of_the_same_moment():
    judge = Judge(ALL, GateState(line=5))
    learner = Learner(SCHEMA, MODEL, device="cpu")
    training = Training(learner, BatchCutter(32, {0: 0}), Evaluation(100), metrics(), max_batch_age_s=0.0, judge=judge)
    training.add(columns(range(70)))
    while training.step(0.0, more_at_hand=True):
        pass
    captured = training.capture_version()
    clicks = sum(1 for offset in range(64) if offset % 7 < 2)
    assert captured.position.examples_seen == 64
    assert (captured.verdict.line, captured.verdict.clicks, captured.verdict.negatives) == (5, clicks, 64 - clicks)


MINUTE = 60_000


def registry(*versions: tuple[int, int, int, bool], line: int = 1, champion: int | None = None, **more) -> RegistryState:
    """Versions as (number, minute of the watermark, clicks seen, good)."""
    records = {
        number: VersionRecord(
            version=number,
            watermark_ms=minute * MINUTE,
            good_at_ms=1 if good else None,
            verdict=judged(line=line, clicks=clicks),
        )
        for number, minute, clicks, good in versions
    }
    newest = max(records) if champion is None else champion
    return RegistryState(versions=records, champion=Champion(version=newest, **more))


def choose(state, *, minute, clicks, **report):
    return choose_anchor(
        state,
        judged(**{"anchor": None, "clicks": clicks, **report}),
        watermark_ms=minute * MINUTE,
        settings=SnapshotSettings(),
    )


def test_an_anchor_is_good_and_old_by_time_and_by_clicks():
    state = registry((1, 0, 0, True), (2, 5, 3_000, True), (3, 9, 6_000, False), (4, 12, 9_000, True))
    assert choose(state, minute=9, clicks=9_000) is None
    assert choose(state, minute=10, clicks=1_999) is None
    assert choose(state, minute=10, clicks=2_000) == 1
    assert choose(state, minute=15, clicks=9_000) == 2
    assert choose(state, minute=21, clicks=20_000) == 2  # 3 isn't good, 4 isn't old enough
    assert choose(state, minute=22, clicks=20_000) == 4


def test_an_anchor_is_changed_for_one_that_is_as_much_newer_again():
    state = registry((1, 0, 0, True), (2, 9, 6_000, True), (3, 12, 9_000, True))
    assert choose(state, minute=20, clicks=20_000, anchor=1) == 1
    assert choose(state, minute=22, clicks=20_000, anchor=1) == 3
    assert choose(state, minute=22, clicks=20_000, anchor=1, flow="withheld") == 1  # 3 may be what went wrong


def test_what_was_rolled_back_is_no_anchor():
    state = registry((1, 0, 0, True), (2, 5, 3_000, True), champion=1, rolled_back=(VersionRange(1, 2),))
    assert choose(state, minute=30, clicks=20_000, anchor=2) == 1


def test_a_new_line_is_compared_with_the_champions_own():
    state = registry((1, 0, 0, True), (2, 5, 3_000, True), (3, 6, 4_000, False))
    assert choose(state, minute=6, clicks=0, line=2) == 2
    assert choose(registry((3, 6, 4_000, False)), minute=6, clicks=0, line=2) == 3
    assert choose(state, minute=30, clicks=9_000, line=2, passed=(1,)) is None  # its own points, of which there is none yet
    assert choose(RegistryState(), minute=30, clicks=9_000) is None


def write(store: SnapshotStore, version: int, schema=SCHEMA) -> None:
    learner = Learner(schema, MODEL, device="cpu")
    described = {"features": schema.model_dump(mode="json"), "model": MODEL.model_dump(mode="json")}
    manifest = Manifest(version=version, schema_hash=schema.fingerprint(), **described)
    store.write(manifest, learner.serving_state(), learner.trainer_state())


@pytest.fixture
def store(tmp_path):
    return SnapshotStore(SnapshotSettings(url=str(tmp_path / "snapshots")))


def anchors(judge, store):
    return Anchors(judge, store, SnapshotSettings(), SCHEMA, MODEL, Learner(SCHEMA, MODEL, device="cpu"), "cpu")


async def test_the_anchor_is_read_from_the_store_also_after_a_restart(store):
    write(store, 1)
    judge = Judge(SnapshotSettings(), GateState(line=1, clicks=5_000.0, anchor=1))
    await anchors(judge, store).follow(registry((1, 0, 0, True)), 0)
    assert judge.anchor.version == 1
    assert len(judge.anchor.predictor.predict(columns(range(3)).batch)) == 3


async def test_a_new_line_over_a_champion_is_withheld_from_its_first_version_on(store):
    write(store, 1)
    judge = Judge(SnapshotSettings(), GateState(line=2))
    await anchors(judge, store).follow(registry((1, 0, 0, True)), 0)
    assert (judge.report().flow, judge.anchor.version) == ("withheld", 1)


async def test_another_store_or_another_schema_leaves_the_served_scores(store, caplog):
    write(store, 1, SCHEMA.model_copy(update={"fields": (*SCHEMA.fields, FieldSpec(name="hour"))}))
    for state in (registry((1, 0, 0, True)), registry((4, 0, 0, True))):  # another schema; not in this store
        judge = Judge(SnapshotSettings(), GateState(line=2))
        following = anchors(judge, store)
        for _ in range(3):
            await following.follow(state, 0)
        assert judge.anchor == Anchor(None, None)
        assert judge.report().flow == "withheld"
    assert "the scores that were served are compared instead" in caplog.text
