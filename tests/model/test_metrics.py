from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import ModelError
from model.metrics import Metrics, ProgressiveMetrics, auc, calibration, log_loss, measure, normalised_entropy

# Few distinct scores, so that ties are common.
examples = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.50001, 0.9, 1.0]), st.sampled_from([0.0, 1.0]), st.integers(0, 3)),
    min_size=1,
    max_size=40,
)


def naive_auc(rows: list[tuple[float, float, int]]) -> float:
    won = pairs = 0.0
    for p, y, w in rows:
        for q, z, v in rows:
            if y == 1 and z == 0:
                pairs += w * v
                won += w * v * (1 if p > q else 0.5 if p == q else 0)
    return won / pairs if pairs else math.nan


def naive_log_loss(rows: list[tuple[float, float, int]]) -> float:
    weight = sum(w for _, _, w in rows)
    total = 0.0
    for p, y, w in rows:
        p = min(max(p, 1e-7), 1 - 1e-7)
        total -= w * math.log(p if y else 1 - p)
    return total / weight if weight else math.nan


def same(one: float, other: float) -> bool:
    return (math.isnan(one) and math.isnan(other)) or one == pytest.approx(other, rel=1e-6, abs=1e-9)


@given(examples)
def test_against_pairs_counted_one_by_one(rows: list[tuple[float, float, int]]) -> None:
    p, y, w = map(np.array, zip(*rows, strict=True))
    assert same(auc(p, y, w), naive_auc(rows))
    assert same(log_loss(p, y, w), naive_log_loss(rows))
    metrics = measure(p, y, w)
    assert same(metrics.auc, naive_auc(rows))
    assert metrics.examples == len(rows)
    assert metrics.positives == sum(y)
    base = sum(y * w) / sum(w) if sum(w) else math.nan
    if sum(w) and 0 < base < 1:
        entropy = -(base * math.log(base) + (1 - base) * math.log(1 - base))
        assert same(normalised_entropy(p, y, w), naive_log_loss(rows) / entropy)
        assert same(calibration(p, y, w), sum(p * w) / sum(y * w))
    else:
        assert math.isnan(normalised_entropy(p, y, w))


@given(examples, st.integers(1, 50), st.integers(1, 7))
def test_the_window_is_the_last_examples(rows: list[tuple[float, float, int]], window: int, step: int) -> None:
    metrics = ProgressiveMetrics(window)
    for start in range(0, len(rows), step):
        metrics.update(*zip(*rows[start : start + step], strict=True))
    exact = measure(*zip(*rows[-window:], strict=True))
    for name in Metrics.__dataclass_fields__:
        assert same(getattr(metrics.window(), name), getattr(exact, name)), name
    total, everything = metrics.total(), measure(*zip(*rows, strict=True))
    for name in ("examples", "positives", "log_loss", "normalised_entropy", "calibration"):
        assert same(getattr(total, name), getattr(everything, name)), name


@given(examples, st.data())
def test_a_correction_takes_back_what_it_corrects(rows: list[tuple[float, float, int]], data: st.DataObject) -> None:
    """Examples that were first counted with the other label, even several times, give the same metrics in the end."""
    shown, late = [], []
    for p, y, w in rows:
        first, *turns = data.draw(st.sampled_from([[y], [1 - y, y], [y, 1 - y, y]]))
        shown.append((p, first, w, False))
        late += [(p, turn, w, True) for turn in turns]
    late = data.draw(st.permutations(late))
    metrics = ProgressiveMetrics(100)
    for row in [*shown, *late]:
        metrics.update(*([value] for value in row))
    p, y, w = zip(*rows, strict=True)
    expected = measure(p, y, w)
    assert same(auc(*zip(*shown, *late, strict=True)), expected.auc)
    for found in (metrics.window(), metrics.total()):
        for name in Metrics.__dataclass_fields__:
            if name != "auc" or found == metrics.window():
                assert same(getattr(found, name), getattr(expected, name)), name


def test_a_window_that_begins_between_a_negative_and_its_correction() -> None:
    metrics = ProgressiveMetrics(1)
    metrics.update([0.3], [0])
    metrics.update([0.4], [1], [1], [True])
    window = metrics.window()
    assert (window.examples, window.positives) == (0, 1)
    assert math.isnan(window.log_loss)
    assert math.isnan(window.auc)
    assert metrics.total().calibration == pytest.approx(0.3)


def test_a_click_taken_back_is_a_negative() -> None:
    metrics = ProgressiveMetrics(10)
    metrics.update([0.2, 0.4, 0.6], [1, 0, 1])
    metrics.update([0.6], [0], None, [True])
    for found in (metrics.window(), metrics.total()):
        assert (found.examples, found.positives, found.auc) == (3, 1, 0)
        assert found.calibration == pytest.approx(1.2)


