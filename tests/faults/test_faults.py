"""A short version of `make faults` (two kinds on the test run's Kafka), and tests of kinds, results and the table."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from tests.faults import __main__ as harness
from tests.faults.clusters import Clusters
from tests.faults.code import ROOT, code_now, deciding_files
from tests.faults.kinds import KINDS, kind_named
from tests.faults.nursery import Nursery
from tests.faults.play import Kind, Result, play
from tests.faults.report import BEGIN, END, table, totals, write_table


@pytest.mark.kafka
@pytest.mark.parametrize(("name", "seed"), [("kill -9 in a flush", 7), ("workers join and leave under load", 15)])
def test_a_fault_leaves_the_ledger_exact(kafka, tmp_path, name, seed):
    with Clusters(tmp_path) as clusters:
        clusters.adopt("shared", kafka)
        result = play(kind_named(name), seed, clusters, tmp_path / "runs")
    assert result.problems == []
    assert result.events > 800
    assert (result.lost, result.doubled, result.wrong, result.skipped) == (0, 0, 0, "")


def test_every_kind_has_a_different_name():
    assert len({kind.name for kind in KINDS}) == len(KINDS)


def test_a_nursery_that_has_ended_raises_an_error_instead_of_waiting(tmp_path):
    nursery = Nursery()
    order = (["run", "--help"], dict(os.environ), tmp_path, tmp_path / "log")
    try:
        child = nursery.start(*order)
        assert child.wait(60) == 0
        child.stdin.close()
        nursery._process.kill()
        nursery._process.wait()
        with pytest.raises(RuntimeError, match="forks workers has ended"):
            nursery.start(*order)
    finally:
        nursery.close()


def result(kind: str, seed: int, recovery_s: float | None, **counts: Any) -> Result:
    whole = {"lost": 0, "doubled": 0, "wrong": 0, "restarts": 1, "events": 10, "seconds": 1.0, "problems": [], **counts}
    return Result(kind=kind, seed=seed, recovery_s=recovery_s, **whole)


def test_the_table_has_the_sums_and_replaces_the_old_table_in_the_page(tmp_path):
    results = [
        result("cut", 1, 1.0),
        result("cut", 2, 3.0, lost=2, problems=["lost: x"]),
        result("full", 3, None, hold_ms=10_000, negative_rate=0.5),
        result("clock", 4, None, skipped="no libfaketime"),
    ]
    found = table(results, "abc1234")
    assert "| cut | 2 | 2 | 0 | 0 | 2.0 | 3.0 |" in found
    assert "| full | 1 | 0 | 0 | 0 |  |  |" in found
    assert totals(results) == "3 runs of 2 kinds, 30 events: 2 lost, 0 doubled, 0 wrong, 1 runs with problems, 1 skipped"
    assert "the whole window in 1 runs, 0 in 2, and 300 ms or 3 s in the others." in found
    assert "Some negatives were left out in 1 runs." in found
    assert "Code of commit abc1234. Skipped: no libfaketime." in found
    assert "clock" not in found
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_table(results, page, "abc1234")
    assert page.read_text() == f"before\n{BEGIN}\n\n{found}\n\n{END}\nafter\n"


@pytest.mark.parametrize(
    ("kind", "ended", "right"),
    [
        (Kind("a", play, killed=1), [-9], True),
        (Kind("a", play, killed=1), [1], False),  # crashed before the kill
        (Kind("a", play, killed=1), [-9, 1], False),
        (Kind("a", play, killed=1), [-9, -9], False),
        (Kind("a", play), [], True),
        (Kind("a", play), [1], False),
        (Kind("a", play, crashes=(1, 2)), [1, 1], True),
        (Kind("a", play, crashes=(1, 2)), [], False),
        (Kind("a", play, crashes=(1, 2)), [1, -11], False),
    ],
)
def test_an_exit_code_that_the_kind_does_not_expect_is_a_problem(kind, ended, right):
    assert (kind.unexpected(ended) == []) == right


def test_only_results_of_this_code_count(tmp_path, monkeypatch):
    """Old failures and old successes aren't counted, and their runs are repeated."""
    kind, file, played = KINDS[0], tmp_path / "results.jsonl", []

    def run(kind: Kind, seed: int, *rest: Any, code: str) -> Result:
        played.append((kind.name, seed, code))
        return result(kind.name, seed, 1.0, code=code, problems=["lost: x"] if seed == 3 else [])

    monkeypatch.setattr(harness, "play", run)
    monkeypatch.setattr(harness, "Clusters", lambda folder: contextlib.nullcontext(SimpleNamespace(busy=lambda cluster: False)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old = [result(kind.name, 1, 1.0, code="of before"), result(kind.name, 2, 1.0, problems=["lost: x"])]
    file.write_bytes(b"\n".join(map(msgspec.json.encode, old)) + b"\n")
    order = ["--kind", kind.name, "--results", str(file)]
    first = CliRunner().invoke(harness.main, [*order, "--runs", "2"])
    assert first.exit_code == 0
    assert played == [(kind.name, 1, code_now()), (kind.name, 2, code_now())]
    assert "2 runs of 1 kinds" in first.output and "2 of other code, not counted" in first.output
    assert not list(tmp_path.glob("headrace-faults-*"))
    third = CliRunner().invoke(harness.main, [*order, "--runs", "3"])
    assert (third.exit_code, len(played)) == (1, 3)
    [left] = tmp_path.glob("headrace-faults-*")
    assert f"in {left}" in third.output  # the folder of the failed run is kept
    assert CliRunner().invoke(harness.main, [*order, "--runs", "1"]).exit_code == 1  # a failed run isn't repeated


def test_the_hash_of_the_code_covers_all_that_a_run_loads():
    program = "import sys, tests.faults.__main__, tests.faults.worker, deploy.cli.run, stream.join.worker; "
    program += "print(*(module.__file__ for module in sys.modules.values() if getattr(module, '__file__', None)))"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ours = {str(Path(name).relative_to(ROOT)) for name in loaded.split() if Path(name).is_relative_to(ROOT)}
    # Imported but not used by any run: the demo's data sets and its view.
    beside = ("deploy/datasets/", "deploy/demo/", "deploy/cli/", ".venv/")
    left = {name for name in ours - set(deciding_files()) if not name.startswith(beside) and not name.endswith("__init__.py")}
    assert "stream/join/logic.py" in ours
    assert left == set()
