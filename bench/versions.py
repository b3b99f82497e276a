"""Compares this checkout with another revision of it: the same benchmarks, in interleaved pairs of runs.

    .venv/bin/python bench/versions.py 0.1.0                     # join, train and score: about half an hour
    .venv/bin/python bench/versions.py HEAD~20 --only join       # about 8 minutes
    .venv/bin/python bench/versions.py HEAD~20 --only train --pairs 3

Each revision runs its own `bench/join.py`, `bench/train.py` and `bench/score.py` on its own code, with this checkout's `.venv`.
A pair is one run of each revision, and the order changes from pair to pair. The result of a figure is the median, over the
pairs, of the ratio within a pair: above 1 this checkout is better. Peers are left out where the benchmark allows it.
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
    "train": Benchmark(("bench/train.py", "--rounds", "1", "--seconds", "1.5"), {"batch_512": True, "batch_4096": True}),
    "score": Benchmark(("bench/score.py", "--no-peer", "--quick"), {"p50_ms": False, "p99_ms": False, "max_rate_per_s": True}),
}


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


@click.command()
@click.argument("revision")
@click.option("--only", type=click.Choice(list(BENCHMARKS)), multiple=True, help="Which benchmarks; all of them by default.")
@click.option("--pairs", type=click.IntRange(min=1), default=7, show_default=True)
def main(revision: str, only: tuple[str, ...], pairs: int) -> None:
    """Measure this checkout against REVISION; the last line is one JSON object with the median ratios."""
    warn_if_busy()
    medians: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="headrace-versions-") as folder:
        other = checked_out(revision, Path(folder))
        for name in only or tuple(BENCHMARKS):
            benchmark = BENCHMARKS[name]
            ratios: dict[str, list[float]] = {figure: [] for figure in benchmark.figures}
            for pair in range(pairs):
                order = (ROOT, other) if pair % 2 == 0 else (other, ROOT)
                found = {checkout: run(checkout, benchmark) for checkout in order}
                for figure, more_is_better in benchmark.figures.items():
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
