"""The short version of `make faults`: two kinds on the test run's Kafka, and a ledger that must find what is wrong."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from aiokafka.structs import TopicPartition
from click.testing import CliRunner

from deploy.settings import Settings
from stream.topics import TopicNames
from tests.faults import __main__ as harness
from tests.faults.code import ROOT, code_now, deciding_files
from tests.faults.kinds import KINDS, kind_named
from tests.faults.ledger import Ledger
from tests.faults.report import BEGIN, END, table, totals, write_table
from tests.faults.run import Clusters, Kind, Result, play
from tests.stream.join.made_up import Events, join_settings

NAMES = TopicNames.of(Settings().topics)


@pytest.mark.kafka
@pytest.mark.parametrize(("name", "seed"), [("kill -9 in a flush", 7), ("workers join and leave under load", 15)])
def test_a_fault_leaves_the_ledger_exact(kafka, tmp_path, name, seed):
    with Clusters(tmp_path) as clusters:
        clusters.adopt("shared", kafka)
        result = play(kind_named(name), seed, clusters, tmp_path / "runs")
    assert result.problems == []
    assert (result.policy, result.negative_rate) == (("fnw", 0.5) if seed == 15 else ("wait", 1.0))
    assert result.events > 1_600
    assert (result.lost, result.doubled, result.wrong) == (0, 0, 0)


def test_every_kind_has_a_name_of_its_own():
    assert len({kind.name for kind in KINDS}) == len(KINDS)


def record(topic: str, offset: int, key: bytes | None, value: bytes, **headers: bytes) -> Any:
    return SimpleNamespace(topic=topic, partition=0, offset=offset, key=key, value=value, headers=tuple(headers.items()))


def event(key: bytes, time_ms: int) -> bytes:
    return b'{"impression_id":"%b","timestamp":%d}' % (key, time_ms)


def example(offset: int, key: bytes, time_ms: int, source: int, *, click_ms: int | None = None, **other: bytes) -> Any:
    headers = {
        "label": b"0" if click_ms is None else b"1",
        "weight": b"1",
        "kind": b"first",
        "impression_ms": b"%d" % time_ms,
        "source_offset": b"%d" % source,
    }
    if click_ms is not None:
        headers["click_ms"] = b"%d" % click_ms
    return record(NAMES.examples, offset, key, event(key, time_ms), **{**headers, **other})


def letter(offset: int, source: Any, reason: bytes) -> Any:
    place = {"source_topic": source.topic.encode(), "source_partition": b"0", "source_offset": b"%d" % source.offset}
    return record(NAMES.dead_letters, offset, source.key, source.value, reason=reason, **place)


def right() -> Ledger:
    """Impressions a (clicked, once repeated) and b, a broken click, a click of nobody: all as it must be."""
    impressions = [
        record(NAMES.impressions, 0, b"a", event(b"a", 1_000)),
        record(NAMES.impressions, 1, b"b", event(b"b", 2_000)),
        record(NAMES.impressions, 2, b"a", event(b"a", 1_000)),
    ]
    clicks = [
        record(NAMES.clicks, 0, b"a", event(b"a", 1_500)),
        record(NAMES.clicks, 1, b"broken", b"{"),
        record(NAMES.clicks, 2, b"nobody", event(b"nobody", 1_500)),
    ]
    records = {
        NAMES.impressions: impressions,
        NAMES.clicks: clicks,
        NAMES.examples: [example(0, b"a", 1_000, 0, click_ms=1_500), example(1, b"b", 2_000, 1)],
        NAMES.dead_letters: [letter(0, clicks[1], b"malformed_json"), letter(1, clicks[2], b"orphan_click")],
    }
    ends = {TopicPartition(topic, 0): len(records[topic]) for topic in records}
    committed = {TopicPartition(topic, 0): 3 for topic in (NAMES.impressions, NAMES.clicks)}
    return Ledger(join_settings(Settings()), records, committed, ends)


def checked(ledger: Ledger) -> tuple[int, int, int]:
    ledger.check(Events(positives={b"a"}, negatives={b"b"}))
    return ledger.lost, ledger.doubled, ledger.wrong


def test_a_right_ledger_has_no_problem():
    ledger = right()
    assert checked(ledger) == (0, 0, 0)
    assert ledger.problems == []


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda r: r.records[NAMES.examples].pop(), (1, 0, 0)),  # no label
        (lambda r: r.records[NAMES.examples].append(example(2, b"b", 2_000, 1)), (0, 1, 0)),  # two
        (lambda r: r.records[NAMES.examples].append(example(2, b"c", 2_000, 1)), (0, 0, 1)),  # of nobody
        (lambda r: r.records[NAMES.examples].__setitem__(0, example(0, b"a", 1_000, 0)), (0, 0, 1)),  # the wrong one
        (
            lambda r: r.records[NAMES.examples].__setitem__(0, example(0, b"a", 1_000, 0, click_ms=1_499)),
            (0, 0, 1),
        ),  # no such click
        (lambda r: r.records[NAMES.examples].__setitem__(1, example(1, b"b", 2_000, 2)), (0, 0, 1)),  # of another record
        (lambda r: r.records[NAMES.examples].__setitem__(1, example(1, b"b", 2_001, 1)), (0, 0, 1)),  # other bytes
        (lambda r: r.records[NAMES.examples].__setitem__(1, example(1, b"b", 2_000, 1, weight=b"2")), (0, 0, 1)),
        (lambda r: r.records[NAMES.dead_letters].pop(), (1, 0, 0)),
        (lambda r: r.records[NAMES.dead_letters].append(letter(2, r.records[NAMES.clicks][1], b"malformed_json")), (0, 1, 0)),
        (
            lambda r: r.records[NAMES.dead_letters].append(letter(2, r.records[NAMES.impressions][1], b"late_impression")),
            (0, 0, 1),
        ),
        (lambda r: r.records[NAMES.dead_letters].__setitem__(0, letter(0, r.records[NAMES.clicks][1], b"other")), (0, 0, 1)),
        (lambda r: setattr(r.records[NAMES.dead_letters][0], "value", b"["), (0, 0, 1)),  # not the bytes that came in
        (lambda r: r.committed.__setitem__(TopicPartition(NAMES.clicks, 0), 2), (1, 0, 0)),  # not to the end
        (lambda r: r.committed.clear(), (2, 0, 0)),
        (lambda r: r.records[NAMES.impressions].pop(1), (1, 0, 1)),  # lost by the sender, and its label is of nobody
    ],
)
def test_the_ledger_finds_what_is_wrong(change, counts):
    ledger = right()
    change(ledger)
    assert checked(ledger) == counts
    assert len(ledger.problems) == sum(counts)


FAKE = {"policy": b"fnw", "rate": b"0.5"}


def left_out(offset: int, *sources: int, **headers: bytes) -> Any:
    value = b"[%b]" % b",".join(b"%d" % source for source in sources)
    return record(NAMES.examples, offset, None, value, kind=b"left_out", **headers)


def right_fake() -> Ledger:
    """Under `fnw`, of negatives only a's and c's go out, b's and d's don't; a and b are clicked."""
    impressions = [record(NAMES.impressions, n, key, event(key, 1_000)) for n, key in enumerate((b"a", b"b", b"c", b"d"))]
    examples = [
        left_out(0, 1, 3, **FAKE),
        example(1, b"a", 1_000, 0, **FAKE),
        example(2, b"c", 1_000, 2, **FAKE),
        example(3, b"b", 1_000, 1, click_ms=1_500, **FAKE, kind=b"correction"),
        example(4, b"a", 1_000, 0, click_ms=1_500, **FAKE, kind=b"correction"),
    ]
    clicks = [record(NAMES.clicks, n, key, event(key, 1_500)) for n, key in enumerate((b"a", b"b"))]
    records = {NAMES.impressions: impressions, NAMES.clicks: clicks, NAMES.examples: examples, NAMES.dead_letters: []}
    return Ledger(join_settings(Settings(), label_policy="fnw", negative_rate=0.5), records, {}, {})


