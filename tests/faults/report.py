"""The results' file, its totals, and the table in docs/reliability.md."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median

import msgspec

from tests.faults.run import Result

__all__ = ["read_results", "table", "totals", "write_table"]

BEGIN, END = "<!-- faults: made by `make faults` -->", "<!-- end of faults -->"


def read_results(path: Path) -> list[Result]:
    """All results so far; none when there is no file. A line that a killed run left half written is left out."""
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
    """The last line: everything added up."""
    failed = sum(bool(result.problems) for result in results)
    kinds = len({result.kind for result in results})
    return (
        f"{len(results)} runs of {kinds} kinds, {sum(result.events for result in results)} events: "
        f"{sum(result.lost for result in results)} lost, {sum(result.doubled for result in results)} doubled, "
        f"{sum(result.wrong for result in results)} wrong, {failed} runs with problems"
    )


def table(results: list[Result], commit: str) -> str:
    """A line a kind, as Markdown, and which code it is of."""
    by_kind: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_kind[result.kind].append(result)
    lines = [
        "| fault | runs | lost | doubled | wrong | recovery s, median | most |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, runs in by_kind.items():
        times = [run.recovery_s for run in runs if run.recovery_s is not None]
        middle, most = (f"{median(times):.1f}", f"{max(times):.1f}") if times else ("", "")
        counts = [sum(getattr(run, count) for run in runs) for count in ("lost", "doubled", "wrong")]
        lines.append(f"| {kind} | {len(runs)} | {counts[0]} | {counts[1]} | {counts[2]} | {middle} | {most} |")
    fake, sampled = sum(run.policy == "fnw" for run in results), sum(run.negative_rate < 1 for run in results)
    which = f"Label policy `fnw` in {fake} of them, half of the negatives left out in {sampled}. Code of commit {commit}."
    return "\n".join([*lines, "", f"{totals(results)}. {which}"])


def write_table(results: list[Result], page: Path, commit: str) -> None:
    """Put the table between the page's two marks."""
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{table(results, commit)}\n\n{END}{after}")
