"""A labelled example as a Kafka record: the impression's own key and bytes, everything else in headers.

| header | value |
| --- | --- |
| `label` | `1` clicked, `0` not |
| `weight` | importance weight |
| `kind` | `first`, or `correction` of a label that went out before |
| `impression_ms`, `click_ms` | event times; `click_ms` only where there is a click |
| `source_offset` | the impression's offset in `impressions`: which record this labels, also where an id is used twice |
| `rate` | share of negatives that went out when this did; absent where all did |

A record without a key is none of these. By its `kind` it is

- `left_out`: a JSON array of the `source_offset`s whose negatives were left out, with `rate` as above, and of those whose
  examples are too large. So what `examples` holds accounts for every impression;
- `matched`: a JSON array of [`source_offset`, `impression_ms`, `click_ms`], one for each click that was matched and waits for
  its impression's first label, and for each whose label is too large. A rebuild reads there what was decided, instead of
  guessing it from the clicks: a click that came to nothing before a late impression of its id arrived looks just like one
  that waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

import msgspec

from stream.join.logic import CORRECTION, FIRST, Example, Plan
from stream.kafka.batches import Outgoing
from stream.kafka.packed import pack_header, varint
from stream.records.dead_letter import DeadLetter

__all__ = [
    "Matched",
    "example_records",
    "left_out_of",
    "matched_of",
    "packed_plan",
    "plan_records",
    "record_count",
    "set_aside_too_large",
]

Matched = tuple[int, int, int]  # source offset, event time of the impression, event time of its click

_NEGATIVE, _POSITIVE = (("label", b"0"), ("weight", b"1")), (("label", b"1"), ("weight", b"1"))
_KINDS = {FIRST: (("kind", b"first"),), CORRECTION: (("kind", b"correction"),)}
_LEFT_OUT, _MATCHED = ("kind", b"left_out"), ("kind", b"matched")
# Of one record: at most 20 and 66 bytes each, below the smallest limit of the topic (64 KiB).
_LEFT_OUT_AT_ONCE, _MATCHED_AT_ONCE = 2_000, 900

# What an example is larger by than its key and value: headers with their longest values, and Kafka's own framing.
_HEADERS_BYTES = 512

_decode_offsets = msgspec.json.Decoder(list[int]).decode
_decode_matched = msgspec.json.Decoder(list[Matched]).decode


def plan_records(plan: Plan, negative_rate: float) -> Iterator[Outgoing]:
    """All that a step writes to `examples`. What was left out comes first: a correction of it may be among the others."""
    for start in range(0, len(plan.left_out), _LEFT_OUT_AT_ONCE):
        value = msgspec.json.encode(plan.left_out[start : start + _LEFT_OUT_AT_ONCE])
        yield None, value, [_LEFT_OUT, *_rate(negative_rate)]
    clicked = (*plan.held.items(), *plan.set_aside.items())
    matched = [(offset, time_ms, click_ms) for (time_ms, offset), click_ms in clicked]
    for start in range(0, len(matched), _MATCHED_AT_ONCE):
        yield None, msgspec.json.encode(matched[start : start + _MATCHED_AT_ONCE]), [_MATCHED]
    yield from example_records(plan.examples, negative_rate)


def record_count(plan: Plan) -> int:
    """How many records `plan_records` gives."""
    matched = len(plan.held) + len(plan.set_aside)
    return -(-len(plan.left_out) // _LEFT_OUT_AT_ONCE) - (-matched // _MATCHED_AT_ONCE) + len(plan.examples)


def example_records(examples: Iterable[Example], negative_rate: float = 1.0) -> Iterator[Outgoing]:
    """Records for `stream.kafka.batches.send_batches`."""
    rate = _rate(negative_rate)
    negatives = {kind: (*_NEGATIVE, *headers, *rate) for kind, headers in _KINDS.items()}
    positives = {kind: (*_POSITIVE, *headers, *rate) for kind, headers in _KINDS.items()}
    for key, value, time_ms, offset, click_ms, kind in examples:
        places = (("impression_ms", b"%d" % time_ms), ("source_offset", b"%d" % offset))
        if click_ms < 0:
            yield key, value, [*negatives[kind], *places]
        else:
            yield key, value, [*positives[kind], *places, ("click_ms", b"%d" % click_ms)]


def packed_plan(plan: Plan, negative_rate: float) -> Iterator[Outgoing]:
    """`plan_records` with the headers of examples packed: all but three numbers of them are the same in every example."""
    notes, examples = Plan(left_out=plan.left_out, held=plan.held, set_aside=plan.set_aside), plan.examples
    yield from plan_records(notes, negative_rate)
    rate = _rate(negative_rate)
    negative, positive = (
        {kind: _same([*label, *headers, *rate], numbers) for kind, headers in _KINDS.items()}
        for label, numbers in ((_NEGATIVE, 2), (_POSITIVE, 3))
    )
    for key, value, time_ms, offset, click_ms, kind in examples:
        at, source = b"%d" % time_ms, b"%d" % offset
        places = varint[len(at)] + at + _SOURCE_OFFSET + varint[len(source)] + source
        if click_ms < 0:
            yield key, value, negative[kind] + places
        else:
            yield key, value, positive[kind] + places + pack_header("click_ms", b"%d" % click_ms)


def _same(headers: list[tuple[str, bytes]], numbers: int) -> bytes:
    """The start of an example's packed headers, up to the value of `impression_ms`; so many numbers follow."""
    packed = b"".join([pack_header(name, value) for name, value in headers])
    return varint[len(headers) + numbers] + packed + _name("impression_ms")


