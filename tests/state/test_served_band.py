"""When served scores are out of their band: what makes an alarm, what ends it, and that chance doesn't."""

from __future__ import annotations

import numpy as np
import pytest

from state.served_band import FIRST_BLOCKS, Block, ServedBand
from state.settings import SnapshotSettings

SETTINGS = SnapshotSettings()


def a_band(count: int = FIRST_BLOCKS, seed: int = 0) -> ServedBand:
    """A band after some blocks of 200 clicks whose entropies differ by chance."""
    band, rng = ServedBand(SETTINGS), np.random.default_rng(seed)
    for _ in range(count):
        band.judge(Block(200, float(0.8 + 0.02 * rng.standard_normal()), float(np.exp(0.07 * rng.standard_normal()))))
    return band


def test_chance_is_no_alarm() -> None:
    assert not a_band(5_000).state.alarm
    assert a_band(5_000).state.mean == pytest.approx(0.8, abs=0.02)


def test_several_blocks_in_a_row_are_an_alarm_and_one_in_band_ends_it() -> None:
    band = a_band()
    history = (band.state.blocks, band.state.mean)
    for count in range(1, SETTINGS.served_blocks + 1):
        assert not band.state.alarm
        band.judge(Block(200, 1.1, 1.0))
        assert band.state.out == count
    assert band.state.alarm.startswith("normalised entropy of served scores 1.1000, expected 0.7")
    assert (band.state.blocks, band.state.mean) == history, "what is out of band is no history"
    band.judge(Block(200, 0.8, 1.0))
    assert (band.state.alarm, band.state.out) == ("", 0)


def test_without_a_history_calibration_alone_is_judged() -> None:
    band = ServedBand(SETTINGS)
    for _ in range(SETTINGS.served_blocks):
        band.judge(Block(200, 3.0, 1.0))
    assert not band.state.alarm
    for _ in range(SETTINGS.served_blocks):
        band.judge(Block(200, 0.8, 1.6))
    assert band.state.alarm == "calibration of served scores 1.6, expected 0.8 to 1.25, in 3 blocks of clicks in a row"


@pytest.mark.parametrize(("clicks", "calibration", "out"), [(200, 1.4, 0), (2_000, 1.4, 1), (200, 0.72, 0), (2_000, 0.72, 1)])
def test_calibration_is_judged_by_its_standard_error(clicks: int, calibration: float, out: int) -> None:
    band = ServedBand(SETTINGS)
    band.judge(Block(clicks, 0.8, calibration))
    assert band.state.out == out


def test_a_slow_change_is_followed_and_a_new_beginning_forgets() -> None:
    band = a_band()
    for step in range(500):
        band.judge(Block(200, 0.8 + 0.0005 * step, 1.0))
        assert not band.state.out
    band.begin_again()
    band.judge(Block(200, 2.0, 1.0))
    assert (band.state.out, band.state.blocks) == (0, 1)


def test_blocks_that_have_no_entropy_change_no_history() -> None:
    band = a_band()
    before = band.state.mean
    band.judge(Block(200, float("nan"), 1.0))
    assert band.state.mean == before
