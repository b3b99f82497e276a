"""The trainer watches served scores: blocks from batches, and a rollback by itself, once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from state import decisions
from state.canary import Thresholds
from state.canary_decisions import begin_canary, end_canary
from state.served_band import FIRST_BLOCKS, BandState, Block, decision_of
from state.settings import SnapshotSettings
from state.tracks import NUMBERS, Track, numbers_of
from stream.errors import RegistryError
from stream.trainer.batching import BatchCutter
from stream.trainer.served import ServedWatch, act_on_alarm
from tests.state.registry_log import a_log
from tests.stream.trainer.factory import columns, metrics

ACT = SnapshotSettings(auto_rollback="act", served_block_clicks=20, served_blocks=2)
BAD = BandState(out=3, alarm="too high", last=Block(20, 0.9, 2.0))


def batch(rows: int, served: float, version: int = -1, delta: int = -1):
    """Two clicks in seven, all shown with one score of one version; every third without one."""
    run = columns(range(rows))
    scores = np.where(np.arange(rows) % 3 == 2, np.nan, served).astype(np.float32)
    by = {"versions": np.full(rows, version), "deltas": np.full(rows, delta)}
    cutter = BatchCutter(rows, {0: 0})
    cutter.add(dataclasses.replace(run, served=scores, **by))
    return cutter.cut()


def learn(watch: ServedWatch, served: float, version: int = -1, delta: int = -1) -> None:
    """Enough for an alarm if the scores are bad."""
    for _ in range(8):
        watch.observe(batch(70, served, version, delta), np.zeros(70, np.float32))


def test_blocks_are_full_of_clicks_with_a_score_and_a_restart_goes_on():
    watch = ServedWatch(ACT)
    live = np.zeros(70, np.float32)
    for _ in range(FIRST_BLOCKS + 5):
        watch.observe(batch(70, 2 / 7), live)
    known = watch.manifest_metrics()
    assert known["served_alarm"] == 0 and known["served_block_ne"] > 0
    for _ in range(8):
        watch.observe(batch(70, 0.9), live)
    assert watch.alarm.startswith("calibration of served scores")
    again = ServedWatch(ACT)
    again.restore(watch.state())
    assert again.alarm == watch.alarm
    log = a_log(3)
    again.follow(log.state)
    log.write(decisions.hold(log.state, log.cause()))
    again.follow(log.state)
    assert again.alarm == watch.alarm, "nobody has said that scores are as they should be"
    log.write(decisions.resume(log.state, log.cause()))
    again.follow(log.state)
    assert not again.alarm and again.manifest_metrics() == {}


def test_nothing_is_gathered_where_it_is_off():
    watch = ServedWatch(SnapshotSettings(auto_rollback="off"))
    for _ in range(100):
        watch.observe(batch(700, 0.999), np.zeros(700, np.float32))
    assert watch.manifest_metrics() == {}


class Writer:
    def __init__(self, log, *, refuses: bool = False) -> None:
        self.log, self.refuses, self.reasons = log, refuses, []

    async def rollback_by_itself(self, target, reason, *, under):
        if self.refuses:
            raise RegistryError("no")
        assert under == decision_of(self.log.state.champion)
        self.reasons.append(reason)
        return self.log.rollback(to=target)


async def act(watch, log, writer, settings=ACT, counted=None):
    return await act_on_alarm(watch, log.state, writer, None, settings, counted or metrics())


async def test_it_rolls_back_once_and_again_only_after_somebody_has_resumed():
    log = a_log(5, good=(2, 3))
    watch, writer, counted = ServedWatch(ACT), Writer(log), metrics()
    assert not await act(watch, log, writer, counted=counted)
    watch._band.state = BAD
    assert await act(watch, log, writer, counted=counted)
    assert (log.state.champion.version, log.state.champion.hold_reason) == (3, "rolled back: why")
    assert writer.reasons == ["by itself: too high"]
    for _ in range(3):
        assert not await act(watch, log, writer, counted=counted), "held"
    assert (counted.own_rollbacks._value.get(), counted.served_alarm._value.get()) == (1, 1)
    log.run("headrace snapshot resume")
    assert not await act(watch, log, writer), "judged from nothing"
    learn(watch, 0.9)
    assert await act(watch, log, writer)
    assert log.state.champion.version == 2


@pytest.mark.parametrize("decided", ["resumed between two looks", "promoted by hand"])
async def test_what_somebody_has_decided_meanwhile_is_not_undone_also_not_after_a_restart(decided):
    log = a_log(5, good=(2, 3))
    watch, writer = ServedWatch(ACT), Writer(log)
    learn(watch, 0.9)
    saved = watch.state()
    if decided == "promoted by hand":
        log.write(decisions.promote(log.state, 3, log.cause("it was the best")))
    else:
        log.write(decisions.hold(log.state, log.cause()))
        log.write(decisions.resume(log.state, log.cause("looked at it")))
    for each in (watch, ServedWatch(ACT)):
        each.restore(saved)
        assert each.alarm
        assert not await act(each, log, writer) and not each.alarm
    learn(watch, 0.9)
    assert await act(watch, log, writer), "by blocks of after that"


async def test_scores_of_versions_that_were_rolled_back_and_of_a_candidate_say_nothing():
    log = a_log(5, good=(2, 3))
    log.rollback(to=3)
    log.run("headrace snapshot resume")
    log.write(begin_canary(log.state, "canary", 2, 0.5, Thresholds(), log.cause()))
    watch = ServedWatch(ACT)
    watch.follow(log.state)
    learn(watch, 0.9, version=5, delta=3)
    learn(watch, 0.9, version=4)
    learn(watch, 0.9, version=2, delta=0)
    assert watch.manifest_metrics() == {}
    learn(watch, 0.9, version=2, delta=1)
    assert watch.alarm, "by the champion's chain, which is named by that version too"
    log.write(end_canary(log.state, "promoted", log.cause()))
    watch.follow(log.state)
    assert not watch.alarm
    learn(watch, 0.9, version=2, delta=0)
    assert watch.alarm


async def test_an_alarm_alone_moves_nobody_and_a_refusal_ends_nobody(caplog):
    log = a_log(5, good=(2,))
    watch = ServedWatch(ACT)
    watch._band.state = BAD
    assert not await act(watch, log, Writer(log), settings=SnapshotSettings())
    assert log.state.champion.version == 5
    assert not await act(watch, log, Writer(log, refuses=True))
    assert "served scores are out of band (too high), and nothing was rolled back: no" in caplog.text
    assert not await act(watch, a_log(5), Writer(log)), "no good version to go to"


@pytest.mark.parametrize(("version", "counts"), [(-1, True), (7, False), (NUMBERS, False), (NUMBERS + 7, True)])
def test_scores_of_another_tracks_versions_say_nothing(version: int, counts: bool):
    watch = ServedWatch(ACT, numbers_of(Track(name="wide", number=1)))
    learn(watch, 0.9, version)
    assert bool(watch.manifest_metrics()) == counts
