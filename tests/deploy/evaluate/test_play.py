"""Delay-exact learning: labels leave as in the join, batches are cut as in the trainer, and no score knows a later label."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deploy.evaluate.labels import Labels, at_once, cut, held, joined
from deploy.evaluate.play import Played, Serving, play
from deploy.evaluate.stream import Stream, simulated
from deploy.feeding.simulation import Simulation, generate, simulation_schema
from model.learner import Learner
from model.settings import ModelSettings
from stream.records.example import CORRECTION
from stream.settings import JoinSettings
from tests.stream.join.oracle import Partition, run_of

MODEL = ModelSettings(hidden=(8,), initial_rows=1024, batch_rows=128, row_history=False, cross_layers=0)
SHORT = Simulation(count=6_000, rate=50, ctr=0.1, delay="lognormal", delay_ms=10_000, new_items=0.5, hour_ms=60_000)


def played(stream: Stream, labels: Labels, **how: Any) -> Played:
    return play(stream, labels, Learner(stream.schema, MODEL, device="cpu"), **how)


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
    batches = list(cut(labels, 128, 2_400))  # 128 impressions take 2,560 ms
    assert [rows.start for rows, _ in batches[1:]] == [rows.stop for rows, _ in batches[:-1]]
    assert (batches[0][0].start, batches[-1][0].stop) == (0, len(labels.rows))
    for rows, now_ms in batches:
        known = labels.known_ms[rows]
        assert known[-1] <= now_ms <= known[0] + 2_400 or len(known) == 1
    assert {rows.stop - rows.start for rows, _ in list(cut(labels, 128, None))[:-1]} == {128}


def test_no_score_knows_a_label_that_was_not_out(stream: Stream) -> None:
    """If all labels after a time are flipped, scores served before it stay the same."""
    labels = held(stream, 60_000, 5_000, lateness_ms=1_000)
    cut_ms = int(stream.shown_ms[0]) + 60_000
    other = labels.labels.copy()
    other[labels.known_ms > cut_ms] = 1 - other[labels.known_ms > cut_ms]
    ways = [Serving(), Serving(every_ms=2_000), Serving(late_ms=5_000), Serving(every_ms=2_000, late_ms=5_000)]
    ours = played(stream, labels, serving=ways)
    theirs = played(stream, Labels(labels.rows, other, labels.corrects, labels.known_ms), serving=ways)
    for way, same, changed, captured_ms in zip(ways, ours.scores, theirs.scores, ours.captured_ms, strict=True):
        before = stream.shown_ms < cut_ms + way.late_ms
        assert np.array_equal(same[before], changed[before], equal_nan=True)
        assert not np.array_equal(same[~before], changed[~before], equal_nan=True)
        scored = ~np.isnan(same)
        assert scored[-500:].all()
        assert (captured_ms[scored] <= stream.shown_ms[scored] - way.late_ms).all()
        assert (captured_ms[scored] > stream.shown_ms[scored] - way.late_ms - max(way.every_ms, 1)).all()
        assert ((captured_ms >= 0) == scored).all()


def test_the_simulators_features_are_all_decoded(stream: Stream) -> None:
    assert len(stream.batch) == SHORT.count == sum(len(batch.ids) for batch in generate(SHORT))
    assert stream.batch.keys.shape[1] == len(simulation_schema().fields)


def test_labels_are_those_of_the_join(stream: Stream) -> None:
    """The join's own logic, event by event, gives the same labels and corrections, at the same times."""
    settings = JoinSettings(hold_ms=5_000, lateness_ms=0, window_ms=30_000)
    ours, partition = joined(stream, settings), Partition(settings)
    ids = [b"%d" % row for row in range(len(stream))]
    clicked = np.flatnonzero(stream.clicked_ms >= 0)
    clicked = clicked[np.argsort(stream.clicked_ms[clicked], kind="stable")]
    theirs: list[tuple[int, int, float, bool]] = []
    shown = clicks = 0
    for now_ms in range(int(stream.shown_ms[0]) + 1_000, int(stream.shown_ms[-1]) + 120_000, 1_000):
        until = int(np.searchsorted(stream.shown_ms, now_ms))
        clicks_until = int(np.searchsorted(stream.clicked_ms[clicked], now_ms))
        new = [(ids[row], int(stream.shown_ms[row])) for row in range(shown, until)]
        new_clicks = [(ids[row], int(stream.clicked_ms[row])) for row in clicked[clicks:clicks_until].tolist()]
        runs = [("impressions", run_of(new, shown, mark=now_ms)), ("clicks", run_of(new_clicks, clicks, mark=now_ms))]
        for example in partition.step(runs).examples:
            corrects = example.kind == CORRECTION
            first_ms = example.impression_ms + settings.hold_ms
            known_ms = max(first_ms, example.click_ms) if corrects else first_ms
            theirs.append((known_ms, example.source_offset, float(example.click_ms >= 0), corrects))
        shown, clicks = until, clicks_until
    columns = (ours.known_ms, ours.rows, ours.labels, ours.corrects)
    assert ours.corrects.any()
    assert sorted(theirs) == sorted(zip(*(column.tolist() for column in columns), strict=True))


