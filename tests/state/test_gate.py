"""The gate's arithmetic and its two states."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from state.gate import Gate, GateState
from state.gate_blocks import compare, sample
from state.gate_report import judge_version
from state.settings import SnapshotSettings
from tests.judged import judged

SETTINGS = SnapshotSettings()
RNG = np.random.default_rng(0)


def fill(gate: Gate, clicks: int, others: int, *, shift: float = 0.0, noise: float = 0.0, logit: float = -3.0) -> None:
    """Compare examples of one click rate; the live logits are `shift` above the anchor's, with `noise`."""
    labels = np.repeat([1.0, 0.0], [clicks, others])
    anchor = np.full(len(labels), logit)
    live = anchor + shift + RNG.normal(0, noise, len(labels))
    gate.count(labels, None, np.ones(len(labels)))
    gate.pair(labels, np.ones(len(labels)), live, anchor)


def block(gate: Gate, **how: float) -> None:
    fill(gate, 200, 3_800, **how)
    assert gate.block_is_full
    gate.close_block(1_000)


def test_a_comparison_of_everything_is_the_mean_difference_of_log_loss() -> None:
    labels = (RNG.random(5_000) < 0.1).astype(float)
    live, anchor = RNG.normal(-2, 1, 5_000), RNG.normal(-2, 1, 5_000)
    gate = Gate(SETTINGS, GateState())
    gate.count(labels, None, np.ones(5_000))
    gate.pair(labels, np.ones(5_000), live, anchor)
    loss = np.logaddexp(0, live) - labels * live
    anchors_loss = np.logaddexp(0, anchor) - labels * anchor
    found = compare([gate.state.open])
    assert found.loss == pytest.approx(anchors_loss.mean())
    assert found.change == pytest.approx((loss - anchors_loss).mean() / anchors_loss.mean())
    assert found.error >= 0.99 * (loss - anchors_loss).std() / math.sqrt(5_000) / anchors_loss.mean()


def test_the_standard_error_is_that_of_repeated_samples() -> None:
    """Over 400 noisy blocks, of which a tenth is compared, the changes vary by the standard error that each block reports."""
    changes, errors = [], []
    for _ in range(400):
        gate = Gate(SETTINGS, GateState())
        labels = (RNG.random(4_000) < 0.05).astype(float)
        anchor = RNG.normal(-3, 0.5, 4_000)
        live = anchor + 0.3 + RNG.normal(0, 0.3, 4_000)
        rows, weights = sample(RNG.random(4_000), labels, None, one_in=10, click_share=0.5)
        gate.count(labels, None, np.ones(4_000))
        gate.pair(labels[rows], weights, live[rows], anchor[rows])
        found = compare([gate.state.open])
        changes.append(found.change)
        errors.append(found.error)
    assert 0.9 < np.mean(errors) / np.std(changes) < 1.25


def test_a_model_that_is_as_good_flows_and_one_that_is_worse_is_withheld_and_released() -> None:
    gate = Gate(SETTINGS, GateState(anchor=7))
    for _ in range(20):
        block(gate, noise=0.1)
        assert gate.state.flow == "flowing"
    block(gate, shift=0.7)
    assert gate.state.flow == "withheld"
    assert gate.state.since_ms == 1_000
    assert "against version 7's" in gate.state.reason and "over 200 clicks (allowed +1.0 %)" in gate.state.reason
    block(gate, shift=0.7)
    assert gate.state.flow == "withheld"
    block(gate, noise=0.01)
    assert gate.state.flow == "flowing"
    assert gate.state.reason.startswith("released: log loss")


def test_a_better_model_flows() -> None:
    gate = Gate(SETTINGS, GateState(anchor=7))
    for _ in range(5):
        fill(gate, 200, 3_800, shift=0.7, logit=-3.7)  # the anchor predicts the click rate from before it doubled
        gate.close_block(1)
        assert gate.state.flow == "flowing"


def test_an_unclear_difference_is_no_reason_to_withhold() -> None:
    gate = Gate(SETTINGS, GateState(anchor=7))
    block(gate, shift=0.15)
    assert 0.0 < compare(gate.state.blocks).change < 0.01 + 4 * compare(gate.state.blocks).error
    assert gate.state.flow == "flowing"


def test_small_faults_show_over_several_blocks() -> None:
    gate = Gate(SETTINGS, GateState(anchor=7))
    blocks = 0
    while gate.state.flow == "flowing":
        fill(gate, 200, 3_800, shift=0.45, noise=0.3)
        gate.close_block(1)
        blocks += 1
        assert blocks < 10
    assert blocks > 1


