"""The record that stands for records which could not be read.

A batch that can't be decompressed or parsed must not stop a partition. `stream.kafka.batch_reader` puts one record without key
and value at the first offset that is missing. Its only header names the missing offsets and the cause. `DeadLetter.of` makes a
letter with the reason `unreadable` from such a record.
"""

from __future__ import annotations

from stream.records.record import Header, Record

__all__ = ["UNREADABLE_HEADER", "unreadable_headers", "why_unreadable"]

UNREADABLE_HEADER = "headrace-unreadable"


def unreadable_headers(why: str) -> list[Header]:
    """The headers of a record that stands for unreadable ones."""
    return [(UNREADABLE_HEADER, why.encode(errors="replace"))]


def why_unreadable(record: Record) -> str | None:
    """Which offsets can't be read and why; None for every other record, such as one that carries a header of this name."""
    if record.key is not None or record.value is not None or len(record.headers) != 1:
        return None
    [(name, why)] = record.headers
    return (why or b"").decode(errors="replace") if name == UNREADABLE_HEADER else None
