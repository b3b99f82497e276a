"""What the join writes to `examples` for itself: records without a key, of two kinds.

- `left_out`: a JSON array of `source_offset`s. Their negatives were left out by `join.negative_rate` (the header `rate` holds
  it), or their examples are too large.
- `matched`: a JSON array of [`source_offset`, `impression_ms`, `click_ms`]. These clicks were matched and wait for the first
  label of their impression, or their label is too large. The header `click_arrived_ms` is a JSON array of their arrivals in
  Kafka, in the same order, -1 where an arrival is not known. The arrivals are no part of the value, so that versions which
  don't know them read the value.

With `left_out`, the topic accounts for every impression. With `matched`, a rebuild reads what was decided instead of guessing
it from the clicks: a click that became an orphan before its impression arrived looks just like one that waits for the label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from state.held_click import NOT_KNOWN_MS
from stream.records.example import CLICK_ARRIVED_MS, KIND, rate_header
from stream.records.record import Header, Outgoing, Record

__all__ = ["Matched", "is_note", "left_out_records", "matched_records", "note_count", "read_left_out", "read_matched"]

_LEFT_OUT: Header = (KIND, b"left_out")
_MATCHED: Header = (KIND, b"matched")
# Entries of one record: at most 20 and 86 bytes each (an arrival takes up to 20), so a record stays below the smallest limit of
# the topic (64 KiB).
_LEFT_OUT_ENTRIES, _MATCHED_ENTRIES = 2_000, 700


class Matched(NamedTuple):
    """A click that was matched. Its impression is named by offset and event time."""

    source_offset: int
    impression_ms: int
    click_ms: int
    arrived_ms: int = NOT_KNOWN_MS


_decode_offsets = msgspec.json.Decoder(list[int]).decode
_decode_matched = msgspec.json.Decoder(list[tuple[int, int, int]]).decode


def left_out_records(source_offsets: Sequence[int], negative_rate: float) -> Iterator[Outgoing]:
    """The records that say which impressions have no example."""
    headers = [_LEFT_OUT, *rate_header(negative_rate)]
    for start in range(0, len(source_offsets), _LEFT_OUT_ENTRIES):
        yield None, msgspec.json.encode(source_offsets[start : start + _LEFT_OUT_ENTRIES]), headers


def matched_records(clicks: Sequence[Matched]) -> Iterator[Outgoing]:
    """The records that say which clicks were matched."""
    for start in range(0, len(clicks), _MATCHED_ENTRIES):
        part = clicks[start : start + _MATCHED_ENTRIES]
        arrivals = msgspec.json.encode([click.arrived_ms for click in part])
        yield None, msgspec.json.encode([click[:3] for click in part]), [_MATCHED, (CLICK_ARRIVED_MS, arrivals)]


def note_count(left_out: int, matched: int) -> int:
    """The number of records that hold so many entries."""
    return -(-left_out // _LEFT_OUT_ENTRIES) - (-matched // _MATCHED_ENTRIES)


def is_note(record: Record) -> bool:
    """Whether a record of `examples` is one of these, and no example."""
    return record.key is None and (_LEFT_OUT in record.headers or _MATCHED in record.headers)


def read_left_out(record: Record) -> list[int] | None:
    """The offsets in a record `left_out`; None for every other record.

    Raises:
        msgspec.DecodeError: the record has that kind, but its value was written by somebody else.
    """
    return _decode_offsets(record.value or b"") if record.key is None and _LEFT_OUT in record.headers else None


def read_matched(record: Record) -> list[Matched] | None:
    """The clicks in a record `matched`; None for every other record. Raises as `read_left_out`."""
    if record.key is not None or _MATCHED not in record.headers:
        return None
    clicks = _decode_matched(record.value or b"")
    arrivals = next((value for name, value in record.headers if name == CLICK_ARRIVED_MS), None)
    if arrivals is None:  # written by a version that did not keep arrivals
        return [Matched(*click) for click in clicks]
    arrived_ms = _decode_offsets(arrivals)
    if len(arrived_ms) != len(clicks):
        raise msgspec.ValidationError(f"expected {len(clicks)} arrivals in {CLICK_ARRIVED_MS}, found {len(arrived_ms)}")
    return [Matched(*click, arrived) for click, arrived in zip(clicks, arrived_ms, strict=True)]
