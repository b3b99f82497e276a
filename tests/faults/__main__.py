"""Run faults by seed; see the package."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from tests.faults.kinds import KINDS, kind_named
from tests.faults.report import read_results, totals, write_table
from tests.faults.run import Clusters, play

RESULTS = Path(".headrace/faults.jsonl")
PAGE = Path("docs/reliability.md")


@click.command()
@click.option("--runs", default=34, show_default=True, help="The kinds take turns.")
@click.option("--seed", default=1, show_default=True, help="Of the first run; each run has the next one.")
@click.option("--kind", "names", multiple=True, help="Only this kind; may be repeated.")
@click.option("--results", default=RESULTS, show_default=True, type=click.Path(path_type=Path), help="Appended to.")
@click.option("--list", "listing", is_flag=True, help="The kinds, and nothing else.")
@click.option("--write-docs", is_flag=True, help=f"Put all results so far into {PAGE}.")
def main(runs: int, seed: int, names: tuple[str, ...], results: Path, listing: bool, write_docs: bool) -> None:
    """Hurt the join RUNS times and check its ledger each time. What is in the results' file already is not run again.

    Exit code 1 on any difference.
    """
    kinds = [kind_named(name) for name in names] or KINDS
    if listing:
        for kind in kinds:
            click.echo(kind.name)
        return
    results.parent.mkdir(parents=True, exist_ok=True)
    done = {(result.kind, result.seed) for result in read_results(results)}
    folder = Path(tempfile.mkdtemp(prefix="headrace-faults-"))
    with Clusters(folder / "kafka") as clusters:
        for index in range(runs):
            kind, number = kinds[(seed + index) % len(kinds)], seed + index
            if (kind.name, number) in done:
                continue
            result = play(kind, number, clusters, folder / "runs")
            with results.open("ab") as file:
                file.write(msgspec.json.encode(result) + b"\n")
            recovery = "" if result.recovery_s is None else f", back in {result.recovery_s:.1f} s"
            word = "FAILED" if result.problems else "exact"
            click.echo(f"{number:5d}  {word}  {result.kind} ({result.seconds:.0f} s, {result.restarts} restarts{recovery})")
            for problem in result.problems[:5]:
                click.echo(f"         {problem}")
    found = read_results(results)
    if write_docs:
        write_table(found, PAGE)
    _show(found)
    click.echo(totals(found))
    sys.exit(any(result.problems for result in found))


def _show(found: list) -> None:  # type: ignore[type-arg]
    shown = Table("fault", "runs", "problems", "recovery s, most")
    for name in dict.fromkeys(result.kind for result in found):
        runs = [result for result in found if result.kind == name]
        most = max((result.recovery_s for result in runs if result.recovery_s is not None), default=None)
        shown.add_row(name, str(len(runs)), str(sum(bool(run.problems) for run in runs)), "" if most is None else f"{most:.1f}")
    Console().print(shown)


if __name__ == "__main__":
    main()
