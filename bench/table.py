"""The table of rows: the longest pause and the time of a step as it grows, and its memory at rest and while it grows.

    .venv/bin/python bench/table.py             # both parts: some 5 minutes, 5 GB of memory
    .venv/bin/python bench/table.py growth      # 1 M to 10 M rows, --first and --last
    .venv/bin/python bench/table.py memory      # nothing to 20 M rows, --last

growth  DeepFM has 39 fields, dimension 16 and an MLP of 400-400-400, as in `bench/train.py`, without row history or cross
        layers. In each batch of 512 examples, 29 fields have ids of a pool of 1 M (Zipf 1.1) whose rows have any number, 4
        have any of the values so far, and 6 have values that were never seen. Deltas are taken every 250 ms, and are no part
        of a step's time. A pause is what a step takes longer than the median of the steps around it. Where other programs
        run, figures of CPU time say more than those of time; with OMP_NUM_THREADS=1 they have no threads that wait for one
        another.
memory  the process' memory less what it had before, over the payload: keys, weights, accumulators, and with `--evicting` what
        a row's age and uses take. All values are new, and a delta is taken every 200,000 rows. "At rest" is the largest share
        at any count from a quarter of the last one on while the index isn't growing, "growing" while it is.

The last line is one JSON object.
"""

from __future__ import annotations

import gc
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import click
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from bench.snapshots import INTERVAL_S
from bench.train import CLICK_RATE, DIM, FIELDS, HIDDEN, Pool, as_batch
from model.batch import FeatureBatch
from model.learner import Learner
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from model.table_settings import TableSettings

POOL_IDS, POOL_ROWS = 1_000_000, 100_000
BATCH_ROWS = 512
NEW_FIELDS, ANY_FIELDS = 6, 4
AROUND = 101
"""Steps of which the median is taken to find pauses."""
AT_ONCE = 1_024
HOUR_MS = 3_600_000
KEEPING = TableSettings(evict_after_ms=1_000_000 * HOUR_MS, max_rows=10**9)
"""Rows are stamped and looked at, and none goes."""

Figures = dict[str, float]


def new_learner(hidden: tuple[int, ...], table: TableSettings) -> Learner:
    schema = FeatureSchema(fields=tuple(FieldSpec(name=f"f{i}") for i in range(FIELDS)), embedding_dim=DIM)
    return Learner(schema, ModelSettings(hidden=hidden, row_history=False, cross_layers=0), table=table, device="cpu")


def new_batch(first: int, rows: int) -> FeatureBatch:
    """A batch (B, F) of ids that nobody has seen."""
    return as_batch(np.arange(first, first + rows * FIELDS).reshape(rows, FIELDS))


