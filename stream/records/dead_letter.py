"""Dead letters: records that can't be used, kept as they came, with a reason code, an error text and where they came from.

A record that `dead-letters` doesn't take becomes a letter `too_large` without its bytes, which says where they are. (A producer
that compresses can send a record far larger than any topic's limit.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stream.kafka.batch_reader import UNREADABLE_HEADER
from stream.kafka.batches import Outgoing, batch_bytes
from stream.records.record import Header, Record

__all__ = ["ORIGINAL", "OUR_HEADERS", "REASONS", "REPLAY_HEADER", "SIZE_HEADER", "WITHOUT_BYTES", "DeadLetter"]


# Characters of an error text and of a path. Both may quote an id or a field's name as large as the record itself, which must
# still fit into `dead-letters`: twice this, at 4 bytes each, is far below the 64 KiB that the topic takes above its sources.
MAX_TEXT = 1_000

# Every reason code, and what it says. docs/events.md lists them; tests/test_docs.py holds the two together.
REASONS = {
    "empty_value": "the record has no value",
    "bad_utf8": "the value is not UTF-8",
    "malformed_json": "the value is not JSON",
    "framed": "the value is a frame of a schema registry, and isn't decoded: `schema_registry.url` is not set",
    "unknown_schema": "the schema registry has no schema with the id of the frame",
    "unusable_schema": "the frame's schema can't be used: its type, its text, or something that it refers to",
    "malformed_frame": "the frame's payload does not fit its schema",
    "enveloped": "the value is an envelope of Kafka Connect or Debezium that `join.envelope` does not name",
    "missing_field": "a field that the contract asks for is not there",
    "wrong_type": "a field is there with another type than the contract's",
    "out_of_range": "a number is outside the range that the contract allows",
    "id_mismatch": "the id in the value is not the record's key",
    "future_timestamp": "the event time lies too far after the record's arrival",
    "late_impression": "the impression is older than watermark - window - dedupe horizon",
    "orphan_click": "no impression came for the click before its time ran out, or its time is outside the window",
    "not_finite": "a feature is NaN or infinite, or a number too large for a float",
    "not_finite_update": "learning the example would leave the model with numbers that are not finite, or beyond all bounds",
    "nested": "a feature is an object or a list of other things than strings",
    "too_large": "the record, or its example, is larger than the topic takes; its bytes are where it came from",
    "unreadable": "a batch that can't be decompressed or parsed, or is too large once decompressed; `error` names its offsets",
}
# Letters with these reasons have no bytes of the record.
WITHOUT_BYTES = frozenset(("too_large", "unreadable"))


# On a record that `headrace dead-letters replay` has fed again: the letter it comes from, TOPIC/PARTITION/OFFSET.
REPLAY_HEADER = "headrace-replay-of"

# The headers that say why and from where, in this order before the original's own.
OUR_HEADERS = ("reason", "error", "path", "source_topic", "source_partition", "source_offset")
# On a letter `too_large`, in the place of the original's own headers: bytes of the record's key, value and headers.
SIZE_HEADER = "source_size"
# A key up to here stays on a letter `too_large`, so that people can find whose record it was.
MAX_KEY_KEPT = 1_000
# Stands before the name of an original header that is called like one of ours (an example has a `source_offset` too), or that
# begins like this itself: taking one off again gives every name back.
ORIGINAL = "original."
_RESERVED = frozenset((*OUR_HEADERS, SIZE_HEADER))
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
    def of(cls, record: Record, reason: str, path: str, message: str) -> DeadLetter:
        """From an aiokafka ConsumerRecord.

        Where it stands in the place of records that can't be read (`stream.kafka.batch_reader`), the reason is `unreadable`.
        """
        headers = tuple(record.headers)
        if record.value is None and record.key is None and [name for name, _ in headers] == [UNREADABLE_HEADER]:
            reason, path, message, headers = "unreadable", "$", (headers[0][1] or b"").decode(errors="replace"), ()
        return cls(
            reason,
            message,
            path,
            record.topic,
            record.partition,
            record.offset,
            record.key,
            record.value,
            headers,
        )

    def outgoing(self, max_bytes: int) -> Outgoing:
        """Key, value and headers for `dead-letters`, which takes batches of `max_bytes`.

        A letter that wouldn't fit, and one whose reason is `too_large` already, go without the record's bytes.
        """
        headers = self.out_headers()
        if self.reason != "too_large" and batch_bytes(self.key, self.value, headers) <= max_bytes:
            return self.key, self.value, headers
        size = sum(len(name.encode()) + len(content or b"") for name, content in self.headers)
        size += len(self.key or b"") + len(self.value or b"")
        small = self
        if self.reason != "too_large":
            what = f"{self.reason}: {self.message[: MAX_TEXT // 2]}"
            told = f"{what}; expected a dead letter of at most {max_bytes} bytes, found a record of {size}"
            small = self._replace(reason="too_large", message=told)
        key = self.key if self.key is not None and len(self.key) <= MAX_KEY_KEPT else None
        return key, None, [*small._replace(headers=()).out_headers(), (SIZE_HEADER, b"%d" % size)]

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
        if name not in _RESERVED and not name.startswith(ORIGINAL):
            yield name, value
        elif left:
            left -= 1
            yield ORIGINAL + name, value