def checked_fake(ledger: Ledger) -> tuple[int, int, int]:
    ledger.check(Events(positives={b"a", b"b"}, negatives={b"c", b"d"}))
    return ledger.lost, ledger.doubled, ledger.wrong


def test_a_right_ledger_of_fake_negatives_has_no_problem():
    ledger = right_fake()
    assert checked_fake(ledger) == (0, 0, 0)
    assert ledger.problems == []


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda e: e.pop(4), (1, 0, 0)),  # no correction
        (lambda e: e.pop(3), (1, 0, 0)),  # none of one left out
        (lambda e: e.pop(1), (1, 0, 0)),  # only the correction
        (lambda e: e.pop(0), (2, 0, 0)),  # two neither sent nor named
        (lambda e: e.append(example(5, b"a", 1_000, 0, **FAKE)), (0, 1, 0)),
        (lambda e: e.append(example(5, b"a", 1_000, 0, click_ms=1_500, **FAKE, kind=b"correction")), (0, 1, 0)),
        (lambda e: e.append(example(5, b"c", 1_000, 2, click_ms=1_500, **FAKE, kind=b"correction")), (0, 0, 1)),  # no click
        (lambda e: e.append(left_out(5, 3, **FAKE)), (0, 1, 0)),  # named twice
        (lambda e: e.append(left_out(5, 2, **FAKE)), (0, 0, 1)),  # sent, and named
        (lambda e: e.append(left_out(5, 9, **FAKE)), (0, 0, 1)),  # of nobody
        (lambda e: e.append(example(5, b"d", 1_000, 3, **FAKE)), (0, 0, 1)),  # named, and sent
        (lambda e: e.__setitem__(0, left_out(0, 1, 3, rate=b"0.5")), (0, 0, 2)),  # of another policy
        (lambda e: e.__setitem__(0, left_out(0, 1, 3, policy=b"fnw", rate=b"0.1")), (0, 0, 2)),
        (lambda e: e.__setitem__(1, example(1, b"a", 1_000, 0, policy=b"fnw")), (0, 0, 1)),  # at no rate
        (lambda e: e.__setitem__(1, example(1, b"a", 1_000, 0, rate=b"0.5")), (0, 0, 1)),  # of no policy
        (lambda e: e.__setitem__(1, example(1, b"a", 1_000, 0, click_ms=1_500, **FAKE)), (0, 0, 1)),  # at once positive
        (lambda e: e.__setitem__(4, example(4, b"a", 1_000, 0, click_ms=1_499, **FAKE, kind=b"correction")), (0, 0, 1)),
        (lambda e: e.__setitem__(1, example(5, b"a", 1_000, 0, **FAKE)), (0, 0, 1)),  # after its correction
        (lambda e: e.__setitem__(0, left_out(5, 1, 3, **FAKE)), (0, 0, 1)),  # named after its correction
    ],
)
def test_the_ledger_finds_what_is_wrong_with_fake_negatives(change, counts):
    ledger = right_fake()
    change(ledger.records[NAMES.examples])
    assert checked_fake(ledger) == counts
    assert len(ledger.problems) == sum(counts)


