"""What deltas and versions cost the trainer: pauses, examples a second beside a write, memory, and the time of a restore.

    .venv/bin/python bench/snapshots.py                     # 1 M and 10 M rows: some 4 minutes, 4 GB of memory, 2 GB of disk
    .venv/bin/python bench/snapshots.py --rows 1000000      # this size only; may be repeated

DeepFM has 39 fields, dimension 16 and an MLP of 400-400-400, as in `bench/train.py`, without row history or cross layers. The
ids of the examples are drawn by Zipf 1.1 in each field, and popular ids have any row number. For each size, in a process of
its own:

- capture: every 250 ms, training stops for `take_delta` and `freeze`;
- version: a freeze is written to a folder while training goes on, as the trainer does it, without deltas beside;
- memory: the most that the process ever had, less what it had before the table was filled, divided by the bytes of all rows'
  weights and optimizer state;
- restore: of the version, by another process, until the learner can learn. The files are in the page cache, if it has room.

The last line is one JSON object.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from bench.train import CLICK_RATE, DIM, FIELDS, HIDDEN, Pool, as_batch
from model.learner import Learner
from model.rows import Rows
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from state.manifest import Manifest
from state.pieces import piece_rows
from state.settings import SnapshotSettings
from state.store import SnapshotStore

SIZES = (1_000_000, 10_000_000)
POOL_ROWS = 100_000
INTERVAL_S = 0.25
"""Time between two captures: the default of `snapshots.delta_interval_ms`."""
ALONE_S = 10.0
WRITES = 3
ROW_BYTES = 2 * 4 * (DIM + 1)
"""Bytes of a row's weights and their accumulators."""


Figures = dict[str, float]
"""What a process found, by name. Times in seconds and in ms, as the names say."""


def new_learner() -> Learner:
    schema = FeatureSchema(fields=tuple(FieldSpec(name=f"f{i}") for i in range(FIELDS)), embedding_dim=DIM)
    return Learner(schema, ModelSettings(hidden=HIDDEN, row_history=False, cross_layers=0), device="cpu")


