"""What a scorer's weights cost at many rows: memory, loading, and deltas that are applied while requests are scored.

    .venv/bin/python bench/apply.py                   # 10 M rows, about 3 minutes, 3 GB of memory and 0.8 GB of disk
    .venv/bin/python bench/apply.py --rows 1000000    # a quick look
    .venv/bin/python bench/apply.py --folder /data    # the files of the version on another disk

The model has 39 fields, dimension 16 and an MLP of 400-400-400, as in `bench/train.py`, without row history or
cross layers. Each part runs in a process of its own with one thread of torch, as a scorer has by default.

- Memory: resident memory with all rows loaded, less that of the same process before, as a multiple of the rows' 76 bytes. Also
  at its peak, while pieces are loaded.
- Load: a version in pieces of 20 MB, each compared with its SHA-256, and the digest of all rows. `cat` reads the same files.
  Both start with files that aren't in the system's cache; rounds alternate.
- Deltas: 100,000 rows (`--changed`), a tenth of them new, with all dense weights. `prepare` runs beside scoring, and `apply`
  waits for the batch that is being scored; `lock` is the time for which it holds scoring up.
- Latency of predictions of 50 candidates in a loop with pauses, without deltas and with four deltas a second of 2,500 rows, in
  turns: what deltas add to the latency of an answer.

The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from model.batch import FeatureBatch
from model.digest import dense_hash, digest_sum, row_hashes
from model.learner import Learner
from model.predictor import Predictor
from model.rows import ModelDelta, Rows
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelSettings
from state.manifest import Manifest
from state.pieces import Piece, piece_rows
from state.settings import SnapshotSettings
from state.store import SnapshotStore

FIELDS = 39
DIM = 16
ROW_BYTES = 8 + 4 * DIM + 4
PIECE_ROWS = piece_rows(DIM)
CANDIDATES = 50
FEATURES = FeatureSchema(fields=tuple(FieldSpec(name=f"f{i}") for i in range(FIELDS)), embedding_dim=DIM)
MODEL = ModelSettings(row_history=False, cross_layers=0)
LATENCY_S = 4.0
"""Time of one stretch of predictions, with or without deltas."""
PAUSE_S = 0.003
"""Pause between two predictions, so that they take about half of a core."""
DELTAS_EACH_S = 4
DELTA_ROWS = 2500


def dense_weights(seed: int) -> dict[str, torch.Tensor]:
    learner = Learner(FEATURES, MODEL.model_copy(update={"seed": seed}), device="cpu")
    return {name: each for name, each in learner.serving_state().items() if name not in ("keys", "embedding", "first_order")}


class Made:
    """Rows that can be made again: the keys of a number of rows, and weights by a seed."""

    def __init__(self, rows: int) -> None:
        self.keys = torch.from_numpy(np.random.default_rng(0).permutation(rows).astype(np.int64))
        for factor in (-4658895280553007687, -7723592293110705685):
            self.keys.bitwise_xor_(self.keys >> 29).mul_(factor)

    def pieces(self) -> Iterator[Rows]:
        for number, keys in enumerate(torch.split(self.keys, PIECE_ROWS)):
            generator = torch.Generator().manual_seed(number)
            yield Rows(keys, torch.randn(len(keys), DIM, generator=generator), torch.randn(len(keys), generator=generator))


def version_store(folder: Path) -> SnapshotStore:
    return SnapshotStore(SnapshotSettings(url=str(folder)))


def write_version(folder: Path, rows: int) -> None:
    version_store(folder).write_version(
        Manifest(version=1, features=FEATURES.model_dump(mode="json"), model=MODEL.model_dump(mode="json")),
        dense=dense_weights(0),
        small=None,
        pieces=(Piece(piece, {}) for piece in Made(rows).pieces()),
    )


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def forget(files: list[Path]) -> None:
    """Takes files out of the system's cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def cat_s(files: list[Path]) -> float:
    """Seconds that `cat` takes for files that aren't in the system's cache."""
    forget(files)
    began = time.perf_counter()
    subprocess.run(["cat", *map(str, files)], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def load(folder: Path) -> Predictor:
    reader = version_store(folder).read(1)
    predictor = Predictor(FEATURES, MODEL, reader.dense(), expected_rows=reader.row_count, device="cpu")
    for rows in reader.rows():
        predictor.add(rows)
    predictor.ready()
    return predictor


def measure_load(folder: Path, rows: int) -> dict[str, float]:
    """Time and memory of loading, in a process that has loaded nothing yet."""
    files = files_of(folder)
    version_store(folder).read(1).dense()  # what is imported and started at the first use
    forget(files)
    before = psutil.Process().memory_info().rss
    began, cpu = time.perf_counter(), time.process_time()
    predictor = load(folder)
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    payload = rows * ROW_BYTES
    now, peak = psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    intact = [*predictor.scrub()][-1]
    assert intact
    return {
        "load_s": took,
        "load_cpu_s": cpu,
        "memory": (now - before) / payload,
        "memory_peak": (peak - before) / payload,
        "scrub_s": time.perf_counter() - began,
    }


class Trainer:
    """Makes deltas, and knows the digest that results from them."""

    def __init__(self, rows: int, digest: int) -> None:
        made = Made(rows)
        self.keys = made.keys
        self.hashes = torch.cat([row_hashes(piece) for piece in made.pieces()])
        self.digest = digest
        self._dense_hash = dense_hash(dense_weights(0))
        self._random = np.random.default_rng(1)
        self._denses = [dense_weights(seed) for seed in range(1, 4)]

    def delta(self, count: int, new_share: float) -> ModelDelta:
        """New weights of `count` rows, this share of them rows with new keys, and new dense weights."""
        new = int(count * new_share)
        which = torch.from_numpy(self._random.choice(len(self.keys), count - new, replace=False))
        fresh = torch.from_numpy(self._random.integers(-(1 << 63), (1 << 63) - 1, new))
        weights = self._random.standard_normal((count, DIM + 1), np.float32)
        rows = Rows(
            torch.cat((self.keys[which], fresh)),
            torch.from_numpy(weights[:, :DIM].copy()),
            torch.from_numpy(weights[:, DIM].copy()),
        )
        hashes = row_hashes(rows)
        dense = self._denses[0]
        self._denses = [*self._denses[1:], dense]
        hashed = dense_hash(dense)
        self.digest += digest_sum(hashes) - digest_sum(self.hashes[which]) + hashed - self._dense_hash
        self.digest %= 1 << 64
        self._dense_hash = hashed
        self.hashes[which] = hashes[: len(which)]
        return ModelDelta(rows, torch.empty(0, dtype=torch.int64), dense, self.digest)


class Scoring:
    """Scores requests one after another in a thread, with pauses, and notes how long each took."""

    def __init__(self, predictor: Predictor, keys: torch.Tensor) -> None:
        self._predictor = predictor
        random = np.random.default_rng(2)
        index = np.minimum(random.zipf(1.1, (200, CANDIDATES, FIELDS)) - 1, len(keys) - 1)
        none = np.empty(0, np.int64)
        self._batches = [FeatureBatch(each, none, np.zeros(1, np.int64), lists=0) for each in keys.numpy()[index]]
        self.took_ms: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Scoring:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(PAUSE_S):
            began = time.perf_counter()
            self._predictor.predict(self._batches[len(self.took_ms) % len(self._batches)])
            self.took_ms.append((time.perf_counter() - began) * 1000)


class LockTimes:
    """Stands in for a predictor's lock, and notes for how long it is held by deltas."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._began = 0.0
        self.held_ms: list[float] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.held_ms.append((time.perf_counter() - self._began) * 1000)
        self._lock.release()


def measure_deltas(folder: Path, rows: int, changed: int) -> dict[str, float]:
    """Large deltas beside scoring, then latencies without and with small ones."""
    predictor = load(folder)
    trainer = Trainer(rows, predictor.digest)
    prepare_ms, apply_ms, held_ms = [], [], []
    with Scoring(predictor, trainer.keys):
        for _ in range(15):
            delta = trainer.delta(changed, 0.1)
            time.sleep(0.1)
            began = time.perf_counter()
            prepared = predictor.prepare(delta)
            between = time.perf_counter()
            times = LockTimes(predictor._reading)
            predictor._reading = times  # type: ignore[assignment]
            predictor.apply(prepared)
            ended = time.perf_counter()
            predictor._reading = times._lock
            prepare_ms.append((between - began) * 1000)
            apply_ms.append((ended - between) * 1000)
            held_ms.append(max(times.held_ms))
    without: list[float] = []
    beside: list[float] = []
    for _ in range(3):
        for latencies, deltas in ((without, False), (beside, True)):
            prepared_deltas = [trainer.delta(DELTA_ROWS, 0.02) for _ in range(int(LATENCY_S * DELTAS_EACH_S) if deltas else 0)]
            with Scoring(predictor, trainer.keys) as scoring:
                for delta in prepared_deltas:
                    time.sleep(1 / DELTAS_EACH_S)
                    predictor.apply(predictor.prepare(delta))
                if not deltas:
                    time.sleep(LATENCY_S)
            latencies += scoring.took_ms[20:]
    intact = [*predictor.scrub()][-1]
    assert intact
    total = [one + other for one, other in zip(prepare_ms, apply_ms, strict=True)]
    return {
        "delta_ms": statistics.median(total),
        "delta_worst_ms": max(total),
        "prepare_ms": statistics.median(prepare_ms),
        "apply_ms": statistics.median(apply_ms),
        "lock_ms": statistics.median(held_ms),
        "predict_p50_ms": float(np.quantile(without, 0.5)),
        "predict_p99_ms": float(np.quantile(without, 0.99)),
        "predict_p50_ms_with_deltas": float(np.quantile(beside, 0.5)),
        "predict_p99_ms_with_deltas": float(np.quantile(beside, 0.99)),
    }


def in_a_process(part: str, folder: Path, rows: int, changed: int) -> dict[str, float]:
    """One part of the benchmark in a process of its own."""
    options = ["--part", part, "--rows", str(rows), "--changed", str(changed), "--folder", str(folder)]
    done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{part}: {done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    click.echo(f"{part}: " + "  ".join(f"{name} {value:.3f}" for name, value in figures.items()), err=True)
    return figures


@click.command()
@click.option("--rows", default=10_000_000, show_default=True)
@click.option("--changed", default=100_000, show_default=True, help="Rows of a delta.")
@click.option("--rounds", default=3, show_default=True, help="Times that the files are loaded and read by cat.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the files are written.")
@click.option("--part", type=click.Choice(["load", "deltas"]), hidden=True)
def main(rows: int, changed: int, rounds: int, folder: Path | None, part: str | None) -> None:
    """Measure and print; the last line is one JSON object."""
    if part is not None:
        assert folder is not None
        torch.set_num_threads(1)
        found = measure_load(folder, rows) if part == "load" else measure_deltas(folder, rows, changed)
        click.echo(json.dumps(found))
        return
    warn_if_busy()
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=folder) as made:
        write_version(Path(made), rows)
        files = files_of(Path(made))
        loads, cats = [], []
        for _ in range(rounds):
            cats.append(cat_s(files))
            click.echo(f"cat: {cats[-1]:.3f} s", err=True)
            loads.append(in_a_process("load", Path(made), rows, changed))
        deltas = in_a_process("deltas", Path(made), rows, changed)
    medians = {name: round(statistics.median(each[name] for each in loads), 3) for name in loads[0]}
    cat = statistics.median(cats)
    report(
        value=round(medians["load_s"] / cat, 2),
        unit="times the time of cat, less is better",
        rows=rows,
        changed=changed,
        cat_s=round(cat, 3),
        **medians,
        **{name: round(value, 3) for name, value in deltas.items()},
        p99_ratio=round(deltas["predict_p99_ms_with_deltas"] / deltas["predict_p99_ms"], 2),
    )


if __name__ == "__main__":
    main()
