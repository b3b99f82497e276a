"""The ledger finds each kind of mistake, and nothing where all is as it must be; and it shares no code with the join."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults.ledger import Found, Ledger, Life
from tests.faults.stream import CLICKS, HORIZON_MS, IMPRESSIONS, WINDOW_MS, Sent, event

LIFE = Life(WINDOW_MS, 3_000, HORIZON_MS, 0, 1.0)


def test_the_ledger_shares_no_code_with_the_join():
    program = "import sys, tests.faults.ledger, tests.faults.logs; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    rooms = ("stream", "state", "model", "deploy", "headrace", "aiokafka", "faust", "msgspec")
    assert [name for name in loaded if name.split(".")[0] in rooms] == []


def record(row: Sent, offset: int) -> Any:
    return SimpleNamespace(partition=0, offset=offset, key=row.key, value=row.value, headers=[])


class Case:
    """A log in the making: `send` what comes in, `say` what goes out."""

    def __init__(self, *lives: Life) -> None:
        self.lives = lives or (LIFE,)
        self.sent: list[Sent] = []
        self.records: dict[str, list[Any]] = {name: [] for name in (IMPRESSIONS, CLICKS, "examples", "dead_letters")}

    def send(self, row: Sent) -> int:
        records = self.records[row.source]
        self.sent.append(row)
        records.append(record(row, len(records)))
        return len(records) - 1

    def impression(self, key: bytes, time_ms: int, after_ms: int = -1) -> int:
        row = event(IMPRESSIONS, key, time_ms)
        return self.send(Sent(row.source, row.key, row.value, time_ms, after_ms=after_ms))

    def click(self, key: bytes, time_ms: int, after_ms: int = -1) -> int:
        row = event(CLICKS, key, time_ms)
        return self.send(Sent(row.source, row.key, row.value, time_ms, after_ms=after_ms))

    def say(self, key: bytes, time_ms: int, source: int, *, click_ms: int | None = None, **other: str) -> None:
        headers = {
            "label": "0" if click_ms is None else "1",
            "weight": "1",
            "kind": "first",
            "impression_ms": str(time_ms),
            "source_offset": str(source),
        }
        if click_ms is not None:
            headers["click_ms"] = str(click_ms)
        self.write("examples", key, event(IMPRESSIONS, key, time_ms).value, {**headers, **other})

    def correct(self, key: bytes, time_ms: int, source: int, click_ms: int, **other: str) -> None:
        self.say(key, time_ms, source, click_ms=click_ms, kind="correction", **other)

    def leave_out(self, *sources: int, rate: str = "0.5") -> None:
        self.write("examples", None, str(list(sources)).encode(), {"kind": "left_out", "rate": rate})

    def bury(self, source: str, offset: int, reason: str, value: bytes | None = None) -> None:
        row = self.records[source][offset]
        place = {"source_topic": f"prefix-{source}", "source_partition": "0", "source_offset": str(offset)}
        self.write("dead_letters", row.key, row.value if value is None else value, {"reason": reason, **place})

    def write(self, name: str, key: bytes | None, value: bytes, headers: dict[str, str]) -> None:
        rows = [(header, text.encode()) for header, text in headers.items()]
        self.records[name].append(
            SimpleNamespace(partition=0, offset=len(self.records[name]), key=key, value=value, headers=rows)
        )

    def ledger(self, *, behind: int = 0, **options: Any) -> Ledger:
        ends = {(source, 0): len(self.records[source]) for source in (IMPRESSIONS, CLICKS)}
        committed = {place: end - behind for place, end in ends.items()}
        return Ledger(self.lives, Found(self.records, committed, ends), self.sent, **options)

    def counts(self, **options: Any) -> tuple[int, int, int]:
        ledger = self.ledger(**options)
        assert len(ledger.problems) == ledger.lost + ledger.doubled + ledger.wrong
        return ledger.lost, ledger.doubled, ledger.wrong


def right() -> Case:
    """Impressions `soon` (clicked within the hold, repeated), `later` (clicked behind it), `never`; odd clicks."""
    case = Case()
    case.impression(b"soon", 1_000)
    case.impression(b"later", 2_000)
    case.impression(b"never", 3_000)
    case.impression(b"soon", 1_000)
    case.click(b"soon", 4_000)
    case.click(b"soon", 3_500)
    case.click(b"later", 5_001)
    case.click(b"nobody", 1_500)
    case.click(b"nobody", 1_500)
    case.send(Sent(CLICKS, b"broken", b"{", reason="malformed_json"))
    case.write("examples", None, b"[[0, 1000, 4000]]", {"kind": "matched"})
    case.say(b"soon", 1_000, 0, click_ms=3_500)
    case.say(b"later", 2_000, 1)
    case.correct(b"later", 2_000, 1, 5_001)
    case.say(b"never", 3_000, 2)
    case.bury(CLICKS, 3, "orphan_click")
    case.bury(CLICKS, 5, "malformed_json")
    return case


def test_a_right_ledger_has_no_problem():
    ledger = right().ledger()
    assert (ledger.lost, ledger.doubled, ledger.wrong, ledger.problems) == (0, 0, 0, [])


def without(name: str, index: int) -> Any:
    return lambda case: case.records[name].pop(index)


def with_headers(index: int, **headers: str) -> Any:
    """Other headers of one example."""

    def change(case: Case) -> None:
        row = case.records["examples"][index]
        row.headers = list({**dict(row.headers), **{name: text.encode() for name, text in headers.items()}}.items())

    return change


def with_value(name: str, value: bytes) -> Any:
    return lambda case: setattr(case.records[name][1], "value", value)


def swapped(one: int, two: int) -> Any:
    def change(case: Case) -> None:
        rows = case.records["examples"]
        rows[one].offset, rows[two].offset = rows[two].offset, rows[one].offset

    return change


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (without("examples", 4), (1, 0, 0)),  # no label
        (without("examples", 3), (1, 0, 0)),  # no correction
        (without("examples", 2), (1, 0, 0)),  # only the correction
        (lambda case: case.say(b"never", 3_000, 2), (0, 1, 0)),
        (lambda case: case.correct(b"later", 2_000, 1, 5_001), (0, 1, 0)),  # a second correction
        (swapped(2, 3), (0, 0, 1)),  # before its first
        (lambda case: case.correct(b"never", 3_000, 2, 4_000), (0, 0, 1)),  # of nothing
        (lambda case: case.correct(b"soon", 1_000, 0, 4_000), (0, 0, 1)),  # of a positive
        (lambda case: case.say(b"other", 3_000, 9), (0, 0, 1)),  # of nobody
        (lambda case: case.say(b"soon", 1_000, 3), (0, 0, 1)),  # of the duplicate
        (with_headers(1, label="0"), (0, 0, 1)),
        (with_headers(1, click_ms="4000"), (0, 0, 1)),  # not the earliest
        (with_headers(3, click_ms="5000"), (0, 0, 1)),  # no such click
        (with_headers(2, click_ms="5001"), (0, 0, 1)),  # a negative with a click
        (with_headers(4, weight="2"), (0, 0, 1)),
        (with_headers(4, rate="0.5"), (0, 0, 1)),
        (with_headers(4, policy="fnw"), (0, 0, 1)),
        (with_headers(4, impression_ms="3001"), (0, 0, 1)),
        (with_value("examples", b"{}"), (0, 0, 1)),
        (with_headers(0, kind="else"), (0, 0, 1)),
        (lambda case: case.write("examples", None, b"[[0, 1000, 4001]]", {"kind": "matched"}), (0, 0, 1)),
        (lambda case: case.write("examples", None, b"[[3, 1000, 4000]]", {"kind": "matched"}), (0, 0, 1)),
        (lambda case: case.leave_out(2), (0, 1, 1)),  # sent, and named
        (swapped(2, 4), (0, 0, 2)),  # labels not in the order of impressions, and a correction before its first
        (without("dead_letters", 0), (1, 0, 0)),
        (lambda case: case.bury(CLICKS, 5, "malformed_json"), (0, 1, 0)),
        (lambda case: case.bury(CLICKS, 4, "orphan_click"), (0, 0, 1)),  # a duplicate
        (lambda case: case.bury(IMPRESSIONS, 2, "late_impression"), (0, 0, 1)),
        (lambda case: case.records["dead_letters"].pop(0) and case.bury(CLICKS, 3, "other"), (0, 0, 1)),
        (with_value("dead_letters", b"["), (0, 0, 1)),
        (lambda case: case.sent.append(event(IMPRESSIONS, b"gone", 3_000)), (1, 0, 0)),  # the sender lost it
        (lambda case: case.sent.pop(2), (0, 0, 2)),  # nobody sent `never`, and its label is of nobody
    ],
)
def test_the_ledger_finds_what_is_wrong(change, counts):
    case = right()
    change(case)
    assert case.counts() == counts


def test_what_is_not_committed_to_the_end_is_lost():
    assert right().counts(behind=1) == (2, 0, 0)


@pytest.mark.parametrize(
    ("hold_ms", "click_ms", "labels"),
    [
        (0, 1_000, {"first": "1"}),
        (0, 1_001, {"first": "0", "correction": "1"}),
        (300, 1_300, {"first": "1"}),
        (300, 1_301, {"first": "0", "correction": "1"}),
        (WINDOW_MS, 1_000 + WINDOW_MS, {"first": "1"}),
        (300, 1_001 + WINDOW_MS, {"first": "0"}),
        (300, 999, {"first": "0"}),
    ],
)
def test_the_edges_of_hold_and_window(hold_ms, click_ms, labels):
    case = Case(Life(WINDOW_MS, hold_ms, HORIZON_MS, 0, 1.0))
    case.impression(b"a", 1_000)
    case.click(b"a", click_ms)
    [use] = case.ledger().uses.values()
    assert {kind: label for kind, (label, _) in use.labels.items()} == labels


def test_a_late_click_corrects_what_is_out_and_changes_nothing_behind_the_window():
    """Both are within the hold by their times: the watermark of 6 s has passed the hold, the one of 12 s the window too."""
    for after_ms, expected in ((6_000, ["first", "correction"]), (12_000, ["first"])):
        case = Case()
        case.impression(b"a", 1_000)
        case.click(b"a", 2_000, after_ms=after_ms)
        [use] = case.ledger().uses.values()
        assert (list(use.labels), use.labels["first"][0]) == (expected, "0")


def test_impressions_that_come_late_and_ids_used_again():
    case = Case()
    case.impression(b"a", 1_000)
    case.impression(b"a", 1_000 + HORIZON_MS)  # a duplicate
    case.impression(b"a", 1_001 + HORIZON_MS)  # another use of the id
    case.impression(b"b", 5_000, after_ms=5_000 + WINDOW_MS + HORIZON_MS)
    case.impression(b"c", 5_000, after_ms=5_001 + WINDOW_MS + HORIZON_MS)  # late
    case.click(b"a", 1_001 + HORIZON_MS)
    ledger = case.ledger()
    assert [use.record.offset for use in ledger.uses.values()] == [0, 2, 3]
    assert [bool(use.clicks) for use in ledger.uses.values()] == [False, True, False]
    assert [problem for problem in ledger.problems if "dead letter" in problem] == [
        "lost: impressions 0/4 must be a dead letter (late_impression) and is none"
    ]


def test_before_the_end_only_what_the_watermark_settles_can_be_lost():
    case = Case()
    case.impression(b"a", 1_000)
    case.impression(b"b", 2_000)
    case.click(b"nobody", 4_500)
    assert case.counts(until_ms=4_000) == (0, 0, 0)
    assert case.counts(until_ms=4_001) == (1, 0, 0)
    assert case.counts(until_ms=5_001) == (3, 0, 0)


def test_negatives_left_out():
    """Of these ids a rate of one half keeps a and c."""
    case = Case(Life(WINDOW_MS, 3_000, HORIZON_MS, 0, 0.5))
    for key in (b"a", b"b", b"c", b"d"):
        case.impression(key, 1_000)
    case.click(b"b", 9_000)
    case.leave_out(1, 3)
    case.say(b"a", 1_000, 0, rate="0.5")
    case.say(b"c", 1_000, 2, rate="0.5")
    case.correct(b"b", 1_000, 1, 9_000, rate="0.5")
    assert case.counts() == (0, 0, 0)
    case.records["examples"][0].value = b"[1]"
    assert case.counts() == (1, 0, 0)  # neither sent nor named
    case.records["examples"][0].value = b"[1, 3, 3]"
    assert case.counts() == (0, 1, 0)
    case.records["examples"][0].value = b"[1, 3, 9]"
    assert case.counts() == (0, 0, 1)
    case.records["examples"][0].value = b"[1]"
    case.say(b"d", 1_000, 3, rate="0.5")
    assert case.counts() == (0, 0, 1)  # sent, though to be left out
    case.leave_out(0)
    assert case.counts() == (0, 1, 2)  # sent, and named, which it isn't


def test_each_impression_ends_under_the_settings_it_came_by_and_says_the_rate_it_left_under():
    """From the second impression and the second example on the hold is 0, the window 4 s, and half of the negatives leave."""
    after = Life(4_000, 0, HORIZON_MS, 0, 0.5, impressions_from={0: 1}, examples_from={0: 2})
    case = Case(LIFE, after)
    case.impression(b"a", 1_000)
    case.impression(b"c", 1_500)
    case.click(b"a", 4_000)
    case.click(b"c", 4_000)
    case.say(b"a", 1_000, 0, click_ms=4_000)
    case.say(b"c", 1_500, 1)
    case.correct(b"c", 1_500, 1, 4_000, rate="0.5")
    assert case.counts() == (0, 0, 0)
    case.records["examples"][2].headers.pop()
    assert case.counts() == (0, 0, 1)


def test_a_record_that_is_too_large_is_named_and_leaves_no_bytes():
    case = Case()
    case.send(Sent(IMPRESSIONS, b"a", b"x" * 100, 1_000, reason="too_large"))
    case.click(b"a", 1_000)
    case.bury(IMPRESSIONS, 0, "too_large", b"")
    case.write("examples", None, b"[0]", {"kind": "left_out"})
    assert case.counts() == (0, 0, 0)
    case.records["dead_letters"][0].value = b"x" * 100
    assert case.counts() == (0, 0, 1)
    case.records["dead_letters"].clear()
    assert case.counts() == (1, 0, 0)
    case.records["examples"].clear()
    assert case.counts() == (2, 0, 0)
    case.say(b"a", 1_000, 0, click_ms=1_000)
    assert case.counts() == (1, 0, 1)  # it can't have fitted


def test_a_correction_that_is_too_large_has_a_letter_of_its_own():
    for rate, letters in ((1.0, 2), (0.5, 1)):
        case = Case(Life(WINDOW_MS, 0, HORIZON_MS, 0, rate))
        case.send(Sent(IMPRESSIONS, b"b", b"x" * 100, 1_000, reason="too_large"))
        case.click(b"b", 1_001)
        case.write("examples", None, b"[0]", {"kind": "left_out"} | ({"rate": "0.5"} if rate < 1 else {}))
        for _ in range(letters):
            case.bury(IMPRESSIONS, 0, "too_large", b"")
        assert case.counts() == (0, 0, 0)
    case.records["dead_letters"].clear()
    assert case.counts() == (1, 0, 0)  # the negative is left out by the rate, and the click is gone


def test_a_record_that_is_too_large_may_be_left_out_by_the_rate():
    """A rate of one half leaves b out: nobody misses its bytes."""
    case = Case(Life(WINDOW_MS, 3_000, HORIZON_MS, 0, 0.5))
    case.send(Sent(IMPRESSIONS, b"b", b"x" * 100, 1_000, reason="too_large"))
    case.leave_out(0)
    assert case.counts() == (0, 0, 0)
    case.bury(IMPRESSIONS, 0, "too_large", b"")
    assert case.counts() == (0, 0, 1)
