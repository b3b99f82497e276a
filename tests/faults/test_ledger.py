"""The ledger finds each kind of mistake and nothing in right logs, and shares no code with the join."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults.ledger import Found, Ledger, Life
from tests.faults.stream import CLICKS, HORIZON_MS, IMPRESSIONS, WINDOW_MS, Sent, event

ARRIVED_MS = 9_000  # of every record
MATCHED = {"kind": "matched", "click_arrived_ms": f"[{ARRIVED_MS}]"}  # headers of a note about one click
LIFE = Life(WINDOW_MS, 3_000, HORIZON_MS, 0, 1.0)


def test_the_ledger_shares_no_code_with_the_join():
    program = "import sys, tests.faults.ledger, tests.faults.logs; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    rooms = ("stream", "state", "model", "deploy", "headrace", "aiokafka", "faust", "msgspec")
    assert [name for name in loaded if name.split(".")[0] in rooms] == []


def record(row: Sent, offset: int) -> Any:
    return SimpleNamespace(partition=0, offset=offset, key=row.key, value=row.value, headers=[], timestamp=ARRIVED_MS)


class Case:
    """A log that a test writes: inputs by `send`, `impression` and `click`, outputs by the other methods."""

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

    def label(self, key: bytes, time_ms: int, source: int, *, click_ms: int | None = None, **other: str) -> None:
        """A first label of the impression at offset `source`; positive if there is a `click_ms`."""
        headers = {
            "label": "0" if click_ms is None else "1",
            "weight": "1",
            "kind": "first",
            "impression_ms": str(time_ms),
            "source_offset": str(source),
        }
        if click_ms is not None:
            headers |= {"click_ms": str(click_ms), "click_arrived_ms": str(ARRIVED_MS)}
        self.write("examples", key, event(IMPRESSIONS, key, time_ms).value, {**headers, **other})

    def correct(self, key: bytes, time_ms: int, source: int, click_ms: int, **other: str) -> None:
        self.label(key, time_ms, source, click_ms=click_ms, kind="correction", **other)

    def leave_out(self, *sources: int, rate: str = "0.5") -> None:
        self.write("examples", None, str(list(sources)).encode(), {"kind": "left_out", "rate": rate})

    def dead_letter(self, source: str, offset: int, reason: str, value: bytes | None = None) -> None:
        row = self.records[source][offset]
        headers = {"reason": reason, "source_topic": f"prefix-{source}", "source_partition": "0", "source_offset": str(offset)}
        self.write("dead_letters", row.key, row.value if value is None else value, headers)

    def write(self, name: str, key: bytes | None, value: bytes, headers: dict[str, str]) -> None:
        rows = [(header, text.encode()) for header, text in headers.items()]
        self.records[name].append(
            SimpleNamespace(partition=0, offset=len(self.records[name]), key=key, value=value, headers=rows)
        )

    def ledger(self, *, behind: int = 0, **options: Any) -> Ledger:
        ends = {(source, 0): len(self.records[source]) for source in (IMPRESSIONS, CLICKS)}
        committed = {partition: end - behind for partition, end in ends.items()}
        return Ledger(self.lives, Found(self.records, committed, ends), self.sent, **options)

    def counts(self, **options: Any) -> tuple[int, int, int]:
        ledger = self.ledger(**options)
        assert len(ledger.problems) == ledger.lost + ledger.doubled + ledger.wrong
        return ledger.lost, ledger.doubled, ledger.wrong


def right() -> Case:
    """A right log: impressions `soon` (clicked within the hold, and repeated), `later` (clicked after it) and `never`."""
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
    case.write("examples", None, b"[[0, 1000, 4000]]", MATCHED)
    case.label(b"soon", 1_000, 0, click_ms=3_500)
    case.label(b"later", 2_000, 1)
    case.correct(b"later", 2_000, 1, 5_001)
    case.label(b"never", 3_000, 2)
    case.dead_letter(CLICKS, 3, "orphan_click")
    case.dead_letter(CLICKS, 5, "malformed_json")
    return case


def test_a_right_log_has_no_problem():
    ledger = right().ledger()
    assert (ledger.lost, ledger.doubled, ledger.wrong, ledger.problems) == (0, 0, 0, [])


def without(name: str, index: int) -> Any:
    return lambda case: case.records[name].pop(index)


def with_headers(index: int, **headers: str) -> Any:
    """Changes headers of one example."""

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
        (lambda case: case.label(b"never", 3_000, 2), (0, 1, 0)),
        (lambda case: case.correct(b"later", 2_000, 1, 5_001), (0, 1, 0)),  # a second correction
        (swapped(2, 3), (0, 0, 1)),  # a correction before its first label
        (lambda case: case.correct(b"never", 3_000, 2, 4_000), (0, 0, 1)),  # a correction without a click
        (lambda case: case.correct(b"soon", 1_000, 0, 4_000), (0, 0, 1)),  # a correction of a positive
        (lambda case: case.label(b"other", 3_000, 9), (0, 0, 1)),  # a label of no impression
        (lambda case: case.label(b"soon", 1_000, 3), (0, 0, 1)),  # a label of the duplicate
        (with_headers(1, label="0"), (0, 0, 1)),
        (with_headers(1, click_ms="4000"), (0, 0, 1)),  # not the earliest
        (with_headers(3, click_ms="5000"), (0, 0, 1)),  # no such click
        (with_headers(2, click_ms="5001"), (0, 0, 1)),  # a negative with a click
        (with_headers(0, click_arrived_ms="[9001]"), (0, 0, 1)),  # no click arrived then
        (with_headers(0, click_arrived_ms="[9000, 9000]"), (0, 0, 1)),
        (with_headers(1, click_arrived_ms="9001"), (0, 0, 1)),
        (with_headers(2, click_arrived_ms="9000"), (0, 0, 1)),  # of a negative
        (with_headers(4, weight="2"), (0, 0, 1)),
        (with_headers(4, rate="0.5"), (0, 0, 1)),
        (with_headers(4, policy="fnw"), (0, 0, 1)),
        (with_headers(4, impression_ms="3001"), (0, 0, 1)),
        (with_value("examples", b"{}"), (0, 0, 1)),
        (with_headers(0, kind="else"), (0, 0, 1)),
        (lambda case: case.write("examples", None, b"[[0, 1000, 4001]]", MATCHED), (0, 0, 1)),
        (lambda case: case.write("examples", None, b"[[3, 1000, 4000]]", MATCHED), (0, 0, 1)),
        (lambda case: case.leave_out(2), (0, 1, 1)),  # sent, and named as left out
        (swapped(2, 4), (0, 0, 2)),  # labels out of order, and a correction before its first label
        (without("dead_letters", 0), (1, 0, 0)),
        (lambda case: case.dead_letter(CLICKS, 5, "malformed_json"), (0, 1, 0)),
        (lambda case: case.dead_letter(CLICKS, 4, "orphan_click"), (0, 0, 1)),  # a duplicate
        (lambda case: case.dead_letter(IMPRESSIONS, 2, "late_impression"), (0, 0, 1)),
        (lambda case: case.records["dead_letters"].pop(0) and case.dead_letter(CLICKS, 3, "other"), (0, 0, 1)),
        (with_value("dead_letters", b"["), (0, 0, 1)),
        (lambda case: case.sent.append(event(IMPRESSIONS, b"gone", 3_000)), (1, 0, 0)),  # the sender lost it
        (lambda case: case.sent.pop(2), (0, 0, 2)),  # `never` wasn't sent, and its label is of no impression
    ],
)
def test_the_ledger_finds_what_is_wrong(change, counts):
    case = right()
    change(case)
    assert case.counts() == counts


def test_records_that_are_not_committed_are_lost():
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


def test_a_late_click_corrects_a_label_that_was_sent_and_changes_nothing_after_the_window():
    """Both clicks are within the hold. A watermark of 6 s has passed the hold, and one of 12 s the window too."""
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
        "lost: impressions 0/4: expected a dead letter (late_impression), found none"
    ]


def test_only_outputs_that_the_watermark_settles_can_be_lost():
    case = Case()
    case.impression(b"a", 1_000)
    case.impression(b"b", 2_000)
    case.click(b"nobody", 4_500)
    assert case.counts(until_ms=4_000) == (0, 0, 0)
    assert case.counts(until_ms=4_001) == (1, 0, 0)
    assert case.counts(until_ms=5_001) == (3, 0, 0)


def test_negatives_left_out():
    """A rate of 0.5 keeps the ids a and c."""
    case = Case(Life(WINDOW_MS, 3_000, HORIZON_MS, 0, 0.5))
    for key in (b"a", b"b", b"c", b"d"):
        case.impression(key, 1_000)
    case.click(b"b", 9_000)
    case.leave_out(1, 3)
    case.label(b"a", 1_000, 0, rate="0.5")
    case.label(b"c", 1_000, 2, rate="0.5")
    case.correct(b"b", 1_000, 1, 9_000, rate="0.5")
    assert case.counts() == (0, 0, 0)
    case.records["examples"][0].value = b"[1]"
    assert case.counts() == (1, 0, 0)  # neither sent nor named as left out
    case.records["examples"][0].value = b"[1, 3, 3]"
    assert case.counts() == (0, 1, 0)
    case.records["examples"][0].value = b"[1, 3, 9]"
    assert case.counts() == (0, 0, 1)
    case.records["examples"][0].value = b"[1]"
    case.label(b"d", 1_000, 3, rate="0.5")
    assert case.counts() == (0, 0, 1)  # sent, although the rate leaves it out
    case.leave_out(0)
    assert case.counts() == (0, 1, 2)  # sent, and named as left out although the rate keeps it


def test_an_impression_has_the_settings_when_it_was_read_and_a_label_names_the_rate_when_it_was_sent():
    """From impression 1 and example 2 on, the hold is 0, the window 4 s and the rate 0.5."""
    after = Life(4_000, 0, HORIZON_MS, 0, 0.5, impressions_from={0: 1}, examples_from={0: 2})
    case = Case(LIFE, after)
    case.impression(b"a", 1_000)
    case.impression(b"c", 1_500)
    case.click(b"a", 4_000)
    case.click(b"c", 4_000)
    case.label(b"a", 1_000, 0, click_ms=4_000)
    case.label(b"c", 1_500, 1)
    case.correct(b"c", 1_500, 1, 4_000, rate="0.5")
    assert case.counts() == (0, 0, 0)
    case.records["examples"][2].headers.pop()
    assert case.counts() == (0, 0, 1)


def test_a_record_that_is_too_large_is_named_as_left_out_and_its_dead_letter_is_empty():
    case = Case()
    case.send(Sent(IMPRESSIONS, b"a", b"x" * 100, 1_000, reason="too_large"))
    case.click(b"a", 1_000)
    case.dead_letter(IMPRESSIONS, 0, "too_large", b"")
    case.write("examples", None, b"[0]", {"kind": "left_out"})
    assert case.counts() == (0, 0, 0)
    case.records["dead_letters"][0].value = b"x" * 100
    assert case.counts() == (0, 0, 1)
    case.records["dead_letters"].clear()
    assert case.counts() == (1, 0, 0)
    case.records["examples"].clear()
    assert case.counts() == (2, 0, 0)
    case.label(b"a", 1_000, 0, click_ms=1_000)
    assert case.counts() == (1, 0, 1)  # a label of a record that doesn't fit


def test_a_correction_that_is_too_large_has_its_own_dead_letter():
    for rate, letters in ((1.0, 2), (0.5, 1)):
        case = Case(Life(WINDOW_MS, 0, HORIZON_MS, 0, rate))
        case.send(Sent(IMPRESSIONS, b"b", b"x" * 100, 1_000, reason="too_large"))
        case.click(b"b", 1_001)
        case.write("examples", None, b"[0]", {"kind": "left_out"} | ({"rate": "0.5"} if rate < 1 else {}))
        for _ in range(letters):
            case.dead_letter(IMPRESSIONS, 0, "too_large", b"")
        assert case.counts() == (0, 0, 0)
    case.records["dead_letters"].clear()
    assert case.counts() == (1, 0, 0)  # the rate leaves the negative out, but the correction is missing


def test_a_record_that_is_too_large_may_be_left_out_by_the_rate():
    """A rate of 0.5 leaves out the id b, so that no dead letter is expected."""
    case = Case(Life(WINDOW_MS, 3_000, HORIZON_MS, 0, 0.5))
    case.send(Sent(IMPRESSIONS, b"b", b"x" * 100, 1_000, reason="too_large"))
    case.leave_out(0)
    assert case.counts() == (0, 0, 0)
    case.dead_letter(IMPRESSIONS, 0, "too_large", b"")
    assert case.counts() == (0, 0, 1)
