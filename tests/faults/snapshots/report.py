"""Reads the file of results, adds them up, and writes the table in docs/reliability.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec

from tests.faults.report import put_between
from tests.faults.snapshots.play import Result

__all__ = ["BEGIN", "END", "read_results", "table", "totals", "write_table"]

BEGIN, END = "<!-- faults: made by `make faults FAMILY=snapshots` -->", "<!-- end of faults of snapshots -->"


def read_results(path: Path) -> list[Result]:
    """All results so far; none when there is no file. A line that a killed run left incomplete is skipped."""
    results = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            results.append(msgspec.json.decode(line, type=Result))
        except msgspec.DecodeError:
            continue
    return results


def totals(results: Sequence[Result]) -> str:
    """All results added up. A skipped run doesn't count as a run."""
    made = [result for result in results if not result.skipped]
    skipped = len(results) - len(made)
    return (
        f"{len(made)} runs of {len({result.kind for result in made})} kinds; {sum(result.points for result in made):,} points "
        f"replayed, {sum(result.answers for result in made):,} answers computed again: "
        f"{sum(bool(result.problems) for result in made)} runs with problems" + (f", {skipped} skipped" if skipped else "")
    )


def table(results: Sequence[Result], commit: str) -> str:
    """A Markdown table with a line for each kind of fault, and the commit that the results are of."""
    by_kind: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if not result.skipped:
            by_kind[result.kind].append(result)
    lines = [
        "| fault | runs | with problems | points | answers | median healing, s | longest, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, runs in by_kind.items():
        times = [run.heal_s for run in runs if run.heal_s is not None]
        middle, most = (f"{median(times):.1f}", f"{max(times):.1f}") if times else ("", "")
        wrong, points, answers = (
            sum(map(int, each)) for each in zip(*((bool(r.problems), r.points, r.answers) for r in runs), strict=True)
        )
        lines.append(f"| {kind} | {len(runs)} | {wrong} | {points} | {answers} | {middle} | {most} |")
    missing = [f"Skipped: {reason}." for reason in sorted({result.skipped for result in results if result.skipped})]
    return "\n".join([*lines, "", " ".join([f"{totals(results)}. Code of commit {commit}.", *missing])])


def write_table(results: Sequence[Result], page: Path, commit: str) -> None:
    """Put the table between the page's two marks."""
    put_between(page, BEGIN, END, table(results, commit))