def test_every_way_to_serve_scores_as_if_it_were_alone(stream: Stream) -> None:
    labels = joined(stream, JoinSettings())
    ways = [Serving(), Serving(every_ms=10_000)]
    together = played(stream, labels, serving=ways)
    for number, way in enumerate(ways):
        alone = played(stream, labels, serving=[way])
        assert np.array_equal(alone.scores[0], together.scores[number], equal_nan=True)
        assert np.array_equal(alone.progressive, together.progressive)


def test_a_version_answers_with_the_weights_of_its_capture(stream: Stream) -> None:
    labels, every_ms = joined(stream, JoinSettings()), 20_000
    served = played(stream, labels, serving=[Serving(every_ms=every_ms)])
    version_ms = int(labels.known_ms[0]) + 3 * every_ms
    learner = Learner(stream.schema, MODEL, device="cpu")
    for rows, now_ms in cut(labels, MODEL.batch_rows, 500):
        if now_ms >= version_ms:
            break
        shown = labels.rows[rows]
        learner.learn(stream.batch.take(shown), labels.labels[rows], None, labels.corrects[rows], stream.shown_ms[shown])
    answered = np.flatnonzero(served.captured_ms[0] == version_ms)
    assert len(answered) == 50 * every_ms // 1_000
    assert np.array_equal(served.scores[0][answered], learner.predict(stream.batch.take(answered)))


@pytest.mark.parametrize(("every_ms", "late_ms"), [(10_000_000, 0), (20_000, 10_000_000), (20_000, 5_000)])
def test_no_version_answers_impressions_from_before_it(stream: Stream, every_ms: int, late_ms: int) -> None:
    """With versions that are rarer than the stream is long, nothing is answered at all."""
    labels = joined(stream, JoinSettings())
    served = played(stream, labels, serving=[Serving(every_ms=every_ms, late_ms=late_ms)])
    first_ms = int(labels.known_ms[0]) + every_ms + late_ms
    assert np.array_equal(np.isnan(served.scores[0]), stream.shown_ms < first_ms)


def test_negatives_that_the_join_leaves_out_are_not_learned() -> None:
    whole, thinned = simulated(SHORT), simulated(SHORT, negative_rate=0.25)
    every, labels = joined(whole, JoinSettings()), joined(thinned, JoinSettings(negative_rate=0.25))
    assert thinned.kept is not None
    early = every.rows[~every.corrects & (every.labels == 1)]
    assert set(labels.rows[~labels.corrects].tolist()) == {*np.flatnonzero(thinned.kept).tolist(), *early.tolist()}
    assert np.array_equal(labels.rows[labels.corrects], every.rows[every.corrects])
    sampled = played(thinned, labels, negative_rate=0.25).scores[0][-2_000:].mean()
    full = played(whole, every).scores[0][-2_000:].mean()
    assert sampled == pytest.approx(full, rel=0.25)  # scores are probabilities on the whole stream, not as sampled


@pytest.mark.parametrize("late", [0.1, 0.6])
def test_clicks_can_be_drawn_late(stream: Stream, late: float) -> None:
    drawn = stream.with_late_clicks(late, 10_000, 60_000)
    assert np.array_equal(drawn.clicked_ms >= 0, stream.clicked_ms >= 0)
    delays_ms = (drawn.clicked_ms - drawn.shown_ms)[drawn.clicked_ms >= 0]
    assert (delays_ms >= 0).all()
    assert (delays_ms <= 60_000).all()
    assert (delays_ms > 10_000).mean() == pytest.approx(late, abs=4 * np.sqrt(late * (1 - late) / len(delays_ms)))