def fill(learner: Learner, pool: Pool) -> None:
    """Give the learner a row for each id of the pool, as a restore does."""
    with learner.freeze() as frozen:
        dense, small = frozen.dense, frozen.small
    learner.begin_restore(pool.every_id.size, small)
    generator = torch.Generator().manual_seed(0)
    for ids in np.array_split(pool.every_id, max(1, len(pool.every_id) // 4096)):
        keys = torch.from_numpy(as_batch(ids).keys.flatten())
        count = len(keys)
        weights = torch.randn((count, DIM), generator=generator) * 0.01
        state = {"adagrad.embedding": torch.full((count, DIM), 0.1), "adagrad.first_order": torch.full((count,), 0.1)}
        learner.restore_rows(Rows(keys, weights, weights[:, 0].contiguous()), state)
    learner.finish_restore(dense, small)


class Training:
    """Batches of the pool, learned one after the other, with the time at the end of each."""

    def __init__(self, learner: Learner, pool: Pool, rows: int) -> None:
        self._learner, self._pool, self._rows = learner, pool, rows
        self._at = 0
        self.ends_s: list[float] = []

    def step(self) -> None:
        stop = self._at + self._rows
        self._learner.learn(self._pool.batch.slice(self._at, stop), self._pool.labels[self._at : stop])
        self._at = stop if stop + self._rows <= POOL_ROWS else 0
        self.ends_s.append(time.perf_counter())

    def until(self, done: Callable[[], bool]) -> tuple[float, float]:
        """Train until `done`. Returns examples a second, and the longest time from the end of a batch to that of the next."""
        self.ends_s = [time.perf_counter()]
        while not done():
            self.step()
        gaps = np.diff(self.ends_s)
        return self._rows * len(gaps) / float(gaps.sum()), float(gaps.max())

    def seconds(self, length: float) -> tuple[float, float]:
        end = time.perf_counter() + length
        return self.until(lambda: time.perf_counter() >= end)


def train(rows: int, batch_rows: int, captures: int, folder: str) -> Figures:
    """Measure all but the restore. The last version that it writes stays in `folder`."""
    pool = Pool(rows, POOL_ROWS, CLICK_RATE)
    learner = new_learner()
    learner.learn(pool.batch.slice(0, 512), pool.labels[:512])  # torch's threads and buffers aren't the table's
    before = psutil.Process().memory_info().rss
    fill(learner, pool)
    training = Training(learner, pool, batch_rows)
    training.seconds(2.0)
    takes, freezes, touched = [], [], []
    for _ in range(captures):
        training.seconds(INTERVAL_S)
        began = time.perf_counter()
        delta = learner.take_delta()
        taken = time.perf_counter()
        frozen = learner.freeze()
        freezes.append(time.perf_counter() - taken)
        takes.append(taken - began)
        touched.append(len(delta.rows))
        frozen.close()
    pauses = np.add(takes, freezes)
    rate, gap = training.seconds(ALONE_S)
    store = SnapshotStore(SnapshotSettings(url=folder))
    beside = [write(learner, training, store, version) for version in range(1, WRITES + 1)]
    for version in range(1, WRITES):
        store.delete(version)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "delta_rows": statistics.median(touched),
        "take_delta_ms": statistics.median(takes) * 1e3,
        "freeze_ms": statistics.median(freezes) * 1e3,
        "capture_p50_ms": float(np.percentile(pauses, 50)) * 1e3,
        "capture_p99_ms": float(np.percentile(pauses, 99)) * 1e3,
        "examples_s": rate,
        "examples_s_beside": statistics.median(each.rate for each in beside),
        "write_s": statistics.median(each.seconds for each in beside),
        "longest_gap_ms": gap * 1e3,
        "longest_gap_beside_ms": max(each.gap for each in beside) * 1e3,
        "saved_share": statistics.median(each.saved_share for each in beside),
        "memory_ratio": (peak - before) / (learner.rows * ROW_BYTES),
        "memory_gb": peak / 1e9,
    }


@dataclass(frozen=True, slots=True)
class Beside:
    """Training while one version is written: examples a second, longest time between two batches, in seconds."""

    rate: float
    gap: float
    seconds: float
    saved_share: float


def write(learner: Learner, training: Training, store: SnapshotStore, version: int) -> Beside:
    """Write one version while training goes on."""
    rows = learner.rows
    frozen = learner.freeze()
    manifest = Manifest(version=version)

    def work() -> None:
        with frozen:
            pieces = frozen.pieces(piece_rows(DIM))
            store.write_version(manifest, dense=frozen.dense, small=frozen.small, pieces=pieces)

    thread = threading.Thread(target=work)
    began = time.perf_counter()
    thread.start()
    rate, gap = training.until(lambda: not thread.is_alive())
    thread.join()
    return Beside(rate, gap, time.perf_counter() - began, frozen.saved / rows)


def restore(folder: str) -> Figures:
    """Restore the newest version of a folder."""
    learner = new_learner()
    learner.predict(as_batch(np.zeros((512, FIELDS), np.int64)))
    before = psutil.Process().memory_info().rss
    began = time.perf_counter()
    store = SnapshotStore(SnapshotSettings(url=folder))
    reader = store.read(store.versions()[-1])
    learner.begin_restore(reader.row_count, reader.small())
    for piece in reader.trainer_rows():
        learner.restore_rows(piece.serving, piece.trainer)
    learner.finish_restore(reader.dense(), reader.small())
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"restore_s": seconds, "restore_memory_ratio": (peak - before) / (learner.rows * ROW_BYTES)}


def measure(rows: int, batch_rows: int, captures: int) -> Figures:
    """All figures of one size. Each part has a process of its own, so that its memory is."""
    with tempfile.TemporaryDirectory(prefix="headrace-snapshots-") as folder:
        return {**in_process(train, rows, batch_rows, captures, folder), **in_process(restore, folder)}


def in_process(work: Callable[..., Figures], *arguments: object) -> Figures:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--rows", default=SIZES, show_default=True, multiple=True, help="Rows of the table.")
@click.option("--batch-rows", default=512, show_default=True, help="Examples in a batch.")
@click.option("--captures", default=100, show_default=True, help="Number of captures.")
def main(rows: tuple[int, ...], batch_rows: int, captures: int) -> None:
    warn_if_busy()
    figures: dict[str, float] = {}
    for size in rows:
        for name, value in measure(size, batch_rows, captures).items():
            rounded = round(value, 3) if value < 100 else round(value)
            click.echo(f"{size:>12,} rows  {name:<24}{rounded:>14,}", err=True)
            figures[f"{name}_{size}"] = rounded
    report(
        benchmark="snapshots",
        value=figures[f"capture_p99_ms_{rows[-1]}"],
        unit="ms of training's pause at a capture, p99",
        batch_rows=batch_rows,
        captures=captures,
        torch=torch.__version__,
        **figures,
    )


if __name__ == "__main__":
    main()
