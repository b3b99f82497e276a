"""Runs faults of snapshots by seed; see the package's docstring."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import msgspec

from deploy.settings import LocalKafkaSettings
from tests.faults.code import SNAPSHOTS, code_now, commit_now
from tests.faults.snapshots.broker import FaultKafka
from tests.faults.snapshots.kinds import KINDS, kind_named
from tests.faults.snapshots.play import Result
from tests.faults.snapshots.report import read_results, totals, write_table
from tests.faults.snapshots.turns import work

RESULTS = Path(".headrace/faults-snapshots.jsonl")
PAGE = Path("docs/reliability.md")


@click.command()
@click.option("--runs", default=len(KINDS), show_default=True, help="Number of runs; the kinds take turns.")
@click.option("--seed", default=1, show_default=True, help="Seed of the first run; each run has the next seed.")
@click.option("--kind", "names", multiple=True, help="Only this kind; may be repeated.")
@click.option("--jobs", default=1, show_default=True, help="Concurrent runs, each in a process of its own.")
@click.option("--results", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="File to append to.")
@click.option("--list", "listing", is_flag=True, help="Only list the kinds.")
@click.option("--write-docs", is_flag=True, help=f"Write all results of the current code into {PAGE}.")
def main(runs: int, seed: int, names: tuple[str, ...], jobs: int, results: Path, listing: bool, write_docs: bool) -> None:
    """Run RUNS faults of versions, deltas and replicas, and compare every scorer with a replay after each.

    Runs that the results file has for the same code are skipped. Results of other code stay in the file and aren't counted.
    The exit code is 1 if any result has a problem.
    """
    kinds = [kind_named(name) for name in names] or KINDS
    if listing:
        for kind in kinds:
            click.echo(kind.name)
        return
    results.parent.mkdir(parents=True, exist_ok=True)
    code = code_now(SNAPSHOTS)
    done = {(result.kind, result.seed) for result in read_results(results) if result.code == code}
    turns = [(kinds[number % len(kinds)].name, number) for number in range(seed, seed + runs)]
    turns = [turn for turn in turns if turn not in done]
    folder = Path(tempfile.mkdtemp(prefix="headrace-faults-"))
    failed = False
    try:
        with FaultKafka(LocalKafkaSettings(dir=folder / "kafka", start_timeout_ms=180_000, heap_mb=512)) as kafka:
            context = multiprocessing.get_context("spawn")  # a fresh interpreter: no thread or client is shared
            tasks: Any = context.Queue()
            answers: Any = context.Queue()
            for turn in turns:
                tasks.put(turn)
            workers = [
                context.Process(target=work, args=(tasks, answers, kafka.bootstrap_servers, kafka.dir, folder / "runs", code))
                for _ in range(jobs)
            ]
            for worker in workers:
                tasks.put(None)
                worker.start()
            try:
                for number in range(len(turns)):
                    result = msgspec.json.decode(answers.get(timeout=400), type=Result)
                    with results.open("ab") as file:
                        file.write(msgspec.json.encode(result) + b"\n")
                    failed |= bool(result.problems)
                    _print(result, number + 1, len(turns))
            finally:
                for worker in workers:
                    worker.terminate()
                    worker.join()
    finally:
        if failed:
            click.echo(f"the broker's data and the failed runs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    current = [result for result in read_results(results) if result.code == code]
    if write_docs:
        write_table(current, PAGE, commit_now(SNAPSHOTS))
    click.echo(f"{totals(current)}; {len(turns)} of them new; code {code} (commit {commit_now(SNAPSHOTS)})")
    sys.exit(any(result.problems for result in current))


def _print(result: Result, number: int, of: int) -> None:
    word = "FAILED" if result.problems else "skipped" if result.skipped else "exact"
    healed = "" if result.heal_s is None else f", healed in {result.heal_s:.1f} s"
    how = result.skipped or f"{result.seconds:.0f} s{healed}; {'; '.join(result.happened)}"
    click.echo(f"{number:4d}/{of}  seed {result.seed}  {word}  {result.kind} ({how})")
    for problem in result.problems[:5]:
        click.echo(f"         {problem}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the broker is stopped
    main()
