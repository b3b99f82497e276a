"""The table in docs/reliability.md has the form that the report writes."""

from __future__ import annotations

from pathlib import Path

from tests.faults.code import ROOT
from tests.faults.play import Result
from tests.faults.report import BEGIN, END, table, write_table


def result(kind: str = "a kill", **changes: object) -> Result:
    known = {"seed": 1, "lost": 0, "doubled": 0, "wrong": 0, "recovery_s": 2.0, "restarts": 1, "events": 1_000, "seconds": 9.0}
    return Result(kind, problems=[], **(known | changes))  # type: ignore[arg-type]


def test_the_page_has_the_tables_header() -> None:
    header = table([result()], "0000000").splitlines()[0]
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert page.split(BEGIN)[1].split(END)[0].strip().splitlines()[0] == header


def test_a_line_for_each_kind_and_the_totals(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nearlier table\n{END}\nafter\n")
    runs = [result(recovery_s=2.0, lost=1), result(recovery_s=4.0, hold_ms=300), result("a cut", skipped="no root")]
    write_table(runs, page, "abc1234")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "earlier table" not in text
    assert "| a kill | 2 | 1 | 0 | 0 | 3.0 | 4.0 |" in text
    assert "| a cut |" not in text
    assert "2 runs of 1 kinds, 2,000 events: 1 lost" in text
    assert "1 skipped. The hold was the whole window in 0 runs, 0 in 1, and 300 ms or 3 s in the others." in text
    assert "Code of commit abc1234. Skipped: no root." in text