def test_under_wait_a_negative_is_named_when_it_is_left_out_and_a_positive_never_is():
    ledger = right_fake()
    ledger.settings = join_settings(Settings(), negative_rate=0.5)
    ledger.records[NAMES.examples] = [
        example(0, b"a", 1_000, 0, click_ms=1_500, rate=b"0.5"),
        example(1, b"b", 1_000, 1, click_ms=1_500, rate=b"0.5"),
        example(2, b"c", 1_000, 2, rate=b"0.5"),
        left_out(3, 3, rate=b"0.5"),
    ]
    assert checked_fake(ledger) == (0, 0, 0)
    ledger.records[NAMES.examples][1] = left_out(1, 1, rate=b"0.5")
    assert checked_fake(ledger) == (1, 0, 1)


def result(kind: str, seed: int, recovery_s: float | None, **counts: Any) -> Result:
    whole = {"lost": 0, "doubled": 0, "wrong": 0, "restarts": 1, "events": 10, "seconds": 1.0, "problems": [], **counts}
    return Result(kind=kind, seed=seed, recovery_s=recovery_s, **whole)


def test_the_table_adds_up_and_takes_its_place_in_the_page(tmp_path):
    results = [
        result("cut", 1, 1.0),
        result("cut", 2, 3.0, lost=2, problems=["lost: x"]),
        result("full", 3, None, policy="fnw"),
    ]
    found = table(results, "abc1234")
    assert "| cut | 2 | 2 | 0 | 0 | 2.0 | 3.0 |" in found
    assert "| full | 1 | 0 | 0 | 0 |  |  |" in found
    assert totals(results) == "3 runs of 2 kinds, 30 events: 2 lost, 0 doubled, 0 wrong, 1 runs with problems"
    assert "`fnw` in 1 of them, half of the negatives left out in 0. Code of commit abc1234." in found
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_table(results, page, "abc1234")
    assert page.read_text() == f"before\n{BEGIN}\n\n{found}\n\n{END}\nafter\n"


