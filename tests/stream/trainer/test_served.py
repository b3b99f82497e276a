"""The trainer watches served scores: blocks from batches, and a rollback by itself, once."""

from __future__ import annotations

import dataclasses

import numpy as np

from state.served_band import FIRST_BLOCKS, BandState, Block
from state.settings import SnapshotSettings
from stream.errors import RegistryError
from stream.trainer.batching import BatchCutter
from stream.trainer.served import ServedWatch, act_on_alarm
from tests.state.registry_log import a_log
from tests.stream.trainer.factory import columns, metrics

ACT = SnapshotSettings(auto_rollback="act", served_block_clicks=20, served_blocks=2)
BAD = BandState(out=3, alarm="too high", last=Block(20, 0.9, 2.0))


def batch(rows: int, served: float):
    """Two clicks in seven, all shown with one score; every third without one."""
    run = columns(range(rows))
    scores = np.where(np.arange(rows) % 3 == 2, np.nan, served).astype(np.float32)
    cutter = BatchCutter(rows, {0: 0})
    cutter.add(dataclasses.replace(run, served=scores))
    return cutter.cut()


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
    again.begin_again()
    assert not again.alarm and again.manifest_metrics() == {}


def test_nothing_is_gathered_where_it_is_off():
    watch = ServedWatch(SnapshotSettings(auto_rollback="off"))
    for _ in range(100):
        watch.observe(batch(700, 0.999), np.zeros(700, np.float32))
    assert watch.manifest_metrics() == {}


class Writer:
    def __init__(self, log, *, refuses: bool = False) -> None:
        self.log, self.refuses, self.reasons = log, refuses, []

    async def rollback_by_itself(self, target, reason):
        if self.refuses:
            raise RegistryError("no")
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
    assert await act(watch, log, writer)
    assert log.state.champion.version == 2


async def test_an_alarm_alone_moves_nobody_and_a_refusal_ends_nobody(caplog):
    log = a_log(5, good=(2,))
    watch = ServedWatch(ACT)
    watch._band.state = BAD
    assert not await act(watch, log, Writer(log), settings=SnapshotSettings())
    assert log.state.champion.version == 5
    assert not await act(watch, log, Writer(log, refuses=True))
    assert "served scores are out of band (too high), and nothing was rolled back: no" in caplog.text
    assert not await act(watch, a_log(5), Writer(log)), "no good version to go to"
