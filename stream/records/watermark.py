"""A watermark record: a record on `impressions` or `clicks` that says how far its producer has come in event time.

It has no value. Its header `headrace-watermark` holds a time in ms since the epoch, and the partition's source promises no
older event. Producers send one at the end of a replay, or while there are no events. The client writes them
(`headrace/events.py` has the header's name for itself, since the client imports nothing of ours).
"""

from __future__ import annotations

from stream.records.dead_letter import DeadLetter
from stream.records.record import Header, Record
from stream.records.times import MAX_AGE_MS, MAX_TIMESTAMP_MS, too_old

__all__ = ["WATERMARK_HEADER", "read_watermark", "watermark_header"]

WATERMARK_HEADER = "headrace-watermark"
_MAX_DIGITS = len(str(MAX_TIMESTAMP_MS))  # Python raises ValueError for numbers of thousands of digits


def watermark_header(time_ms: int) -> Header:
    """The header of a watermark record."""
    return WATERMARK_HEADER, b"%d" % time_ms


def read_watermark(record: Record, max_future_ms: int) -> DeadLetter | int:
    """The verdict on a record without a value: the time that it carries, or a dead letter.

    Args:
        max_future_ms: how far the time may lie after the record's arrival.
    """
    mark = dict(record.headers).get(WATERMARK_HEADER)
    if mark is None:
        return DeadLetter.of(record, "empty_value", "$", "expected a JSON object, found an empty value")
    if not (mark.isdigit() and len(mark) <= _MAX_DIGITS and int(mark) <= MAX_TIMESTAMP_MS):
        message = f"header {WATERMARK_HEADER}: expected milliseconds since the epoch, found {mark[:40]!r}"
        return DeadLetter.of(record, "out_of_range", "$", message)
    if record.timestamp - int(mark) > MAX_AGE_MS:
        message = f"header {WATERMARK_HEADER}: {too_old(int(mark), record.timestamp)}"
        return DeadLetter.of(record, "out_of_range", "$", message)
    if int(mark) - record.timestamp > max_future_ms:
        message = (
            f"header {WATERMARK_HEADER}: expected at most {max_future_ms} ms after the record's arrival at {record.timestamp} "
            f"(max_future_ms + window_ms + lateness_ms), found {int(mark)}"
        )
        return DeadLetter.of(record, "future_timestamp", "$", message)
    return int(mark)