def test_a_correction_takes_the_first_label_back() -> None:
    """If late clicks are first counted as non-clicks and corrected later, a block's sums are those of the settled labels."""
    labels = np.repeat([1.0, 0.0], [250, 4_000])
    late = np.arange(len(labels)) < 100
    live, anchor, ones = RNG.normal(-3, 1, len(labels)), RNG.normal(-3, 1, len(labels)), np.ones(len(labels))
    settled, corrected = Gate(SETTINGS, GateState()), Gate(SETTINGS, GateState())
    settled.count(labels, None, ones)
    settled.pair(labels, ones, live, anchor)
    first = np.where(late, 0.0, labels)
    corrected.count(first, None, ones)
    corrected.pair(first, ones, live, anchor)
    corrected.count(np.ones(100), np.ones(100, bool), np.ones(100))
    corrected.pair(np.zeros(100), np.ones(100), live[late], anchor[late], taken_back=True)
    corrected.pair(np.ones(100), np.ones(100), live[late], anchor[late])
    for name in ("clicked", "passed_over"):
        found, expected = (msgspec.to_builtins(getattr(gate.state.open, name)) for gate in (corrected, settled))
        assert found == pytest.approx(expected)
    assert (
        (corrected.state.clicks, corrected.state.negatives) == (settled.state.clicks, settled.state.negatives) == (250, 4_000)
    )
    assert corrected.state.open.clicks == 250


def test_a_click_taken_back_counts_as_a_non_click() -> None:
    gate = Gate(SETTINGS, GateState())
    gate.count(np.array([1.0, 1.0, 0.0]), None, np.ones(3))
    gate.count(np.array([0.0]), np.array([True]), np.ones(1))
    assert (gate.state.clicks, gate.state.negatives) == (1, 2)


def test_left_out_negatives_count_for_those_that_were_not_sent() -> None:
    """At a rate of 0.1, non-clicks of weight 10 give the same comparison as all non-clicks."""
    live, anchor = RNG.normal(-3, 0.5, 44_000), RNG.normal(-3, 0.5, 44_000)
    labels = np.repeat([1.0, 0.0], [4_000, 40_000])
    kept = (labels > 0.5) | (np.arange(44_000) % 10 == 0)
    whole, thinned = Gate(SETTINGS, GateState()), Gate(SETTINGS, GateState())
    for gate, rows, weights in ((whole, labels > -1, np.ones(44_000)), (thinned, kept, np.where(labels > 0.5, 1.0, 10.0))):
        gate.count(labels[rows], None, weights[rows])
        gate.pair(labels[rows], weights[rows], live[rows], anchor[rows])
    all_, some = compare([whole.state.open]), compare([thinned.state.open])
    assert some.loss == pytest.approx(all_.loss, rel=0.02)
    assert abs(some.change - all_.change) < 3 * some.error
    assert some.error > all_.error  # fewer examples were compared


def test_clicks_are_sampled_more_often_where_they_are_few() -> None:
    hashes = (np.arange(16_000) + 0.5) / 16_000
    labels = (np.arange(16_000) % 20 == 0).astype(float)
    rows, weights = sample(hashes, labels, None, one_in=16, click_share=0.05)
    assert labels[rows].sum() == 800  # every click
    assert (1 - labels[rows]).sum() == 950  # one non-click in 16
    assert set(weights[labels[rows] > 0.5]) == {1 / 16}
    half = np.arange(16_000) % 2 == 0
    rows, _ = sample(hashes, half.astype(float), None, one_in=16, click_share=0.5)
    assert len(rows) == pytest.approx(16_000 * 2 / 16, rel=0.01)  # never more than two in 16 of all
    rows, weights = sample(hashes, labels, labels > 0.5, one_in=16, click_share=0.05)
    assert labels[rows].sum() == 50 and set(weights) == {1.0}  # corrections: those whose impression was compared


def test_a_new_line_is_withheld_until_it_held_its_own_over_enough_clicks() -> None:
    gate = Gate(SETTINGS, GateState(line=2))
    gate.oppose(1, 500)
    assert gate.state.flow == "withheld"
    assert gate.state.reason == "a new line, not shown to predict as well as the champion over 2000 clicks yet"
    gate.anchored(9)
    for _ in range(12):
        block(gate, shift=1.0)  # the new line is still learning
        assert gate.state.flow == "withheld"
    assert gate.state.reason.startswith(
        "a new line, not shown to predict as well as the champion over 2000 clicks yet; now log loss +"
    )
    for blocks in range(10):
        gate.oppose(1, 700)  # called each time that the registry is read
        assert gate.state.flow == "withheld" or blocks > 5  # one good block isn't enough
        block(gate, noise=0.01)
    assert gate.state.flow == "flowing"
    assert gate.report().passed == (1,)


def test_a_new_line_is_released_however_many_blocks_the_settings_ask_for() -> None:
    """Fewer blocks were kept than the stretch had, so a new line stayed withheld for ever."""
    gate = Gate(SETTINGS.model_copy(update={"anchor_clicks": 30 * SETTINGS.gate_block_clicks}), GateState(line=2))
    gate.oppose(1, 500)
    gate.anchored(9)
    for _ in range(29):
        block(gate, noise=0.01)
        assert gate.state.flow == "withheld"
    for _ in range(3):
        block(gate, noise=0.01)
    assert gate.state.flow == "flowing"


