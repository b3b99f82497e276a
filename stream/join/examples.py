"""A labelled example as a Kafka record: the impression's own key and bytes, everything else in headers.

| header | value |
| --- | --- |
| `label` | `1` clicked, `0` not |
| `weight` | importance weight |
| `kind` | `first`, or `correction` of a label that went out before |
| `impression_ms`, `click_ms` | event times; `click_ms` only where there is a click |
| `source_offset` | the impression's offset in `impressions`: which record this labels, also where an id is used twice |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from stream.batches import Outgoing
from stream.join.logic import Example

__all__ = ["example_records", "label_of", "source_offset_of"]

_POSITIVE = (("label", b"1"), ("weight", b"1"), ("kind", b"first"))
_NEGATIVE = (("label", b"0"), ("weight", b"1"), ("kind", b"first"))


def example_records(examples: Iterable[Example]) -> Iterator[Outgoing]:
    """Records for `stream.batches.send_batches`."""
    for key, value, time_ms, offset, click_ms in examples:
        places = (("impression_ms", b"%d" % time_ms), ("source_offset", b"%d" % offset))
        if click_ms < 0:
            yield key, value, [*_NEGATIVE, *places]
        else:
            yield key, value, [*_POSITIVE, *places, ("click_ms", b"%d" % click_ms)]


def label_of(record: Any) -> bool:
    """Whether an example (ConsumerRecord) is positive."""
    return dict(record.headers)["label"] == b"1"


def source_offset_of(record: Any) -> int:
    """The offset in `impressions` of the record that an example labels."""
    return int(dict(record.headers)["source_offset"])
