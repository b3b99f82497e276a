"""Drift on simulated streams: false alarms a day while nothing changes, and how soon abrupt changes are found.

    .venv/bin/python bench/drift.py                     # about four minutes
    .venv/bin/python bench/drift.py --days 1 --seeds 3  # a quick look
    .venv/bin/python bench/drift.py --dataset kuairand  # on a data set, learned by the default model: two minutes

A stream has 300 impressions a second and 20 features. `steady` is stationary. In `bursty`, null rates, the mean of the scores
and the click rate vary from block to block, as traffic that comes in bursts does, and go up and down over the day by a third.
Scores are calibrated logits with a standard deviation of 1. Blocks are drawn as sums, so that a day takes seconds.

Once there is a history, one of these changes begins:

- `feature_gone`: a feature has no value any more; `feature_half_gone`: half of the examples have none;
- `scores_up`: all scores rise by one logit, and clicks don't; `scores_flat`: scores lose two thirds of their spread;
- `clicks_twice`, `clicks_half`: the click rate changes alone, which raises an alarm and withholds nothing;
- `clicks_a_fifth`, `clicks_five_times`, `no_clicks`: beyond a factor of 4.

The last line is one JSON object: withholdings and alarms a day without a change, by stream and click rate, and for each change
the median number of impressions until it was found, and the share of seeds in which it was found within 16,000.

With `--dataset` it is the blocks of a data set with real traffic, in event-time order: what is withheld, and which alarms there
are.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report
from deploy.bootstrap.learning import as_run
from deploy.bootstrap.reader import HistoryReader
from deploy.bootstrap.source import Source
from deploy.datasets import open_data_set
from deploy.datasets.base import MAX_DELAY_MS
from model.learner import Learner
from model.settings import ModelSettings
from state.drift import BLOCK_EXAMPLES, LEAST_BLOCKS, DriftBlock, DriftWatch
from state.drift_tests import histogram
from state.settings import SnapshotSettings
from stream.trainer.batching import BatchCutter
from stream.trainer.drift import Drift

PER_SECOND, DAY_S = 300, 86_400
BLOCKS_A_DAY = PER_SECOND * DAY_S // BLOCK_EXAMPLES
CLICK_RATES = (0.45, 0.05, 0.02, 0.005)
NULL_RATES = np.array([0.0] * 8 + [0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0])
SWING = 1 / 3
WITHIN = 16
HISTORY = 100
ACCEPT_MS = SnapshotSettings().anchor_age_ms


@dataclass
class Change:
    """What changes: the null rate of the first feature, factors of the click rate and the spread, logits."""

    null_rate: float = 0.0
    clicks: float = 1.0
    logits: float = 0.0
    spread: float = 1.0
    only_alarms: bool = False


CHANGES = {
    "feature_gone": Change(null_rate=1.0),
    "feature_half_gone": Change(null_rate=0.5),
    "scores_up": Change(logits=1.0),
    "scores_flat": Change(spread=1 / 3),
    "clicks_twice": Change(clicks=2.0, only_alarms=True),
    "clicks_half": Change(clicks=0.5, only_alarms=True),
    "clicks_a_fifth": Change(clicks=0.2),
    "clicks_five_times": Change(clicks=5.0),
    "no_clicks": Change(clicks=0.0),
}


class Stream:
    """Blocks of one stream."""

    def __init__(self, seed: int, click_rate: float, *, bursty: bool) -> None:
        self._rng, self._click_rate, self._bursty, self._block = np.random.default_rng(seed), click_rate, bursty, 0

    def block(self, change: Change | None = None) -> DriftBlock:
        """The next block."""
        change, rng, count = change or Change(), self._rng, BLOCK_EXAMPLES
        self._block += 1
        nulls, rate, bias = NULL_RATES, self._click_rate, 0.0
        if self._bursty:
            odds = np.clip(NULL_RATES, 1e-6, 1 - 1e-6)
            nulls = 1 / (1 + np.exp(-np.log(odds / (1 - odds)) - 0.2 * rng.standard_normal(len(odds))))
            day = SWING * np.sin(2 * np.pi * self._block / BLOCKS_A_DAY)
            bias = float(np.log1p(day) + 0.1 * rng.standard_normal())
        nulls = np.maximum(nulls, change.null_rate * (np.arange(len(nulls)) == 0))
        logit = np.log(rate / (1 - rate)) + bias
        scores = logit + change.logits + change.spread * rng.standard_normal(count)
        clicked = min(1.0, change.clicks / (1 + np.exp(-logit)))
        return DriftBlock(
            examples=float(count),
            weight=float(count),
            squares=float(count),
            nulls=rng.binomial(count, nulls).astype(np.float64).tolist(),
            logits=histogram(scores, np.ones(count)).tolist(),
            clicks=float(rng.binomial(count, clicked)),
        )


def on_data_set(name: str) -> None:
    """Learn a data set and report withholdings and alarms. What is withheld is accepted after ten minutes."""
    source = Source(name, open_data_set(name).schema(), MAX_DELAY_MS)
    model = ModelSettings()
    learner, drift = Learner(source.schema, model, device="cpu"), Drift(source.schema, SnapshotSettings())
    cutter, found, before, since_ms = BatchCutter(model.batch_rows, {0: 0}), [], ("", ""), 0
    largest = {"null_change": 0.0, "score_change": 0.0}
    with HistoryReader(source) as reader:
        for columns in reader:
            cutter.add(as_run(columns, name))
            while cutter.waiting >= model.batch_rows:
                batch = cutter.cut()
                drift.observe(batch, learner.learn(batch.batch, batch.labels, None, None, batch.impression_ms))
                now_ms = int(batch.impression_ms[-1])
                if learner.examples_seen > BLOCK_EXAMPLES * LEAST_BLOCKS:
                    largest = {each: max(value, getattr(drift.watch, each)) for each, value in largest.items()}
                if drift.problem and not before[0]:
                    since_ms = now_ms
                for was, now, what in zip(before, (drift.problem, drift.alarm), ("withheld", "alarm"), strict=True):
                    if now and not was:
                        found.append({"example": learner.examples_seen, "what": what, "why": now})
                        click.echo(found[-1], err=True)
                if drift.problem and now_ms - since_ms >= ACCEPT_MS:
                    drift.accept()
                before = (drift.problem, drift.alarm)
    report(benchmark="drift", value=len(found), unit="withholdings and alarms", dataset=name, found=found, **largest)


def watch() -> DriftWatch:
    return DriftWatch(SnapshotSettings(), [f"f{at}" for at in range(len(NULL_RATES))])


def false_alarms(seed: int, click_rate: float, days: float, *, bursty: bool) -> dict[str, float]:
    """Withholdings and alarms a day while nothing changes. What is withheld is accepted after ten minutes."""
    stream, watched, found = Stream(seed, click_rate, bursty=bursty), watch(), {"withheld": 0, "alarms": 0}
    state, was_alarm, since = watched.state, False, 0
    for block in range(int(days * BLOCKS_A_DAY)):
        before = bool(state.problem)
        watched.add(stream.block())
        if state.problem and not before:
            found["withheld"], since = found["withheld"] + 1, block
            click.echo(f"block {block}: {state.problem}", err=True)
        elif state.problem and (block - since) * BLOCK_EXAMPLES * 1_000 >= ACCEPT_MS * PER_SECOND:
            watched.accept()
        found["alarms"] += bool(state.alarm) and not was_alarm
        was_alarm = bool(state.alarm)
    return {name: round(count / days, 3) for name, count in found.items()}


def found_after(seed: int, click_rate: float, change: Change, *, bursty: bool) -> int | None:
    """Blocks until a change is found; None if it isn't within `WITHIN`. Raises if a mere alarm withholds."""
    stream, watched = Stream(seed, click_rate, bursty=bursty), watch()
    for _ in range(LEAST_BLOCKS + HISTORY):
        watched.add(stream.block())
    for block in range(1, WITHIN + 1):
        watched.add(stream.block(change))
        if watched.state.alarm if change.only_alarms else watched.state.problem:
            return block
    return None


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--days", default=2.0, show_default=True, help="Simulated days without a change, for each stream and click rate.")
@click.option("--seeds", default=20, show_default=True, help="Streams for each change.")
@click.option("--dataset", help="A data set instead of simulated streams.")
def main(days: float, seeds: int, dataset: str | None) -> None:
    if dataset is not None:
        on_data_set(dataset)
        return
    quiet: dict[str, dict[str, float]] = {}
    delays: dict[str, dict[str, float | None]] = {}
    for kind in ("steady", "bursty"):
        for rate in CLICK_RATES:
            name = f"{kind}_{rate:g}"
            quiet[name] = false_alarms(1, rate, days, bursty=kind == "bursty")
            click.echo(f"{name:14} a day: {quiet[name]}", err=True)
            for what, change in CHANGES.items():
                blocks = [found_after(seed, rate, change, bursty=kind == "bursty") for seed in range(seeds)]
                known = [each for each in blocks if each is not None]
                delays[f"{name}_{what}"] = {
                    "found": len(known) / seeds,
                    "impressions": BLOCK_EXAMPLES * statistics.median(known) if known else None,
                }
                click.echo(f"{name:14} {what:18} {delays[f'{name}_{what}']}", err=True)
    report(
        benchmark="drift",
        value=max(each["withheld"] for each in quiet.values()),
        unit="withholdings a day while nothing changes, at worst",
        days=days,
        quiet=quiet,
        changes=delays,
    )


if __name__ == "__main__":
    main()