def growth(first: int, last: int, evicting: bool) -> Figures:
    """Time of the steps while the table grows from `first` to `last` rows."""
    pool, rng = Pool(POOL_IDS, POOL_ROWS, CLICK_RATE), np.random.default_rng(1)
    learner = new_learner(HIDDEN, KEEPING if evicting else TableSettings())
    quick = np.zeros(4096, np.float32)
    for ids in np.array_split(pool.every_id, len(pool.every_id) // 4096 + 1):
        learner.learn(as_batch(ids), quick[: len(ids)])
    next_id = POOL_IDS
    while learner.rows < first:
        learner.learn(new_batch(next_id, AT_ONCE), quick[:AT_ONCE])
        next_id += AT_ONCE * FIELDS
    seconds: list[float] = []
    cpu: list[float] = []
    rows: list[int] = []
    takes: list[float] = []
    begun: list[bool] = []
    at, delta_due_s = 0, 0.0
    learner.take_delta()
    gc.collect()
    gc.freeze()  # as the trainer's worker does: a collection of all that torch has loaded takes 100 ms
    while learner.rows < last:
        ids = pool.ids[at : at + BATCH_ROWS].copy()
        ids[:, :NEW_FIELDS] = np.arange(next_id, next_id + BATCH_ROWS * NEW_FIELDS).reshape(BATCH_ROWS, NEW_FIELDS)
        ids[:, NEW_FIELDS : NEW_FIELDS + ANY_FIELDS] = rng.integers(0, next_id, (BATCH_ROWS, ANY_FIELDS))
        next_id += BATCH_ROWS * NEW_FIELDS
        batch, labels = as_batch(ids), pool.labels[at : at + BATCH_ROWS]
        times = np.full(BATCH_ROWS, 1e12 + 100.0 * len(seconds))
        at = at + BATCH_ROWS if at + 2 * BATCH_ROWS <= POOL_ROWS else 0
        began, cpu_began = time.perf_counter(), time.process_time()
        learner.learn(batch, labels, None, None, times)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
        rows.append(learner.rows)
        begun.append(learner.table_is_growing)
        if time.perf_counter() >= delta_due_s:
            began = time.perf_counter()
            learner.take_delta(dense=False)
            takes.append(time.perf_counter() - began)
            delta_due_s = time.perf_counter() + INTERVAL_S
    steps, cpu_steps = np.array(seconds), np.array(cpu)
    edge = len(steps) // 20
    pauses, cpu_pauses = over_median(steps), over_median(cpu_steps)
    worst = np.argsort(cpu_pauses)[::-1][:5]
    told = ", ".join(f"{cpu_pauses[i] * 1e3:.0f} ms at {rows[i]:,}{' (growing)' if begun[i] else ''}" for i in worst)
    print(f"longest pauses of CPU time: {told}", file=sys.stderr)
    growing = np.array(begun)
    return {
        "step_ms_first": round(float(np.median(steps[:edge])) * 1e3, 2),
        "step_ms_last": round(float(np.median(steps[-edge:])) * 1e3, 2),
        "step_ratio": round(float(np.median(steps[-edge:]) / np.median(steps[:edge])), 3),
        "step_ms_growing": round(float(np.median(steps[growing])) * 1e3, 2) if growing.any() else 0.0,
        "pause_ms": round(float(pauses.max()) * 1e3, 1),
        "pause_growing_ms": round(float(pauses[growing].max(initial=0)) * 1e3, 1),
        "pause_p999_ms": round(float(np.quantile(pauses, 0.999)) * 1e3, 1),
        "delta_ms": round(float(np.max(takes)) * 1e3, 1),
        "cpu_ms_first": round(float(np.median(cpu_steps[:edge])) * 1e3, 2),
        "cpu_ms_last": round(float(np.median(cpu_steps[-edge:])) * 1e3, 2),
        "cpu_ratio": round(float(np.median(cpu_steps[-edge:]) / np.median(cpu_steps[:edge])), 3),
        "cpu_ms_growing": round(float(np.median(cpu_steps[growing])) * 1e3, 2) if growing.any() else 0.0,
        "pause_cpu_ms": round(float(cpu_pauses.max()) * 1e3, 1),
        "steps": len(steps),
    }


def over_median(steps: np.ndarray) -> np.ndarray:
    """How much longer each step takes than the median of those around it, (N,)."""
    padded = np.pad(steps, AROUND // 2, mode="edge")
    around: np.ndarray = np.median(np.lib.stride_tricks.sliding_window_view(padded, AROUND), axis=1)
    return steps - around


def memory(last: int, evicting: bool) -> Figures:
    """The most memory at any count of rows up to `last`, as a share of the payload."""
    torch.set_num_threads(1)
    learner = new_learner((8,), KEEPING if evicting else TableSettings())
    process = psutil.Process()
    labels = np.arange(AT_ONCE) % 2 == 0
    corrects = np.arange(AT_ONCE) % 7 == 0  # so that rows owe something

    def learn(next_id: int) -> None:
        times = np.full(AT_ONCE, 1e12 + next_id)
        learner.learn(new_batch(next_id, AT_ONCE), labels, None, corrects, times)

    learn(0)  # torch's buffers aren't the table's
    learner.take_delta()
    row_bytes = 8 + 2 * 4 * (DIM + 1) + (10 if evicting else 0)
    before = process.memory_info().rss - learner.rows * row_bytes
    at_rest, growing = [0.0], [0.0]
    next_id = AT_ONCE * FIELDS
    while learner.rows < last:
        learn(next_id)
        next_id += AT_ONCE * FIELDS
        if learner.touched >= 200_000:
            learner.take_delta(dense=False)
        if learner.rows >= last // 4:
            share = (process.memory_info().rss - before) / (learner.rows * row_bytes)
            (growing if learner.table_is_growing else at_rest).append(share)
    return {
        "memory_at_rest": round(max(at_rest), 3),
        "memory_growing": round(max(growing), 3),
        "memory_last": round(at_rest[-1], 3),
        "row_bytes": row_bytes,
    }


def alone(measure: Callable[[], Figures]) -> Figures:
    """What is measured in a process of its own, so that the memory of one part isn't the other's."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure).result()


@click.command(help=__doc__.split("\n", 1)[0])
@click.argument("part", type=click.Choice(["all", "growth", "memory"]), default="all")
@click.option("--first", default=1_000_000, show_default=True, help="Rows at the start of `growth`.")
@click.option("--last", type=int, help="Rows at the end; 10 million for `growth`, 20 million for `memory`.")
@click.option("--evicting", is_flag=True, help="With stamps and a hand that looks for rows to be evicted.")
def main(part: str, first: int, last: int | None, evicting: bool) -> None:
    warn_if_busy()
    found: Figures = {}
    if part in ("all", "growth"):
        found |= alone(partial(growth, first, last or 10_000_000, evicting))
    if part in ("all", "memory"):
        found |= alone(partial(memory, last or 20_000_000, evicting))
    value = found.get("pause_ms", found.get("memory_growing"))
    unit = "ms" if "pause_ms" in found else "times the payload"
    report(benchmark="table", value=value, unit=unit, evicting=evicting, threads=torch.get_num_threads(), **found)


if __name__ == "__main__":
    main()
