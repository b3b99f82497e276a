"""A dead letter: a record that can't be used, kept on `dead-letters` as it came, with the reason and where it came from.

The letter has the record's own key, value and headers. Before the record's headers stand these:

| header | value |
| --- | --- |
| `reason` | a code of `REASONS` |
| `error` | for people: what was expected and what was found |
| `path` | where in the record: `$.timestamp`, `headers.weight`, `key` |
| `source_topic`, `source_partition`, `source_offset` | where the record was read |
| `source_size` | only on a letter `too_large`: bytes of the record's key, value and headers |

A record that does not fit into `dead-letters` becomes a letter `too_large` without its bytes. (A producer that compresses can
send a record far larger than any topic's limit.) The origin headers then say where the bytes are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stream.records.packing import batch_bytes
from stream.records.record import Header, Outgoing, Record
from stream.records.unreadable import why_unreadable

__all__ = ["REASONS", "WITHOUT_BYTES", "DeadLetter", "Letter", "Origin", "read_letter"]

# Characters of an error text and of a path. Both may quote an id or a field's name as large as the record itself, which must
# still fit into `dead-letters`: twice this, at 4 bytes each, is far below the 64 KiB by which its limit exceeds its sources'.
MAX_TEXT = 1_000

# Every reason code, and what it says. docs/events.md lists them; tests/test_docs.py compares the two.
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

# The headers that say why and from where, in this order before the original's own.
OUR_HEADERS = ("reason", "error", "path", "source_topic", "source_partition", "source_offset")
# A letter `too_large` has this header instead of the original's own.
SIZE_HEADER = "source_size"
# A key of at most this many bytes stays on a letter `too_large`, so that people can find whose record it was.
MAX_KEY_KEPT = 1_000
# Prefix of an original header whose name is one of ours (an example has a `source_offset` too) or begins with this prefix.
# Taking one prefix off gives every original name back.
ORIGINAL = "original."
_RESERVED = frozenset((*OUR_HEADERS, SIZE_HEADER))
# Limit for original headers that get the prefix. Only a malicious record has more; the rest are left out. A prefix takes 9
# bytes, so all prefixes are far below the 64 KiB, too.
MAX_RENAMED = 1_000


class Origin(NamedTuple):
    """Where a record was read that became a dead letter. Two letters of one origin are two reports of one record."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"


class DeadLetter(NamedTuple):
    """A record on its way to `dead-letters`: why, where it was read, and its bytes as received."""

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
        """The letter of a record as it was read.

        A record that stands for unreadable ones (`stream.records.unreadable`) gets the reason `unreadable`, whatever the caller
        gives.
        """
        headers = tuple(record.headers)
        why = why_unreadable(record)
        if why is not None:
            reason, path, message, headers = "unreadable", "$", why, ()
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
        """The letter as a record for `dead-letters`, which takes batches of `max_bytes`.

        The record's bytes are left out when the letter would not fit, and when its reason is `too_large` already.
        """
        headers = self.out_headers()
        if self.reason != "too_large" and batch_bytes(self.key, self.value, headers) <= max_bytes:
            return self.key, self.value, headers
        size = sum(len(name.encode()) + len(content or b"") for name, content in self.headers)
        size += len(self.key or b"") + len(self.value or b"")
        small = self
        if self.reason != "too_large":
            found = f"{self.reason}: {self.message[: MAX_TEXT // 2]}"
            error = f"{found}; expected a dead letter of at most {max_bytes} bytes, found a record of {size}"
            small = self._replace(reason="too_large", message=error)
        key = self.key if self.key is not None and len(self.key) <= MAX_KEY_KEPT else None
        return key, None, [*small._replace(headers=()).out_headers(), (SIZE_HEADER, b"%d" % size)]

    def out_headers(self) -> list[Header]:
        """The letter's headers: ours first, then the original's under names that can't be taken for ours."""
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


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter as it was read; `headers` are the original record's own, under their own names."""

    partition: int
    offset: int
    arrived_ms: int
    reason: str
    error: str
    path: str
    origin: Origin
    key: bytes | None
    value: bytes | None
    headers: tuple[Header, ...]
    source_size: int | None = None
    """Bytes of the record when the letter does not have them; None when it has them, or when the size is not known."""

    @property
    def has_bytes(self) -> bool:
        """Whether the letter has the record's bytes. When it does not, only `origin` says where they are."""
        return self.reason not in WITHOUT_BYTES

    @property
    def name(self) -> str:
        """The letter's name on the command line: `PARTITION/OFFSET` in `dead-letters`."""
        return f"{self.partition}/{self.offset}"

    @property
    def size(self) -> int:
        """Bytes of key and value."""
        return len(self.key or b"") + len(self.value or b"")


def read_letter(record: Record) -> Letter | None:
    """The letter in a record of `dead-letters`; None for a receipt (`stream.records.replay`) and for records of others."""
    ours, theirs = record.headers[: len(OUR_HEADERS)], record.headers[len(OUR_HEADERS) :]
    if tuple(name for name, _ in ours) != OUR_HEADERS:
        return None
    values = {name: (value or b"").decode(errors="replace") for name, value in ours}
    try:
        origin = Origin(values["source_topic"], int(values["source_partition"]), int(values["source_offset"]))
        source_size = None
        if values["reason"] == "too_large" and theirs:
            name, value = theirs[0]
            if name == SIZE_HEADER:
                source_size, theirs = int(value or b""), theirs[1:]
    except ValueError:
        return None
    return Letter(
        partition=record.partition,
        offset=record.offset,
        arrived_ms=record.timestamp,
        reason=values["reason"],
        error=values["error"],
        path=values["path"],
        origin=origin,
        key=record.key,
        value=record.value,
        headers=tuple((name.removeprefix(ORIGINAL), value) for name, value in theirs),
        source_size=source_size,
    )
