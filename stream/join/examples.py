"""A labelled example as a Kafka record: the impression's own key and bytes, everything else in headers.

| header | value |
| --- | --- |
| `label` | `1` clicked, `0` not |
| `weight` | importance weight |
| `kind` | `first`, or `correction` of a label that went out before |
| `impression_ms`, `click_ms` | event times; `click_ms` only where there is a click |
| `source_offset` | the impression's offset in `impressions`: which record this labels, also where an id is used twice |
| `policy` | `fnw` where the impression lives by that; absent under `wait` |
| `rate` | share of negatives that went out when this did; absent where all did |

A record without a key is none of these: its `kind` is `left_out`, and its value a JSON array of the `source_offset`s whose
negatives were left out, with `policy` and `rate` as above. So what `examples` holds accounts for every impression.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from stream.batches import Outgoing
from stream.join.logic import CORRECTION, FAKE, FIRST, Example, Plan

__all__ = ["click_awaited", "example_records", "label_of", "left_out_of", "plan_records", "record_count", "source_offset_of"]

Headers = Mapping[str, bytes]

_FNW = ("policy", b"fnw")
_NEGATIVE, _POSITIVE = (("label", b"0"), ("weight", b"1")), (("label", b"1"), ("weight", b"1"))
_KINDS = {
    FIRST: (("kind", b"first"),),
    FAKE: (("kind", b"first"), _FNW),
    CORRECTION: (("kind", b"correction"), _FNW),
}
# Offsets in one record: 20 bytes each at most, far below the smallest limit of the topic (64 KiB).
_LEFT_OUT_AT_ONCE = 2_000

_decode_offsets = msgspec.json.Decoder(list[int]).decode


def plan_records(plan: Plan, negative_rate: float) -> Iterator[Outgoing]:
    """All that a step writes to `examples`. What was left out comes first: a correction of it may be among the others."""
    for offsets, policy in ((plan.left_out, ()), (plan.left_out_fake, (_FNW,))):
        for start in range(0, len(offsets), _LEFT_OUT_AT_ONCE):
            value = msgspec.json.encode(offsets[start : start + _LEFT_OUT_AT_ONCE])
            yield None, value, [("kind", b"left_out"), *policy, *_rate(negative_rate)]
    yield from example_records(plan.examples, negative_rate)


def record_count(plan: Plan) -> int:
    """How many records `plan_records` gives."""
    left_out = sum(-(-len(offsets) // _LEFT_OUT_AT_ONCE) for offsets in (plan.left_out, plan.left_out_fake))
    return left_out + len(plan.examples)


def example_records(examples: Iterable[Example], negative_rate: float = 1.0) -> Iterator[Outgoing]:
    """Records for `stream.batches.send_batches`."""
    rate = _rate(negative_rate)
    negatives = {kind: (*_NEGATIVE, *headers, *rate) for kind, headers in _KINDS.items()}
    positives = {kind: (*_POSITIVE, *headers, *rate) for kind, headers in _KINDS.items()}
    for key, value, time_ms, offset, click_ms, kind in examples:
        places = (("impression_ms", b"%d" % time_ms), ("source_offset", b"%d" % offset))
        if click_ms < 0:
            yield key, value, [*negatives[kind], *places]
        else:
            yield key, value, [*positives[kind], *places, ("click_ms", b"%d" % click_ms)]


def _rate(negative_rate: float) -> tuple[tuple[str, bytes], ...]:
    return () if negative_rate >= 1 else (("rate", repr(negative_rate).encode()),)


def label_of(headers: Headers) -> bool:
    """Whether an example is positive."""
    return headers["label"] == b"1"


def source_offset_of(headers: Headers) -> int:
    """The offset in `impressions` of the record that an example labels."""
    return int(headers["source_offset"])


def left_out_of(record: Any) -> list[int] | None:
    """The offsets in `impressions` whose negatives were left out, by a record (ConsumerRecord) of that kind, else None."""
    return _decode_offsets(record.value) if record.key is None else None


def click_awaited(headers: Headers) -> bool:
    """Whether a correction may follow: this is a negative of policy `fnw`, sent or left out."""
    return headers.get("policy") == b"fnw" and headers["kind"] != b"correction"
