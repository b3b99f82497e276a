"""The figures of `bench/real_time.py` judge predictions by the truth."""

from __future__ import annotations

import numpy as np
import pytest

from bench.real_time_figures import Served, figures, ideal_in_band, stretches, within_window
from deploy.evaluate.stream import Stream, simulated
from deploy.feeding.simulation import Simulation
from model.settings import ModelSettings

MODEL = ModelSettings(hidden=(8,), initial_rows=1024, batch_rows=128, row_history=False, cross_layers=0)
SHORT = Simulation(count=20_000, rate=150, ctr=0.1, delay="lognormal", delay_ms=10_000, new_items=0.5, hour_ms=60_000)


@pytest.fixture(scope="module")
def stream() -> Stream:
    return simulated(SHORT)


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