@pytest.mark.parametrize(
    ("kind", "ended", "right"),
    [
        (Kind("a", play, killed=1), [-9], True),
        (Kind("a", play, killed=1), [1], False),  # it crashed before the kill
        (Kind("a", play, killed=1), [-9, 1], False),
        (Kind("a", play, killed=1), [-9, -9], False),
        (Kind("a", play), [], True),
        (Kind("a", play), [1], False),
        (Kind("a", play, crashes=(1, 2)), [1, 1], True),
        (Kind("a", play, crashes=(1, 2)), [], False),
        (Kind("a", play, crashes=(1, 2)), [1, -11], False),
    ],
)
def test_an_end_that_the_kind_does_not_expect_is_a_problem(kind, ended, right):
    assert (kind.unexpected(ended) == []) == right


def test_only_results_of_this_code_count(tmp_path, monkeypatch):
    """An old failure fails nothing, and an old success passes for nothing: the run is made again."""
    kind, file, played = KINDS[0], tmp_path / "results.jsonl", []

    def run(kind: Kind, seed: int, *rest: Any, code: str) -> Result:
        played.append((kind.name, seed, code))
        return result(kind.name, seed, 1.0, code=code, problems=["lost: x"] if seed == 3 else [])

    monkeypatch.setattr(harness, "play", run)
    monkeypatch.setattr(harness, "Clusters", lambda folder: contextlib.nullcontext())
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
    assert f"in {left}" in third.output  # what failed can be looked at
    assert CliRunner().invoke(harness.main, [*order, "--runs", "1"]).exit_code == 1  # what has failed once has failed


def test_a_result_is_of_all_that_a_run_loads():
    program = "import sys, tests.faults.__main__, tests.faults.worker, deploy.cli.run, stream.join.worker; "
    program += "print(*(module.__file__ for module in sys.modules.values() if getattr(module, '__file__', None)))"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ours = {str(Path(name).relative_to(ROOT)) for name in loaded.split() if Path(name).is_relative_to(ROOT)}
    # Imported on the way, and used by no run: the demo's data sets and its view.
    beside = ("deploy/datasets/", "deploy/demo/", "deploy/cli/", ".venv/")
    left = {name for name in ours - set(deciding_files()) if not name.startswith(beside) and not name.endswith("__init__.py")}
    assert "stream/join/logic.py" in ours
    assert left == set()
