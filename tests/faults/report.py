"""Reads the file of results, adds the results up, and writes the table in docs/reliability.md."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median

import msgspec

from tests.faults.play import Result
from tests.faults.stream import WINDOW_MS

__all__ = ["put_between", "read_results", "table", "totals", "write_table"]

BEGIN, END = "<!-- faults: made by `make faults` -->", "<!-- end of faults -->"


def read_results(path: Path) -> list[Result]:
    """All results so far; none when there is no file. A line that a killed run left incomplete is skipped."""
    if not path.exists():
        return []
    results = []
    for line in path.read_bytes().splitlines():
        try:
            results.append(msgspec.json.decode(line, type=Result))
        except msgspec.DecodeError:
            continue
    return results


def totals(results: list[Result]) -> str:
    """The last line: all results added up. A skipped run doesn't count as a run."""
    results, skipped = [result for result in results if not result.skipped], sum(bool(result.skipped) for result in results)
    failed = sum(bool(result.problems) for result in results)
    kinds = len({result.kind for result in results})
    return (
        f"{len(results)} runs of {kinds} kinds, {sum(result.events for result in results):,} events: "
        f"{sum(result.lost for result in results)} lost, {sum(result.doubled for result in results)} doubled, "
        f"{sum(result.wrong for result in results)} wrong, {failed} runs with problems"
        + (f", {skipped} skipped" if skipped else "")
    )


def table(results: list[Result], commit: str) -> str:
    """A Markdown table with a line for each kind of fault, and the commit that the results are of."""
    by_kind: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.skipped:
            continue
        by_kind[result.kind].append(result)
    lines = [
        "| fault | runs | lost | doubled | wrong | median recovery, s | longest, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, runs in by_kind.items():
        times = [run.recovery_s for run in runs if run.recovery_s is not None]
        middle, most = (f"{median(times):.1f}", f"{max(times):.1f}") if times else ("", "")
        counts = [sum(getattr(run, count) for run in runs) for count in ("lost", "doubled", "wrong")]
        lines.append(f"| {kind} | {len(runs)} | {counts[0]} | {counts[1]} | {counts[2]} | {middle} | {most} |")
    made = [result for result in results if not result.skipped]
    window, none = sum(result.hold_ms >= WINDOW_MS for result in made), sum(not result.hold_ms for result in made)
    sampled = sum(run.negative_rate < 1 for run in made)
    which = (
        f"The hold was the whole window in {window} runs, 0 in {none}, and 300 ms or 3 s in the others. Some negatives were "
        f"left out in {sampled} runs. Code of commit {commit}."
    )
    missing = [f"Skipped: {reason}." for reason in sorted({result.skipped for result in results if result.skipped})]
    return "\n".join([*lines, "", " ".join([f"{totals(results)}. {which}", *missing])])


def write_table(results: list[Result], page: Path, commit: str) -> None:
    """Put the table between the page's two marks."""
    put_between(page, BEGIN, END, table(results, commit))


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page."""
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
