"""The demo's ledger: what it calls exactly once, and that it sees what isn't."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.structs import TopicPartition

from deploy.demo.audit import Audit, Ledger
from deploy.settings import Settings
from state.held_click import HeldClick
from stream.join.plan import Plan
from stream.records.dead_letter import DeadLetter, Origin
from stream.records.example import CORRECTION, FIRST, Example
from stream.records.record import Outgoing
from stream.records.replay import receipt
from tests.stream.join.written import written


class Topics:
    """Records as the audit reads them, of partition 1 of each topic."""

    def __init__(self) -> None:
        self.audit = Audit(Settings())

    def add(self, topic: str, records: Iterable[Outgoing], first: int = 0) -> None:
        self.audit._add(
            TopicPartition(topic, 1),
            [
                SimpleNamespace(
                    key=key, value=value, headers=headers, offset=first + index, partition=1, timestamp=1_000 + first + index
                )
                for index, (key, value, headers) in enumerate(records)
            ],
        )

    def sent(self, *keys: bytes, clicked: Iterable[bytes] = ()) -> Topics:
        self.add("impressions", [(key, b"{}", []) for key in keys])
        self.add("clicks", [(key, b"{}", []) for key in clicked])
        return self

    def written(self, plan: Plan, rate: float = 1.0) -> Topics:
        self.add("examples", written(plan, rate), first=100)
        return self

    @property
    def ledger(self) -> Ledger:
        return self.audit.ledger


def example(key: bytes, offset: int, kind: str = FIRST, click_ms: int = -1) -> Example:
    return Example(key, b"{}", 5, offset, click_ms, kind)


def test_each_impression_is_labelled_or_left_out_once() -> None:
    topics = Topics().sent(b"a", b"b", b"c", b"d", clicked=[b"b"])
    topics.written(Plan(examples=[example(b"a", 0), example(b"b", 1, click_ms=7)], left_out=[2, 3]), 0.5)
    ledger = topics.ledger
    assert ledger.problems() == []
    assert (len(ledger.impressions), ledger.labels.total(), ledger.left_out.total()) == (4, 2, 2)
    assert (ledger.clicks, ledger.clicked_at_ms, ledger.positives) == (1, {b"b": 1_000}, {b"b": (1, 101 + 1)})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda plan: plan.left_out.remove(3), "1 impressions without a label: d"),
        (
            lambda plan: plan.left_out.__setitem__(1, 2),
            ["1 impressions without a label: d", "1 impressions with two labels: c"],
        ),
        (lambda plan: plan.left_out.append(0), "1 impressions with two labels: a"),
        (lambda plan: plan.left_out.append(9), "1 impressions labelled, but never sent: offset 9 of partition 1"),
        (lambda plan: plan.examples.pop(), "1 impressions without a label: b"),
        (lambda plan: plan.examples.append(example(b"a", 0)), "1 impressions with two labels: a"),
        (lambda plan: plan.examples.append(example(b"e", 9)), "1 impressions labelled, but never sent: e"),
    ],
)
def test_what_is_lost_is_named_and_nothing_makes_up_for_it(change: Callable[[Plan], Any], problem: str | list[str]) -> None:
    plan = Plan(examples=[example(b"a", 0), example(b"b", 1)], left_out=[2, 3])
    change(plan)
    found = Topics().sent(b"a", b"b", b"c", b"d").written(plan, 0.5).ledger.problems()
    assert found == ([problem] if isinstance(problem, str) else problem)


def test_corrections() -> None:
    negatives = [example(b"a", 0), example(b"b", 1)]
    good = [*negatives, example(b"b", 1, CORRECTION, 7), example(b"c", 2, CORRECTION, 8)]
    for more, problem in (
        ([], []),
        ([example(b"b", 1, CORRECTION, 7)], ["1 impressions with two corrections: b"]),
        ([example(b"a", 0, CORRECTION, 7)], ["1 impressions corrected, but never clicked: a"]),
        ([example(b"x", 9, CORRECTION, 7)], ["1 impressions corrected, but never labelled: x"]),
    ):
        topics = Topics().sent(b"a", b"b", b"c", clicked=[b"b", b"c", b"x"])
        topics.written(Plan(examples=[*good, *more], left_out=[2], held={(5, 3): HeldClick(9)}), 0.5)
        assert topics.ledger.problems() == problem
        assert topics.ledger.labels == {b"a": 1, b"b": 1}


def test_the_receipt_of_a_replay_is_no_dead_letter() -> None:
    topics = Topics()
    letter = DeadLetter("late_impression", "late", "$", "impressions", 1, 0, b"a", b"{}")
    records: list[Any] = [(letter.key, letter.value, letter.out_headers()), receipt([Origin("impressions", 1, 0)], "me@here")]
    topics.add("dead-letters", records)
    assert topics.ledger.dead_letters == {"late_impression": 1}