@pytest.mark.parametrize("base", [-2, -7, -9.5], ids=["CTR 20 %", "CTR 0.2 %", "CTR 0.02 %"])
def test_the_whole_streams_auc_is_close_at_any_click_rate(base: float) -> None:
    """With 10,000 equal bins of the score, the rarest clicks' scores would fall into ten bins, and the AUC be off by 0.04."""
    rng = np.random.default_rng(1)
    odds = rng.normal(size=400_000) + base
    p = 1 / (1 + np.exp(-odds))
    y = (rng.random(len(p)) < p).astype(float)
    metrics = ProgressiveMetrics(10)
    metrics.update(p, y)
    assert metrics.total().auc == pytest.approx(auc(p, y), abs=1e-4)


@given(examples, st.integers(1, 12), st.integers(1, 12), st.data())
def test_restored_metrics_continue_from_the_saved_ones(
    rows: list[tuple[float, float, int]], window: int, other: int, data: st.DataObject
) -> None:
    corrects = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    every = [(*row, back) for row, back in zip(rows, corrects, strict=True)]
    at = data.draw(st.integers(0, len(rows)))
    straight, stopped, resumed = ProgressiveMetrics(min(window, other)), ProgressiveMetrics(window), ProgressiveMetrics(other)
    resumed.update([0.3], [1])  # examples before the restore don't matter
    for row in every:
        straight.update(*([value] for value in row))
    for row in every[:at]:
        stopped.update(*([value] for value in row))
    saved = stopped.state()
    stopped.update([0.9], [0])  # doesn't change the saved state, which is a copy
    resumed.restore(saved)
    for row in every[at:]:
        resumed.update(*([value] for value in row))
    for name in Metrics.__dataclass_fields__:
        assert same(getattr(resumed.total(), name), getattr(straight.total(), name)), name
        if other <= window:
            assert same(getattr(resumed.window(), name), getattr(straight.window(), name)), name


def test_metrics_of_another_layout_are_refused_and_nothing_changes() -> None:
    metrics = ProgressiveMetrics(5)
    metrics.update([0.3], [1])
    before = repr((metrics.total(), metrics.window()))
    for change, found in (({"bins": np.zeros((2, 10_000))}, r"shape \(2, 10000\)"), ({"label": np.zeros(3)}, r"shape \(3,\)")):
        with pytest.raises(ModelError, match=rf"saved metrics: {next(iter(change))}: expected shape .*, found {found}"):
            metrics.restore({**ProgressiveMetrics(5).state(), **change})
    with pytest.raises(ModelError, match=r"saved metrics: counts: expected shape \(2,\), found nothing"):
        metrics.restore({})
    assert repr((metrics.total(), metrics.window())) == before


def test_the_whole_streams_auc_is_close() -> None:
    rng = np.random.default_rng(1)
    y = (rng.random(50_000) < 0.2).astype(float)
    p = 1 / (1 + np.exp(-(rng.normal(size=len(y)) + y - 2)))
    metrics = ProgressiveMetrics(10)
    metrics.update(p, y)
    assert metrics.total().auc == pytest.approx(auc(p, y), abs=1e-4)


def test_undefined_is_nan() -> None:
    assert math.isnan(auc([0.5, 0.6], [1, 1]))
    assert math.isnan(normalised_entropy([0.5, 0.6], [0, 0]))
    assert math.isnan(calibration([0.5], [0]))
    empty = ProgressiveMetrics(5)
    assert empty.window().examples == empty.total().examples == 0
    assert math.isnan(empty.window().log_loss)
    assert math.isnan(empty.total().auc)


def test_perfect_and_worst_scores() -> None:
    assert auc([0.1, 0.2, 0.8], [0, 0, 1]) == 1
    assert auc([0.1, 0.2, 0.8], [1, 1, 0]) == 0
    assert math.isfinite(log_loss([0.0, 1.0], [1, 0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, math.nan], [0, 1]), "scores: expected numbers from 0 to 1, found nan in row 1"),
        (([0.5, 0.5], [0, 2]), "labels: expected numbers from 0 to 1, found 2.0 in row 1"),
        (([0.5], [0], [-1]), "weights: expected finite numbers, 0 or more, found -1.0 in row 0"),
        (([0.5], [0, 1]), r"metrics: expected scores, labels and weights of one length, found \(1,\), \(2,\), \(1,\)"),
    ],
)
def test_bad_arguments_are_rejected(arguments: tuple, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        measure(*arguments)
    with pytest.raises(ModelError, match=message):
        ProgressiveMetrics(3).update(*arguments)


def test_an_empty_window_is_rejected() -> None:
    with pytest.raises(ModelError, match="window: expected 1 example or more, found 0"):
        ProgressiveMetrics(0)
