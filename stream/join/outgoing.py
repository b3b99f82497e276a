"""What a plan writes to `examples`, and the labels that are too large for it."""

from __future__ import annotations

from collections.abc import Iterator

from state.held_click import HeldClick
from stream.join.plan import Plan
from stream.records.dead_letter import DeadLetter
from stream.records.example import CORRECTION, FIRST, Example, example_records, max_example_bytes
from stream.records.join_notes import Matched, left_out_records, matched_records, note_count
from stream.records.record import Outgoing

__all__ = ["outgoing_records", "record_count", "set_aside_too_large"]


def outgoing_records(plan: Plan, negative_rate: float) -> Iterator[Outgoing]:
    """All records of a step for `examples`. Negatives left out come first: a correction of one may be among the examples."""
    yield from left_out_records(plan.left_out, negative_rate)
    clicked = (*plan.held.items(), *plan.set_aside.items())
    yield from matched_records([Matched(offset, time_ms, *click) for (time_ms, offset), click in clicked])
    yield from example_records(plan.examples, negative_rate)


def record_count(plan: Plan) -> int:
    """How many records `outgoing_records` gives."""
    return note_count(len(plan.left_out), len(plan.held) + len(plan.set_aside)) + len(plan.examples)


def set_aside_too_large(plan: Plan, max_bytes: int, topic: str, partition: int) -> None:
    """Make dead letters of the labels that `examples` doesn't take in a batch of `max_bytes`.

    Whether a label fits is judged when it leaves. So a label that has not left yet may be judged by another limit after a
    restart.

    - The impression is named as left out: a rebuild sees that it was accepted, and has its label.
    - If the label is positive, its click is also named as matched: a rebuild sees that the impression was clicked.
    - A correction gets a letter of its own, unless its first label gets one in the same step. The first label has none if the
      negative fitted when it left, or was left out.

    Args:
        topic: full name of `impressions`; with `partition`, it says in the letters where the bytes are.
    """
    if not plan.examples:
        return
    longest_key = max((example.key for example in plan.examples), key=len)
    longest_value = max((example.value for example in plan.examples), key=len)
    if max_example_bytes(longest_key, longest_value) <= max_bytes:
        return
    kept: list[Example] = []
    firsts: set[int] = set()  # a correction comes after its negative
    for example in plan.examples:
        key, value, offset = example.key, example.value, example.source_offset
        if max_example_bytes(key, value) <= max_bytes:
            kept.append(example)
            continue
        plan.counts["negatives"] -= example.click_ms < 0
        if example.click_ms >= 0:
            plan.set_aside[example.impression_ms, offset] = HeldClick(example.click_ms, example.click_arrived_ms)
        if example.kind == CORRECTION and offset in firsts:
            continue
        message = f"expected an example of at most {max_bytes} bytes, found {len(key) + len(value)} in key and value alone"
        plan.dead.append(DeadLetter("too_large", message, "$", topic, partition, offset, key, value))
        if example.kind == FIRST:
            firsts.add(offset)
            plan.left_out.append(offset)
    plan.examples[:] = kept
