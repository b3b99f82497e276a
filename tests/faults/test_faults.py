"""The short version of `make faults`: two kinds on the test run's Kafka, and a ledger that must find what is wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deploy.settings import Settings
from stream.topics import TopicNames
from tests.faults.kinds import KINDS, kind_named
from tests.faults.ledger import Ledger
from tests.faults.report import BEGIN, END, table, totals, write_table
from tests.faults.run import Clusters, Result, play
from tests.stream.join.made_up import Events, join_settings

NAMES = TopicNames.of(Settings().topics)


@pytest.mark.kafka
@pytest.mark.parametrize("name", ["kill -9 in a flush", "workers join and leave under load"])
def test_a_fault_leaves_the_ledger_exact(kafka, tmp_path, name):
    with Clusters(tmp_path) as clusters:
        clusters.adopt("shared", kafka)
        result = play(kind_named(name), 7, clusters, tmp_path / "runs")
    assert result.problems == []
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
    return Ledger(join_settings(Settings()), records, {}, {})


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
        (lambda r: r[NAMES.examples].pop(), (1, 0, 0)),  # no label
        (lambda r: r[NAMES.examples].append(example(2, b"b", 2_000, 1)), (0, 1, 0)),  # two
        (lambda r: r[NAMES.examples].append(example(2, b"c", 2_000, 1)), (0, 0, 1)),  # of nobody
        (lambda r: r[NAMES.examples].__setitem__(0, example(0, b"a", 1_000, 0)), (0, 0, 1)),  # the wrong one
        (lambda r: r[NAMES.examples].__setitem__(0, example(0, b"a", 1_000, 0, click_ms=1_499)), (0, 0, 1)),  # no such click
        (lambda r: r[NAMES.examples].__setitem__(1, example(1, b"b", 2_000, 2)), (0, 0, 1)),  # of another record
        (lambda r: r[NAMES.examples].__setitem__(1, example(1, b"b", 2_001, 1)), (0, 0, 1)),  # other bytes
        (lambda r: r[NAMES.examples].__setitem__(1, example(1, b"b", 2_000, 1, weight=b"2")), (0, 0, 1)),
        (lambda r: r[NAMES.dead_letters].pop(), (1, 0, 0)),
        (lambda r: r[NAMES.dead_letters].append(letter(2, r[NAMES.clicks][1], b"malformed_json")), (0, 1, 0)),
        (lambda r: r[NAMES.dead_letters].append(letter(2, r[NAMES.impressions][1], b"late_impression")), (0, 0, 1)),
        (lambda r: r[NAMES.impressions].pop(1), (1, 0, 1)),  # lost by the sender, and its label is of nobody
    ],
)
def test_the_ledger_finds_what_is_wrong(change, counts):
    ledger = right()
    change(ledger.records)
    assert checked(ledger) == counts
    assert len(ledger.problems) == sum(counts)


def result(kind: str, seed: int, recovery_s: float | None, **counts: Any) -> Result:
    whole = {"lost": 0, "doubled": 0, "wrong": 0, "restarts": 1, "events": 10, "seconds": 1.0, "problems": [], **counts}
    return Result(kind=kind, seed=seed, recovery_s=recovery_s, **whole)


def test_the_table_adds_up_and_takes_its_place_in_the_page(tmp_path):
    results = [result("cut", 1, 1.0), result("cut", 2, 3.0, lost=2, problems=["lost: x"]), result("full", 3, None)]
    assert "| cut | 2 | 2 | 0 | 0 | 2.0 | 3.0 |" in table(results)
    assert "| full | 1 | 0 | 0 | 0 |  |  |" in table(results)
    assert totals(results) == "3 runs of 2 kinds, 30 events: 2 lost, 0 doubled, 0 wrong, 1 runs with problems"
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_table(results, page)
    assert page.read_text() == f"before\n{BEGIN}\n\n{table(results)}\n\n{END}\nafter\n"
