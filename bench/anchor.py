"""What the gate's anchor takes of memory and time: a moment of the live table, or a second table.

    .venv/bin/python bench/anchor.py                     # 1 M and 10 M rows: some 2 minutes, 4 GB of memory
    .venv/bin/python bench/anchor.py --rows 1000000      # this size only; may be repeated

DeepFM has 39 fields, dimension 16 and an MLP of 400-400-400. For each size, in a process of its own: a moment is kept, examples
of 100,000 rows that are drawn at random are learned, and the process' resident memory is compared. Then all rows are loaded
into a predictor. Both score batches of 1,024 examples of the same rows in turns. The last line is one JSON object; `value` is
the memory of the kept moment at the largest size.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from pathlib import Path

import click
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from bench.snapshots import SIZES, Figures, fill, in_process, new_learner
from bench.train import FIELDS, Pool, as_batch
from model.predictor import Predictor

TOUCHED = 100_000
LEARNED_AT_ONCE = 512
SCORED = 1_024
ROUNDS = 20


def rss() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def measure(rows: int) -> Figures:
    pool = Pool(rows, 1_000, 0.25)
    learner = new_learner()
    fill(learner, pool)
    count = TOUCHED // FIELDS
    drawn = np.random.default_rng(0).permutation(pool.every_id.size)[: count * FIELDS]
    batch = as_batch(pool.every_id.flatten()[drawn].reshape(count, FIELDS))
    labels = np.zeros(count, np.float32)
    learner.learn(batch.slice(0, LEARNED_AT_ONCE), labels[:LEARNED_AT_ONCE])  # torch's buffers aren't the moment's
    learner.take_delta()
    before = rss()
    began = time.perf_counter()
    moment = learner.keep()
    made = time.perf_counter() - began
    for start in range(0, count, LEARNED_AT_ONCE):
        learner.learn(batch.slice(start, start + LEARNED_AT_ONCE), labels[start : start + LEARNED_AT_ONCE])
    learner.take_delta()
    after = rss()
    predictor = Predictor.of(learner.schema, learner.settings, learner.serving_state(), device="cpu")
    loaded = rss()
    asked = batch.slice(0, SCORED)
    times: dict[str, list[float]] = {"moment": [], "predictor": []}
    for _ in range(ROUNDS):
        for name, scores in (("moment", moment.predict), ("predictor", predictor.predict)):
            began = time.perf_counter()
            scores(asked)
            times[name].append(time.perf_counter() - began)
    return {
        "saved_rows": moment.saved,
        "moment_mb": (after - before) / 1e6,
        "predictor_mb": (loaded - after) / 1e6,
        "make_ms": made * 1e3,
        "moment_us_a_row": statistics.median(times["moment"]) / SCORED * 1e6,
        "predictor_us_a_row": statistics.median(times["predictor"]) / SCORED * 1e6,
    }


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--rows", default=SIZES, show_default=True, multiple=True, help="Rows of the table.")
def main(rows: tuple[int, ...]) -> None:
    warn_if_busy()
    figures: dict[str, float] = {}
    for size in rows:
        for name, value in in_process(measure, size).items():
            rounded = round(value, 2) if value < 100 else round(value)
            click.echo(f"{size:>12,} rows  {name:<24}{rounded:>14,}", err=True)
            figures[f"{name}_{size}"] = rounded
    report(
        benchmark="anchor",
        value=figures[f"moment_mb_{rows[-1]}"],
        unit="MB of a kept moment with 100,000 touched rows",
        torch=torch.__version__,
        **figures,
    )


if __name__ == "__main__":
    main()
