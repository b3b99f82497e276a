"""The band of served scores on simulated streams: false alarms a day, and how soon faults are found.

    .venv/bin/python bench/served_band.py
    .venv/bin/python bench/served_band.py --days 10 --blocks 2

A stream has 300 impressions a second. The logit of an impression's true probability is normal, with a standard deviation of 1.
Scores are the true logit with an error of 0.5. The click rate changes by a third up and down over the day. Once there is a
history, one of these faults begins at a random time of day:

- `logits_plus_0.7`: all logits served are too high by 0.7;
- `half_random`: half of the logits served are those of other impressions;
- `flipped`: scores are those of a model that has learned labels the wrong way round, so logits are turned about their mean.

The last line is one JSON object: alarms a day without a fault, for each click rate, and for each fault the share of seeds in
which it was found within 20 blocks, and the median number of blocks until then.
"""

from __future__ import annotations

import statistics
from typing import Literal, get_args

import click
import numpy as np

from bench.common import report
from model.metrics import calibration, normalised_entropy
from state.served_band import FIRST_BLOCKS, Block, ServedBand
from state.settings import SnapshotSettings

Fault = Literal["none", "logits_plus_0.7", "half_random", "flipped"]
CLICK_RATES = (0.05, 0.01)
PER_SECOND, DAY_S = 300, 86_400
SPREAD, ERROR, SWING = 1.0, 0.5, 1 / 3
SEEDS, WITHIN = 10, 20


class Stream:
    """Blocks of one stream."""

    def __init__(self, seed: int, click_rate: float, clicks: int) -> None:
        self._rng, self._click_rate, self._clicks = np.random.default_rng(seed), click_rate, clicks
        self._s = float(self._rng.random() * DAY_S)

    def block(self, fault: Fault = "none") -> Block:
        """The next block."""
        rate = self._click_rate * (1 + SWING * np.sin(2 * np.pi * self._s / DAY_S))
        rows = round(self._clicks / rate)
        self._s += rows / PER_SECOND
        rng = self._rng
        # The mean of sigmoid(bias + normal) is near rate for small rates at this bias.
        bias = np.log(rate / (1 - rate)) - SPREAD**2 / 2 * (1 - rate)
        truth = bias + SPREAD * rng.standard_normal(rows, np.float32)
        error = ERROR * rng.standard_normal(rows, np.float32)
        # The mean of the true logit where this one is seen, so that scores are calibrated as far as they know.
        share = SPREAD**2 / (SPREAD**2 + ERROR**2)
        served = bias + share * (truth - bias + error) + SPREAD**2 * (1 - share) / 2
        if fault == "logits_plus_0.7":
            served = served + 0.7
        elif fault == "half_random":
            served[: rows // 2] = rng.permutation(served[: rows // 2])
        elif fault == "flipped":
            served = 2 * bias - served
        labels = rng.random(rows, np.float32) < 1 / (1 + np.exp(-truth))
        scores = 1 / (1 + np.exp(-served))
        return Block(int(labels.sum()), normalised_entropy(scores, labels), calibration(scores, labels))

    @property
    def seconds(self) -> float:
        return self._s


def false_alarms(click_rate: float, days: int, settings: SnapshotSettings, seed: int) -> float:
    """Alarms a day without a fault. After each, somebody resumes."""
    stream, band, alarms = Stream(seed, click_rate, settings.served_block_clicks), ServedBand(settings), 0
    ends = stream.seconds + days * DAY_S
    while stream.seconds < ends:
        band.judge(stream.block())
        if band.state.alarm:
            alarms += 1
            band.begin_again()
    return alarms / days


def blocks_until_found(fault: Fault, click_rate: float, settings: SnapshotSettings, seed: int) -> int | None:
    """Blocks from the beginning of a fault to the alarm; None when it wasn't found in time."""
    stream, band = Stream(seed, click_rate, settings.served_block_clicks), ServedBand(settings)
    for _ in range(FIRST_BLOCKS + 10):
        band.judge(stream.block())
    for count in range(1, WITHIN + 1):
        band.judge(stream.block(fault))
        if band.state.alarm:
            return count
    return None


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--days", default=2, show_default=True, help="Days without a fault, for each click rate.")
@click.option("--blocks", type=int, help="Instead of the default of snapshots.served_blocks.")
@click.option("--margin", type=float, help="Instead of the default of snapshots.served_ne_margin.")
@click.option("--seed", default=0, show_default=True)
def main(days: int, blocks: int | None, margin: float | None, seed: int) -> None:
    changed = {"served_blocks": blocks, "served_ne_margin": margin}
    settings = SnapshotSettings().model_copy(update={name: value for name, value in changed.items() if value is not None})
    figures: dict[str, object] = {}
    for rate in CLICK_RATES:
        figures[f"false_alarms_a_day_at_{rate:g}"] = round(false_alarms(rate, days, settings, seed), 3)
        for fault in get_args(Fault)[1:]:
            found = [blocks_until_found(fault, rate, settings, seed + 1 + each) for each in range(SEEDS)]
            there = [each for each in found if each is not None]
            figures[f"{fault}_at_{rate:g}_found"] = round(len(there) / SEEDS, 2)
            figures[f"{fault}_at_{rate:g}_median_blocks"] = statistics.median(there) if there else None
    report(
        benchmark="served_band",
        value=figures[f"false_alarms_a_day_at_{CLICK_RATES[0]:g}"],
        unit="false alarms a day",
        days=days,
        block_clicks=settings.served_block_clicks,
        blocks=settings.served_blocks,
        margin=settings.served_ne_margin,
        **figures,
    )


if __name__ == "__main__":
    main()
