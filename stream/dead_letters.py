"""Dead letters: records that can't be used, kept as they came, with a reason code, an error text and where they came from."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["REASONS", "DeadLetter", "Header"]

Header = tuple[str, bytes]

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
        """Headers of the record in `dead-letters`: ours first, then the original's own."""
        return [
            ("reason", self.reason.encode()),
            ("error", self.message[:MAX_TEXT].encode(errors="replace")),
            ("path", self.path[:MAX_TEXT].encode(errors="replace")),
            ("source_topic", self.topic.encode()),
            ("source_partition", str(self.partition).encode()),
            ("source_offset", str(self.offset).encode()),
            *self.headers,
        ]
