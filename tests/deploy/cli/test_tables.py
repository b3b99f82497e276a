"""What the command line prints at any width: nothing is cut, and what says which record it is stays whole on its line."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.cli import tables
from deploy.cli.snapshot_view import print_version, print_versions
from deploy.cli.tables import print_pairs, print_table
from state.manifest import Manifest

GATE = "promoted: window calibration 1.002 in [0.8, 1.25]; log loss 0.3456 against the champion's 0.3455 (+0.0 %, allowed +2 %)"
VERSIONS: dict[str, Any] = {
    "versions": [
        {
            "version": 18_123 + number,
            "tags": ["champion", "good"] if number == 2 else ["good"],
            "aliases": [],
            "tagged": {},
            "kind": "full",
            "examples_seen": 12_345_678 + number * 1_000,
            "metrics": {"window_log_loss": 0.3456, "window_auc": 0.7321, "window_calibration": 1.0023},
            "bytes": 123_400_000,
            "created_at_ms": 1_795_752_518_655 + number * 5_000,
            "gate": GATE,
            "in_store": True,
        }
        for number in range(3)
    ],
    "held": False,
    "hold_reason": "",
    "champion": 18_125,
    "since_ms": 1_795_752_518_655,
    "gate": None,
    "scorers": [],
    "canary": None,
    "deleting": [],
}

Wide = Callable[[int], None]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Wide:
    """A dumb terminal of that many columns."""

    def wide(columns: int) -> None:
        monkeypatch.setattr(tables, "on_terminal", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "dumb")

    return wide


def words(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).split()


@pytest.mark.parametrize("columns", [1, 10, 20, 40, 60, 80, 100, 120, 160, 250])
def test_every_value_of_a_list_of_versions_is_there_at_every_width(
    terminal: Wide, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    terminal(columns)
    print_versions(VERSIONS)
    out = capsys.readouterr().out
    lines = [" ".join(words(line)) for line in out.splitlines()]
    firsts = [line for line in lines if re.match(r"(version )?1812\d\b", line)]
    assert [re.search(r"1812\d", line)[0] for line in firsts] == ["18125", "18124", "18123"]  # type: ignore[index]
    found = words(out)
    for version in VERSIONS["versions"]:
        for value in (f"{version['examples_seen']:,}", "0.3456", "0.7321", "1.0023", "123.4", *GATE.split()):
            assert value in found
    assert found.count("full") == 3 and "champion," in found
    if columns >= 40:
        assert all(len(line) <= columns for line in out.splitlines() if not line.startswith("champion "))


def test_a_wide_terminal_and_a_pipe_have_one_line_for_each(terminal: Wide, capsys: pytest.CaptureFixture[str]) -> None:
    print_versions(VERSIONS)
    piped = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in piped] == ["version", "18125", "18124", "18123", "champion"]
    assert piped[1].endswith("allowed +2 %)")
    terminal(300)
    print_versions(VERSIONS)
    assert [words(line) for line in capsys.readouterr().out.splitlines()] == [words(line) for line in piped]


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_one_version_at_every_width(terminal: Wide, capsys: pytest.CaptureFixture[str], columns: int) -> None:
    terminal(columns)
    manifest = Manifest(
        version=18_125, epoch=1, created_at_ms=1_700_000_000_000, examples_seen=12_345_678, metrics={"window_auc": 0.7321}
    )
    print_version(manifest, None, None)
    out = capsys.readouterr().out
    assert re.match(r"version +18125$", out.splitlines()[0])
    assert {"12,345,678", "0.7321", "announced", "2023-11-14T22:13:20Z"} <= set(words(out))


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30)


@given(rows=st.lists(st.tuples(st.integers(0, 99_999), texts, texts), max_size=5), columns=st.integers(1, 120))
def test_nothing_is_cut_whatever_the_values(rows: list[tuple[int, str, str]], columns: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(tables, "on_terminal", lambda: True)
        patch.setattr(tables.click, "echo", lambda text="": said.append(text))
        patch.setenv("COLUMNS", str(columns))
        print_table(("version", "tags", "why"), [(str(number), tag, why) for number, tag, why in rows])
        shown = "".join(words("\n".join(said)))
        for number, tag, why in rows:
            assert str(number) in shown
            for value in (tag, why):
                for word in tables.printable(value).split():
                    assert word in shown
        said.clear()
        print_pairs([("version", number) for number, _, _ in rows] or [("version", 1)])
        assert [words(line)[-1] for line in said] == [str(number) for number, _, _ in rows] or not rows


def test_line_breaks_and_control_characters_are_shown_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("version", "why"), [("1", "a\nb \x1b[31m[bold]red")])
    print_pairs([("reason", "a\nb\x1b")])
    assert capsys.readouterr().out.splitlines() == [
        "version  why",
        r"1        a\nb \x1b[31m[bold]red",
        r"reason  a\nb\x1b",
    ]


def test_the_summary_of_a_demo_on_a_narrow_terminal(terminal: Wide, capsys: pytest.CaptureFixture[str]) -> None:
    from deploy.cli.demo import _summary
    from deploy.demo.play import DemoResult

    figures: dict[str, Any] = dict.fromkeys(DemoResult.__struct_fields__, 1)
    terminal(40)
    _summary(
        DemoResult(
            **figures | {"dataset": "movielens-100k", "peak_rss_mb": {"join": 90.0}, "served_auc": None, "versions": 18_125}
        )
    )
    out = capsys.readouterr().out
    assert out.startswith("headrace demo: movielens-100k\n") and "join 90 MB" in out
    assert "18125" in words(out)


@pytest.mark.parametrize("term", ["dumb", "xterm-256color"])
def test_a_real_terminal(term: str) -> None:
    code = "from tests.deploy.cli.test_tables import VERSIONS, print_versions; print_versions(VERSIONS)"
    main, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": "40", "TERM": term}
    with subprocess.Popen([sys.executable, "-c", code], stdout=child, env=environment) as process:
        os.close(child)
        out = b""
        while True:
            try:
                chunk = os.read(main, 4_096)
            except OSError:  # as a terminal ends on Linux
                break
            if not chunk:
                break
            out += chunk
    os.close(main)
    assert process.returncode == 0
    assert (b"\x1b" in out) == (term != "dumb")
    assert [line for line in re.sub(r"\x1b\[[0-9;]*m", "", out.decode()).splitlines() if line.startswith("version ")] == [
        "version 18125",
        "version 18124",
        "version 18123",
    ]
