"""Compares this checkout with another revision of it: the same benchmarks, in interleaved pairs of runs.

    .venv/bin/python bench/versions.py 0.1.0                     # join, train and score: about half an hour
    .venv/bin/python bench/versions.py HEAD~20 --only join       # about 8 minutes
    .venv/bin/python bench/versions.py HEAD~20 --only train --pairs 3

Each revision runs its own `bench/join.py`, `bench/train.py` and `bench/score.py` on its own code, with this checkout's `.venv`.
A pair is one run of each revision, and the order changes from pair to pair. The result of a figure is the median, over the
pairs, of the ratio within a pair: above 1 this checkout is better. Peers are left out where the benchmark allows it.

For `train` both processes of a pair live side by side and take turns of a third of a second. On a virtual machine whose speed
changes from second to second, single ratios of whole runs went from 0.5 to 1.4; with turns they go from 0.9 to 1.1.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark that both revisions run.

    command  script and arguments
    figures  keys of the benchmark's JSON object → whether more is better
    """

    command: tuple[str, ...]
    figures: dict[str, bool]


BENCHMARKS = {
    "join": Benchmark(
        ("bench/join.py", "--peer", "none", "--impressions", "450000"), {"value": True, "cpu_us_per_event": False}
    ),
    "score": Benchmark(("bench/score.py", "--no-peer", "--quick"), {"p50_ms": False, "p99_ms": False, "max_rate_per_s": True}),
}

TRAIN_ROWS = (512, 4096)
TURNS = 16
"""Turns of each revision at a batch size, about a third of a second each."""

# Uses what `bench/train.py` has had under the same names since 0.1.0.
TRAIN_WORKER = f"""
import sys, time
import torch
from bench import train
torch.set_num_threads(1)
pool = train.Pool(1_000_000, train.POOL_ROWS, train.CLICK_RATE)
step = train.headrace(pool)
turns = {{rows: train.stretch(step, rows, 0.3) for rows in {TRAIN_ROWS}}}
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    examples = turns[int(line)]()
    print(examples / (time.perf_counter() - began), flush=True)
"""


def checked_out(revision: str, folder: Path) -> Path:
    """The files of a revision, in a new folder.

    Raises:
        click.ClickException: git doesn't know the revision.
    """
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise click.ClickException(f"revision {revision}: git archive says: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder


def run(checkout: Path, benchmark: Benchmark) -> dict[str, float]:
    """Run a benchmark in a checkout; returns the figures of its last line."""
    # Workers are started by module name. PYTHONPATH comes before this checkout, which is installed in `.venv`.
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [sys.executable, *benchmark.command], cwd=checkout, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise click.ClickException(
            f"{checkout}: {' '.join(benchmark.command)} ended with {done.returncode}:\n{done.stderr[-3000:]}"
        )
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    return {name: float(figures[name]) for name in benchmark.figures}


class TrainWorker:
    """A process that trains on the code of a checkout, a turn at a time."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self._process = subprocess.Popen(
            [sys.executable, "-c", TRAIN_WORKER],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def turn(self, rows: int) -> float:
        """Examples a second of one turn with batches of `rows`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{rows}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise click.ClickException(f"{self.checkout}: training ended with {self._process.wait()}; its error is above")
        return answer


def train_in_turns(checkouts: tuple[Path, Path]) -> dict[Path, dict[str, float]]:
    """The median rate of each checkout at each batch size, over turns that alternate."""
    workers = [TrainWorker(checkout) for checkout in checkouts]
    rates: dict[Path, dict[str, float]] = {checkout: {} for checkout in checkouts}
    for rows in TRAIN_ROWS:
        turns: dict[Path, list[float]] = {checkout: [] for checkout in checkouts}
        for number in range(TURNS):
            for worker in workers if number % 2 == 0 else workers[::-1]:
                turns[worker.checkout].append(worker.turn(rows))
        for checkout, values in turns.items():
            rates[checkout][f"batch_{rows}"] = statistics.median(values)
    for worker in workers:
        worker.end()
    return rates


@click.command()
@click.argument("revision")
@click.option(
    "--only", type=click.Choice(["train", *BENCHMARKS]), multiple=True, help="Which benchmarks; all of them by default."
)
@click.option("--pairs", type=click.IntRange(min=1), default=7, show_default=True)
def main(revision: str, only: tuple[str, ...], pairs: int) -> None:
    """Measure this checkout against REVISION; the last line is one JSON object with the median ratios."""
    warn_if_busy()
    medians: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="headrace-versions-") as folder:
        other = checked_out(revision, Path(folder))
        for name in only or ("join", "train", "score"):
            figures = dict.fromkeys((f"batch_{rows}" for rows in TRAIN_ROWS), True)
            if name != "train":
                figures = BENCHMARKS[name].figures
            ratios: dict[str, list[float]] = {figure: [] for figure in figures}
            for pair in range(pairs):
                order = (ROOT, other) if pair % 2 == 0 else (other, ROOT)
                if name == "train":
                    found = train_in_turns(order)
                else:
                    found = {checkout: run(checkout, BENCHMARKS[name]) for checkout in order}
                for figure, more_is_better in figures.items():
                    here, there = found[ROOT][figure], found[other][figure]
                    ratios[figure].append(here / there if more_is_better else there / here)
                    click.echo(f"{name} {figure:<18}{here:>12,.1f} here {there:>12,.1f} there   ratio {ratios[figure][-1]:.3f}")
            for figure, values in ratios.items():
                medians[f"{name}_{figure}"] = round(statistics.median(values), 3)
                click.echo(f"{name} {figure:<18} median of {pairs} pairs {medians[f'{name}_{figure}']:.3f}")
    report(
        benchmark="versions",
        value=min(medians.values()),
        unit="ratio, above 1 is better",
        revision=revision,
        pairs=pairs,
        **medians,
    )


if __name__ == "__main__":
    main()
