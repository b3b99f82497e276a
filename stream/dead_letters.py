"""Dead letters: records that can't be used, kept as they came, with a reason code, an error text and where they came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

__all__ = ["ORIGINAL", "OUR_HEADERS", "REASONS", "REPLAY_HEADER", "DeadLetter", "Header"]

Header = tuple[str, bytes | None]

# Characters of an error text and of a path. Both may quote an id or a field's name as large as the record itself, which must
# still fit into `dead-letters`: twice this, at 4 bytes each, is far below the 64 KiB that the topic takes above its sources.
MAX_TEXT = 1_000

# Every reason code, and what it says. docs/events.md lists them; tests/test_docs.py holds the two together.
REASONS = {
    "empty_value": "the record has no value",
    "bad_utf8": "the value is not UTF-8",
    "malformed_json": "the value is not JSON",
    "missing_field": "a field that the contract asks for is not there",
    "wrong_type": "a field is there with another type than the contract's",
    "out_of_range": "a number is outside the range that the contract allows",
    "id_mismatch": "the id in the value is not the record's key",
    "future_timestamp": "the event time lies too far after the record's arrival",
    "late_impression": "the impression is older than watermark - window - dedupe horizon",
    "orphan_click": "no impression came for the click before its time ran out, or its time is outside the window",
    "not_finite": "a feature is NaN or infinite, or a number too large for a float",
    "nested": "a feature is an object or a list of other things than strings",
}


# On a record that `headrace dead-letters replay` has fed again: the letter it comes from, TOPIC/PARTITION/OFFSET.
REPLAY_HEADER = "headrace-replay-of"

# The headers that say why and from where, in this order before the original's own.
OUR_HEADERS = ("reason", "error", "path", "source_topic", "source_partition", "source_offset")
# Stands before the name of an original header that is called like one of ours (an example has a `source_offset` too), or that
# begins like this itself: taking one off again gives every name back.
ORIGINAL = "original."
# Original headers that get the prefix; further ones, which only a record made to harm has, are left out. 9 bytes each, so that
# this stays far below the 64 KiB too.
MAX_RENAMED = 1_000


class DeadLetter(NamedTuple):
    """A record on its way to `dead-letters`, bytes as received."""

    reason: str
    message: str
    path: str
    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[Header, ...] = ()

    @classmethod
    def of(cls, record: Any, reason: str, path: str, message: str) -> DeadLetter:
        """From an aiokafka ConsumerRecord."""
        return cls(
            reason,
            message,
            path,
            record.topic,
            record.partition,
            record.offset,
            record.key,
            record.value,
            tuple(record.headers),
        )

    def out_headers(self) -> list[Header]:
        """Headers of the record in `dead-letters`: ours first, then the original's under names that can't be taken for ours."""
        ours = (
            self.reason.encode(),
            self.message[:MAX_TEXT].encode(errors="replace"),
            self.path[:MAX_TEXT].encode(errors="replace"),
            self.topic.encode(),
            str(self.partition).encode(),
            str(self.offset).encode(),
        )
        return [*zip(OUR_HEADERS, ours, strict=True), *_renamed(self.headers)]


def _renamed(headers: Sequence[Header]) -> Iterator[Header]:
    left = MAX_RENAMED
    for name, value in headers:
        if name not in OUR_HEADERS and not name.startswith(ORIGINAL):
            yield name, value
        elif left:
            left -= 1
            yield ORIGINAL + name, value