def test_a_line_that_is_champion_by_hand_is_no_longer_held_against_another() -> None:
    gate = Gate(SETTINGS, GateState(line=2))
    gate.oppose(1, 500)
    gate.unopposed(600)
    assert (gate.state.flow, gate.state.reason) == ("flowing", "the champion is of this line")
    gate.unopposed(700)
    assert gate.state.since_ms == 600


def test_nothing_is_judged_without_an_anchor() -> None:
    gate = Gate(SETTINGS, GateState())
    gate.count(np.repeat([1.0, 0.0], [10_000, 90_000]), None, np.ones(100_000), comparable=False)
    assert not gate.block_is_full
    gate.pair(np.ones(30), np.ones(30), np.zeros(30), np.zeros(30))
    assert not gate.block_is_full  # clicks from before the anchor don't count


def test_the_state_survives_as_json() -> None:
    gate = Gate(SETTINGS, GateState(line=3, anchor=7))
    block(gate, noise=0.1)
    fill(gate, 70, 900)
    again = msgspec.json.decode(msgspec.json.encode(gate.state), type=GateState)
    assert again == gate.state
    for each in (gate, Gate(SETTINGS, again)):
        each.count(np.ones(150), None, np.ones(150))
        each.pair(np.ones(150), np.ones(150), np.full(150, -9.0), np.full(150, -3.0))
        each.close_block(5)
    assert again == gate.state
    assert again.flow == "withheld"


@pytest.mark.parametrize(
    ("metrics", "passed", "says"),
    [
        ({"window_examples": 9, "window_log_loss": math.nan}, False, "not finite: window_log_loss"),
        ({"window_examples": 0, "window_log_loss": math.nan}, True, "flowing"),
        ({"window_auc": math.nan, "window_ne": math.nan, "window_calibration": math.inf}, True, "flowing"),
        ({"weight_norm": math.nan}, False, "not finite: weight_norm"),
    ],
)
def test_metrics_must_be_finite_where_they_are_defined(metrics: dict[str, float], passed: bool, says: str) -> None:
    verdict = judge_version(judged(), metrics, 1_000, champion_line=1, settings=SETTINGS)
    assert verdict.passed is passed
    assert says in verdict.reason


def test_a_doubt_withholds_whatever_the_blocks_say_and_its_end_releases() -> None:
    gate = Gate(SETTINGS, GateState(line=3, anchor=7))
    block(gate, noise=0.01)
    assert gate.doubt("scores jumped", 700, 60_000)
    assert not gate.doubt("scores jumped further", 900, 90_000)
    report = gate.report()
    assert (report.flow, report.reason, report.since_ms) == ("withheld", "scores jumped further", 700)
    block(gate, noise=0.01)
    assert gate.report().flow == "withheld"
    assert gate.state.doubt is not None
    assert gate.state.doubt.watermark_ms == 60_000
    assert not judge_version(gate.report(), {}, 1_000, champion_line=3, settings=SETTINGS).passed
    assert gate.trust(1_200, "they are back")
    assert not gate.trust(1_300, "they are back")
    report = gate.report()
    assert (report.flow, report.reason, report.since_ms) == ("flowing", "released: they are back", 1_200)


def test_the_end_of_a_doubt_does_not_release_what_the_blocks_withhold() -> None:
    gate = Gate(SETTINGS, GateState(anchor=7))
    gate.doubt("scores jumped", 700, 0)
    block(gate, shift=0.7)
    gate.trust(800, "they are back")
    assert gate.report().flow == "withheld"
    assert gate.report().reason.startswith("log loss +")


def test_an_operator_vouches_for_the_difference_that_was_released_until_there_is_another_anchor() -> None:
    gate = Gate(SETTINGS, GateState(anchor=7))
    block(gate, shift=1.0, noise=0.05)
    assert gate.state.flow == "withheld"
    gate.doubt("scores jumped", 900, 0)
    gate.release("op1", "anna@host", "the campaign is real", 1_000)
    report = gate.report()
    assert (report.flow, report.reason) == ("flowing", "released by anna@host: the campaign is real")
    assert gate.state.released == "op1"
    for _ in range(9):
        block(gate, shift=1.0, noise=0.05)  # as it was when it was released
    assert gate.state.flow == "flowing"
    block(gate, shift=2.0, noise=0.05)  # worse than that
    assert gate.state.flow == "withheld"
    gate.release("op2", "anna@host", "that too", 2_000)
    gate.anchored(8)
    block(gate, shift=1.0, noise=0.05)
    assert gate.state.flow == "withheld"


def test_an_operator_releases_a_new_line() -> None:
    gate = Gate(SETTINGS, GateState(line=2))
    gate.oppose(1, 500)
    gate.release("op", "anna@host", "it is better", 600)
    assert (gate.state.flow, gate.report().passed) == ("flowing", (1,))
