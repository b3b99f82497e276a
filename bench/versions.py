"""Compares this checkout with another revision of it: the same benchmarks, in interleaved pairs of runs.

    .venv/bin/python bench/versions.py 0.1.0                     # join, train and score: about half an hour
    .venv/bin/python bench/versions.py HEAD~20 --only join       # about 8 minutes
    .venv/bin/python bench/versions.py HEAD~20 --only train --pairs 3

Each revision runs on its own code, with this checkout's `.venv`: for the join its own `bench/join.py` without peers, for
training and scoring the programs of `bench/versions_turns.py`, which take turns. A pair is one run of each revision, and the
order changes from pair to pair. The result of a figure is the median, over the pairs, of the ratio within a pair: above 1 this
checkout is better.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from bench.versions_turns import PROGRAMS, in_turns

ROOT = Path(__file__).resolve().parents[1]

JOIN = ("bench/join.py", "--peer", "none", "--impressions", "450000")
FIGURES = {
    "join": {"value": True, "cpu_us_per_event": False},
    **{name: program.figures for name, program in PROGRAMS.items()},
}
"""Benchmark → its figures → whether more is better."""


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


def join(checkout: Path) -> dict[str, float]:
    """Run a checkout's own benchmark of the join; returns the figures of its last line."""
    # Workers are started by module name. PYTHONPATH comes before this checkout, which is installed in `.venv`.
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, *JOIN], cwd=checkout, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{checkout}: {' '.join(JOIN)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    return {name: float(figures[name]) for name in FIGURES["join"]}


@click.command()
@click.argument("revision")
@click.option("--only", type=click.Choice(list(FIGURES)), multiple=True, help="Which benchmarks; all of them by default.")
@click.option("--pairs", type=click.IntRange(min=1), default=7, show_default=True)
def main(revision: str, only: tuple[str, ...], pairs: int) -> None:
    """Measure this checkout against REVISION; the last line is one JSON object with the median ratios."""
    warn_if_busy()
    medians: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="headrace-versions-") as folder:
        other = checked_out(revision, Path(folder))
        for name in only or tuple(FIGURES):
            ratios: dict[str, list[float]] = {figure: [] for figure in FIGURES[name]}
            for pair in range(pairs):
                order = (ROOT, other) if pair % 2 == 0 else (other, ROOT)
                found = {each: join(each) for each in order} if name == "join" else in_turns(PROGRAMS[name], order)
                for figure, more_is_better in FIGURES[name].items():
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
