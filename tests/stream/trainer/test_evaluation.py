"""Progressive and served metrics, in a window, in total and since an event time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from model.metrics import Metrics, auc, measure
from state.gate_report import not_finite
from stream.trainer import evaluation as module
from stream.trainer.columns import ExampleColumns
from stream.trainer.evaluation import Evaluation, manifest_metrics
from tests.stream.trainer.factory import columns


def batch(labels, *, served=None, times=None, weights=None, rates=None, corrects=None):
    labels = np.asarray(labels, np.float32)
    return ExampleColumns(
        batch=columns(range(len(labels))).batch,
        labels=labels,
        weights=None if weights is None else np.asarray(weights, np.float32),
        impression_ms=np.arange(len(labels)) if times is None else np.asarray(times),
        reached_ms=np.arange(len(labels)),
        records=[None] * len(labels),
        served=np.full(len(labels), np.nan, np.float32) if served is None else np.asarray(served, np.float32),
        versions=np.full(len(labels), -1),
        deltas=np.full(len(labels), -1),
        id_hashes=np.arange(len(labels)),
        rates=None if rates is None else np.asarray(rates),
        corrects=None if corrects is None else np.asarray(corrects),
    )


@pytest.fixture
def stream():
    random = np.random.default_rng(1)
    labels = (random.random(10_000) < 0.3).astype(np.float32)
    scores = np.clip(0.3 + 0.2 * (labels - 0.3) + 0.1 * random.standard_normal(10_000), 0, 1).astype(np.float32)
    served = np.where(random.random(10_000) < 0.5, scores[::-1], np.nan).astype(np.float32)
    return scores, labels, served


def feed(counted, scores, labels, served, size=256):
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        times = np.arange(len(labels))[part]
        counted.add(scores[part], batch(labels[part], served=served[part], times=times))


def test_each_scope_measures_its_own_examples(stream):
    scores, labels, served = stream
    counted = Evaluation(1_000, evaluation_from_ms=2_000)
    feed(counted, scores, labels, served)
    report = counted.freeze().report()
    there = ~np.isnan(served)
    late = np.arange(10_000) >= 2_000
    assert report["progressive", "window"] == measure(scores[-1_000:], labels[-1_000:])
    assert report["served", "window"].examples == 1_000
    assert report["served", "window"].auc == auc(served[there][-1_000:], labels[there][-1_000:])
    assert report["progressive", "total"].examples == 10_000
    assert report["progressive", "evaluation"].examples == 8_000
    assert report["progressive", "evaluation"].auc == auc(scores[late], labels[late])
    assert report["progressive", "evaluation"].calibration == pytest.approx(scores[late].sum() / labels[late].sum(), rel=1e-5)
    assert report["served", "evaluation"].examples == (there & late).sum()
    assert report["served", "evaluation"].auc == auc(served[there & late], labels[there & late])


def test_beyond_the_exact_examples_the_auc_comes_from_bins(stream, monkeypatch):
    monkeypatch.setattr(module, "EXACT_EXAMPLES", 5_000)
    scores, labels, served = stream
    counted = Evaluation(1_000, evaluation_from_ms=0)
    feed(counted, scores, labels, served)
    evaluation = counted.freeze().report()["progressive", "evaluation"]
    assert evaluation.examples == 10_000
    assert evaluation.auc == pytest.approx(auc(scores, labels), abs=1e-3)


def test_negatives_left_out_count_as_if_they_were_there():
    random = np.random.default_rng(4)
    served = (random.random(40_000) * 0.4).astype(np.float32)
    labels = random.random(40_000) < served
    kept = labels | (random.random(40_000) < 0.2)
    whole, tenth = (Evaluation(40_000, evaluation_from_ms=0) for _ in range(2))
    whole.add(served, batch(labels, served=served))
    tenth.add(served[kept], batch(labels[kept], served=served[kept], rates=np.full(kept.sum(), 0.2)))
    expected, found = whole.freeze().report(), tenth.freeze().report()
    for place, metrics in found.items():
        assert metrics.examples == kept.sum()
        assert metrics.calibration == pytest.approx(expected[place].calibration, abs=0.02)
        assert metrics.log_loss == pytest.approx(expected[place].log_loss, abs=0.01)
        assert metrics.normalised_entropy == pytest.approx(expected[place].normalised_entropy, abs=0.01)
        assert metrics.auc == pytest.approx(expected[place].auc, abs=0.01)


def test_corrections_leave_served_metrics_as_if_labels_had_been_known(stream):
    scores, labels, served = stream
    known, late = (Evaluation(20_000, evaluation_from_ms=0) for _ in range(2))
    feed(known, scores, labels, served)
    feed(late, scores, np.zeros(len(labels)), served)
    clicked = labels > 0.5
    late.add(scores[clicked], batch(labels[clicked], served=served[clicked], corrects=np.ones(clicked.sum(), bool)))
    expected, found = known.freeze().report(), late.freeze().report()
    for scope in ("window", "total", "evaluation"):
        one, other = expected["served", scope], found["served", scope]
        assert (one.examples, one.positives) == (other.examples, other.positives)
        for name in ("log_loss", "auc", "normalised_entropy", "calibration"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-6), (scope, name)


@pytest.mark.parametrize("rate", [None, 0.25])
def test_clicks_taken_back_leave_served_metrics_as_if_they_had_been_none(stream, rate):
    scores, labels, served = stream
    known, late = (Evaluation(20_000, evaluation_from_ms=0) for _ in range(2))
    wrong = labels.copy()
    wrong[::10] = 1
    taken_back = wrong > labels
    rates = None if rate is None else np.full(len(labels), rate)
    known.add(scores, batch(labels, served=served, weights=np.where(taken_back, rate or 1, 1), rates=rates))
    late.add(scores, batch(wrong, served=served, rates=rates))
    back = None if rate is None else rates[taken_back]
    ones = np.ones(taken_back.sum(), bool)
    late.add(scores[taken_back], batch(labels[taken_back], served=served[taken_back], corrects=ones, rates=back))
    expected, found = known.freeze().report(), late.freeze().report()
    for scope in ("window", "total", "evaluation"):
        one, other = expected["served", scope], found["served", scope]
        assert (one.examples, one.positives) == (other.examples, other.positives)
        for name in ("log_loss", "auc", "normalised_entropy", "calibration"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-6), (scope, name)


def test_a_restart_goes_on_with_all_scopes(stream):
    scores, labels, served = stream
    straight, stopped, resumed = (Evaluation(3_000, evaluation_from_ms=500) for _ in range(3))
    feed(straight, scores, labels, served)
    half = 5_000
    feed(stopped, scores[:half], labels[:half], served[:half])
    resumed.restore(stopped.state())
    for start in range(half, len(labels), 256):
        part = slice(start, start + 256)
        times = np.arange(len(labels))[part]
        resumed.add(scores[part], batch(labels[part], served=served[part], times=times))
    expected, found = straight.freeze().report(), resumed.freeze().report()
    for place in expected:
        for name in Metrics.__dataclass_fields__:
            close = pytest.approx(getattr(expected[place], name), abs=1e-4 if place[1] == "evaluation" else 1e-9)
            assert getattr(found[place], name) == close, (place, name)


def test_an_evaluation_since_another_time_begins_anew(stream):
    scores, labels, served = stream
    before, after, without = Evaluation(100, evaluation_from_ms=500), Evaluation(100, evaluation_from_ms=600), Evaluation(100)
    feed(before, scores, labels, served)
    for each in (after, without):
        each.restore(before.state())
        assert each.freeze().report()["progressive", "total"].examples == 10_000
    assert after.freeze().report()["progressive", "evaluation"].examples == 0
    assert ("progressive", "evaluation") not in without.freeze().report()


def test_what_is_frozen_stays(stream):
    scores, labels, served = stream
    counted = Evaluation(1_000, evaluation_from_ms=0)
    feed(counted, scores[:3_000], labels[:3_000], served[:3_000])
    frozen = counted.freeze()
    before = frozen.report()
    feed(counted, scores[3_000:], labels[3_000:], served[3_000:])
    assert frozen.report() == before
    assert before["progressive", "evaluation"].examples == 3_000


def test_manifest_names_are_those_the_gate_reads(stream):
    scores, labels, served = stream
    counted = Evaluation(5_000)
    feed(counted, scores, labels, served)
    metrics = manifest_metrics(counted.freeze().report())
    assert metrics["window_examples"] == 5_000
    assert metrics["total_examples"] == 10_000
    assert {f"{kind}_{name}" for kind in ("window", "served") for name in ("log_loss", "auc", "ne", "calibration")} <= set(
        metrics
    )
    assert not_finite(metrics) == []
    assert not_finite({**metrics, "window_log_loss": math.nan}) == ["window_log_loss"]


@pytest.mark.parametrize("labels", [[], [0, 0, 0], [1, 1]], ids=["nothing", "no click", "clicks only"])
def test_a_window_that_is_not_defined_is_no_broken_model(labels):
    counted = Evaluation(100, evaluation_from_ms=0)
    if labels:
        counted.add(np.full(len(labels), 0.5, np.float32), batch(labels, weights=np.zeros(len(labels))))
    metrics = manifest_metrics(counted.freeze().report())
    assert metrics["window_examples"] == len(labels)
    assert not_finite(metrics) == []