def _name(header: str) -> bytes:
    return varint[len(header)] + header.encode()


_SOURCE_OFFSET = _name("source_offset")


def _rate(negative_rate: float) -> tuple[tuple[str, bytes], ...]:
    return () if negative_rate >= 1 else (("rate", repr(negative_rate).encode()),)


def set_aside_too_large(plan: Plan, max_bytes: int, topic: str, partition: int) -> None:
    """Make dead letters of the labels that `examples` doesn't take in a batch of `max_bytes`.

    Whether a label fits is judged when it leaves, so that labels which have not left yet may be judged by another limit after a
    restart. The impression is named as left out: a rebuild sees that it was accepted, and has its label; and as matched where
    the label is positive: a rebuild sees that it was clicked. A correction has a letter of its own, but where its first label
    has one in the same step: the negative may have fitted, or been left out.

    Args:
        topic: of impressions, with `partition` where the letters say that the bytes are.
    """
    if not plan.examples:
        return
    largest = max(map(len, map(itemgetter(1), plan.examples))) + max(map(len, map(itemgetter(0), plan.examples)))
    if largest + _HEADERS_BYTES <= max_bytes:
        return
    kept: list[Example] = []
    firsts: set[int] = set()  # a correction stands behind its negative
    for example in plan.examples:
        key, value, time_ms, offset, click_ms, kind = example
        if len(key) + len(value) + _HEADERS_BYTES <= max_bytes:
            kept.append(example)
            continue
        plan.counts["negatives"] -= click_ms < 0
        if click_ms >= 0:
            plan.set_aside[time_ms, offset] = click_ms
        if kind == CORRECTION and offset in firsts:
            continue
        message = f"expected an example of at most {max_bytes} bytes, found {len(key) + len(value)} in key and value alone"
        plan.dead.append(DeadLetter("too_large", message, "$", topic, partition, offset, key, value))
        if kind == FIRST:
            firsts.add(offset)
            plan.left_out.append(offset)
    plan.examples[:] = kept


def left_out_of(record: Any) -> list[int] | None:
    """The offsets in `impressions` whose negatives were left out, by a record (ConsumerRecord) of that kind, else None."""
    return _decode_offsets(record.value) if record.key is None and _LEFT_OUT in record.headers else None


def matched_of(record: Any) -> list[Matched] | None:
    """The clicks that wait for their impressions' labels, by a record (ConsumerRecord) of that kind, else None."""
    return _decode_matched(record.value) if record.key is None and _MATCHED in record.headers else None
