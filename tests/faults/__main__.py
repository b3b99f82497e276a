"""Runs faults by seed; see the package's docstring."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from tests.faults.clusters import Clusters
from tests.faults.code import code_now, commit_now
from tests.faults.kinds import KINDS, kind_named
from tests.faults.play import Result, play
from tests.faults.report import read_results, totals, write_table

RESULTS = Path(".headrace/faults.jsonl")
PAGE = Path("docs/reliability.md")


@click.command()
@click.option("--runs", default=61, show_default=True, help="Number of runs; the kinds take turns.")
@click.option("--seed", default=1, show_default=True, help="Seed of the first run; each run has the next seed.")
@click.option("--kind", "names", multiple=True, help="Only this kind; may be repeated.")
@click.option("--jobs", default=1, show_default=True, help="Concurrent runs. Only the shared cluster has several at once.")
@click.option("--results", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="File to append to.")
@click.option("--list", "listing", is_flag=True, help="Only list the kinds.")
@click.option("--write-docs", is_flag=True, help=f"Write all results of the current code into {PAGE}.")
def main(runs: int, seed: int, names: tuple[str, ...], jobs: int, results: Path, listing: bool, write_docs: bool) -> None:
    """Run RUNS faults and check the join's topics after each. Runs that the results file has for the same code are skipped.

    Results of other code stay in the file and aren't counted. The exit code is 1 if any result has a problem.
    """
    kinds = [kind_named(name) for name in names] or KINDS
    if listing:
        for kind in kinds:
            click.echo(kind.name)
        return
    results.parent.mkdir(parents=True, exist_ok=True)
    code = code_now()
    done = {(result.kind, result.seed) for result in read_results(results) if result.code == code}
    turns = [(kinds[number % len(kinds)], number) for number in range(seed, seed + runs)]
    turns = [(kind, number) for kind, number in turns if (kind.name, number) not in done]
    made: list[Result] = []
    folder = Path(tempfile.mkdtemp(prefix="headrace-faults-"))
    lock = threading.Lock()
    try:
        with Clusters(folder / "kafka") as clusters:

            def work() -> None:
                while True:
                    with lock:
                        if not turns:
                            return
                        # The first turn whose cluster is free, if there is one.
                        index = next((index for index, turn in enumerate(turns) if not clusters.busy(turn[0].cluster)), 0)
                        kind, number = turns.pop(index)
                    result = play(kind, number, clusters, folder / "runs", code=code)
                    with lock:
                        if code_now() != code:
                            turns.clear()
                            raise click.ClickException(
                                "the code was changed during a run, so that this run isn't counted; start again"
                            )
                        with results.open("ab") as file:
                            file.write(msgspec.json.encode(result) + b"\n")
                        made.append(result)
                        _print(result)

            with ThreadPoolExecutor(jobs) as pool:
                try:
                    for outcome in [pool.submit(work) for _ in range(jobs)]:
                        outcome.result()
                except BaseException:
                    turns.clear()  # current runs finish, and no further run begins
                    raise
    finally:
        _clean(folder, keep=any(result.problems for result in made))
    found = read_results(results)
    current = [result for result in found if result.code == code]
    if write_docs:
        write_table(current, PAGE, commit_now())
    _show(current)
    click.echo(totals(current))
    click.echo(
        f"{len(made)} of them new; code {code} (commit {commit_now()}); {len(found) - len(current)} of other code, not counted"
    )
    sys.exit(any(result.problems for result in current))


def _print(result: Result) -> None:
    recovery = "" if result.recovery_s is None else f", back in {result.recovery_s:.1f} s"
    word = "FAILED" if result.problems else "skipped" if result.skipped else "exact"
    how = (
        f"hold {result.hold_ms} ms, rate {result.negative_rate:g}, {result.seconds:.0f} s, {result.restarts} restarts{recovery}"
    )
    click.echo(f"{result.seed:5d}  {word}  {result.kind} ({result.skipped or how})")
    for problem in result.problems[:5]:
        click.echo(f"         {problem}")


def _clean(folder: Path, *, keep: bool) -> None:
    """Remove the folder of the runs. Small disks that are still mounted in it are unmounted first."""
    mounts = Path("/proc/mounts")
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        if (mounted := line.split()[1]).startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", mounted], check=False)
    if keep:
        click.echo(f"the brokers' data and the failed runs are in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _show(found: list[Result]) -> None:
    shown = Table("fault", "runs", "problems", "recovery s, most")
    for name in dict.fromkeys(result.kind for result in found):
        runs = [result for result in found if result.kind == name]
        most = max((result.recovery_s for result in runs if result.recovery_s is not None), default=None)
        shown.add_row(name, str(len(runs)), str(sum(bool(run.problems) for run in runs)), "" if most is None else f"{most:.1f}")
    Console().print(shown)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that brokers and workers are stopped
    main()
