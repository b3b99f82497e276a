"""Delay-exact learning: labels leave as in the join, batches are cut as in the trainer, and the figures are right."""

from __future__ import annotations

import numpy as np
import pytest

from bench.delay_exact import Stream, at_once, cut, held, play, simulated
from bench.real_time_figures import Served, figures, ideal_in_band, stretches, within_window
from deploy.feeding.simulation import Simulation, generate, simulation_schema
from model.settings import ModelSettings

MODEL = ModelSettings(hidden=(8,), initial_rows=1024, batch_rows=128)
SHORT = Simulation(count=20_000, rate=150, ctr=0.1, delay="lognormal", delay_ms=10_000, new_items=0.5, hour_ms=60_000)


@pytest.fixture(scope="module")
def stream() -> Stream:
    return simulated(SHORT)


def test_first_labels_leave_in_impression_order_and_later_clicks_correct(stream: Stream) -> None:
    labels = held(stream, 60_000, 5_000, lateness_ms=2_000, commit_ms=100)
    firsts = ~labels.corrects
    assert (labels.rows[firsts] == np.arange(len(stream))).all()
    assert (labels.known_ms[firsts] == stream.shown_ms + 7_100).all()
    assert (np.diff(labels.known_ms) >= 0).all()
    delays_ms = np.where(stream.clicked_ms >= 0, stream.clicked_ms - stream.shown_ms, 1 << 40)
    assert (labels.labels[firsts] == (delays_ms <= 5_000)).all()
    corrected = labels.rows[labels.corrects]
    assert set(corrected.tolist()) == set(np.flatnonzero((delays_ms > 5_000) & (delays_ms <= 60_000)).tolist())
    assert (labels.labels[labels.corrects] == 1).all()
    first_at = {row: at for at, row in enumerate(labels.rows.tolist()) if firsts[at]}
    assert all(first_at[labels.rows[at]] < at for at in np.flatnonzero(labels.corrects).tolist())


def test_a_hold_as_long_as_the_window_never_corrects(stream: Stream) -> None:
    labels = held(stream, 60_000, 90_000)
    assert not labels.corrects.any()
    assert (labels.known_ms == stream.shown_ms + 60_000).all()
    assert (labels.labels == at_once(stream, 60_000).labels).all()


def test_batches_close_when_full_or_old_and_hold_everything_once(stream: Stream) -> None:
    labels = held(stream, 60_000, 5_000)
    batches = list(cut(labels, 128, 800))  # 128 impressions take 853 ms
    assert [rows.start for rows, _ in batches[1:]] == [rows.stop for rows, _ in batches[:-1]]
    assert (batches[0][0].start, batches[-1][0].stop) == (0, len(labels.rows))
    for rows, now_ms in batches:
        known = labels.known_ms[rows]
        assert known[-1] <= now_ms <= known[0] + 800 or len(known) == 1
    assert {rows.stop - rows.start for rows, _ in list(cut(labels, 128, 1 << 40))[:-1]} == {128}


def test_no_score_knows_a_label_that_was_not_out(stream: Stream) -> None:
    """If all labels after a time are flipped, scores served before it stay the same."""
    labels = held(stream, 60_000, 5_000, lateness_ms=1_000)
    cut_ms = int(stream.shown_ms[0]) + 60_000
    other = labels.labels.copy()
    other[labels.known_ms > cut_ms] = 1 - other[labels.known_ms > cut_ms]
    for every_ms in (0, 2_000):
        same, captured_ms = play(stream, labels, MODEL, serve_every_ms=every_ms)
        changed, _ = play(
            stream, type(labels)(labels.rows, other, labels.corrects, labels.known_ms), MODEL, serve_every_ms=every_ms
        )
        before = stream.shown_ms < cut_ms
        assert np.array_equal(same[before], changed[before], equal_nan=True)
        assert not np.array_equal(same[~before], changed[~before], equal_nan=True)
        scored = ~np.isnan(same)
        assert scored[-500:].all()
        assert (captured_ms[scored] <= stream.shown_ms[scored]).all()
        assert ((captured_ms >= 0) == scored).all()


def test_figures_judge_predictions_by_the_truth(stream: Stream) -> None:
    truth = (stream.probabilities * within_window(SHORT, 60_000)).astype(np.float32)
    start_ms = int(stream.shown_ms[0])

    def judged(scores: np.ndarray) -> dict[str, float]:
        served = Served(scores.astype(np.float32), np.where(np.isnan(scores), -1, stream.shown_ms - 7_000), start_ms)
        return figures(stream, SHORT, served, 60_000, MODEL, reference=False)

    right = judged(truth)
    assert (right["in_band_share"], right["new_items_in_band_share"], right["ratio_spread"]) == (1, 1, 0)
    assert right["champion_age_max_s"] == 7
    assert judged(truth * 1.2)["in_band_share"] == 0
    assert judged(truth * 1.2)["new_items_in_band_share"] == 1
    young = (stream.ages_ms >= 0) & (stream.ages_ms < 60_000)
    assert judged(np.where(young, truth * 1.5, truth))["new_items_in_band_share"] == 0
    # A stretch without scores isn't in band. If half of its impressions have scores, these decide.
    late = stream.shown_ms >= start_ms + 90_000
    assert judged(np.where(late, np.nan, truth))["in_band_share"] == 0.5
    assert judged(np.where(np.arange(len(late)) % 2, np.nan, truth))["in_band_share"] == 1


def test_stretches_are_whole_ones(stream: Stream) -> None:
    ratios = stretches(stream, (stream.probabilities * 2).astype(np.float32), stream.probabilities, int(stream.shown_ms[0]))
    assert len(ratios) == 4  # of 133 s
    assert np.allclose(ratios, 2)


def test_the_ideal_observer_is_nearly_always_right_where_hours_hardly_differ(stream: Stream) -> None:
    start_ms = int(stream.shown_ms[0])
    even = Simulation(**{name: getattr(SHORT, name) for name in SHORT.__slots__} | {"hour_effect": 0.001})
    assert ideal_in_band(simulated(even), even, start_ms) == 1
    wild = Simulation(**{name: getattr(SHORT, name) for name in SHORT.__slots__} | {"hour_effect": 1.5})
    assert ideal_in_band(simulated(wild), wild, start_ms) < 1


def test_the_simulators_features_are_all_decoded(stream: Stream) -> None:
    assert len(stream.batch) == SHORT.count == sum(len(batch.ids) for batch in generate(SHORT))
    assert stream.batch.keys.shape[1] == len(simulation_schema().fields)
