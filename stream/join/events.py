"""Reading a run of impressions or clicks: the envelope only (id, event time, well-formed JSON).

The fast path decodes a whole run in one call. A run that it doesn't accept takes two more attempts:

- If its values may be in another format (`stream.formats`), they are opened, and the fast path is tried again.
- Then each record goes through `_read_one`, which decides.

The fast path and `_read_one` use the same decoder, so they agree by construction when the run is one object a line. The fast
path accepts no value that is in another format.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from stream.formats import Formats, Refused
from stream.formats.hints import about_enveloped, about_key, about_unread, about_wrapped_string
from stream.join.wrong_fields import about_field
from stream.records.dead_letter import DeadLetter
from stream.records.record import Record
from stream.records.times import MAX_AGE_MS, MAX_TIMESTAMP_MS, too_old
from stream.records.watermark import read_watermark

log = logging.getLogger(__name__)

__all__ = ["Events", "read_run"]


class _Envelope(msgspec.Struct):
    impression_id: Annotated[str, msgspec.Meta(min_length=1)]
    timestamp: Annotated[int, msgspec.Meta(ge=0, le=MAX_TIMESTAMP_MS)]


_decoder = msgspec.json.Decoder(_Envelope)
# A value as JSON, as it came or decoded from another format; or why there is no JSON; None when the record has no value.
_Opened = bytes | Refused | None


@dataclass(slots=True)
class Events:
    """The usable events of one run, as columns, and what else was found in it.

    `values` are the contract's JSON. `records` have the bytes as they came, which may be in another format.
    """

    keys: list[bytes] = field(default_factory=list)
    times_ms: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    arrivals_ms: list[int] = field(default_factory=list)  # when each record arrived at the broker
    dead: list[DeadLetter] = field(default_factory=list)
    watermark_ms: int = -1  # the largest watermark record, -1 without one
    front_ms: int | None = None  # how far the source has come with this run; `SourceClock` sets it
    ahead: int = 0  # number of events ahead of their arrival; `SourceClock` sets it

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def newest_ms(self) -> int:
        """The event time up to which the source has come; -1 when that isn't known."""
        return max(self.times_ms, default=-1) if self.front_ms is None else self.front_ms


def read_run(
    records: Sequence[Record],
    max_future_ms: int,
    max_watermark_future_ms: int,
    formats: Formats | None = None,
    form: str = "",
) -> Events:
    """Read the envelopes of one run: records of one partition, in order of offset.

    These become dead letters:

    - an event more than `max_future_ms` ahead of its own arrival. The record's Kafka timestamp is compared and not the clock,
      so that a replay decides the same;
    - a watermark record more than `max_watermark_future_ms` ahead, which would make every later impression late;
    - a record of either kind whose time is more than `MAX_AGE_MS` before its arrival: such a time is in seconds, or made up.

    Args:
        formats: opens values in another format than plain JSON. `Formats.prepare` must have had these records.
        form: the formats to look for; none when it is empty.
    """
    values: list[_Opened] = [record.value for record in records]
    fast = _read_fast(records, max_future_ms, values)
    if fast is None and formats is not None and form:
        values = formats.open(records, form)
        fast = _read_fast(records, max_future_ms, values)
    return fast if fast is not None else _read_slow(records, max_future_ms, max_watermark_future_ms, values)


def _read_fast(records: Sequence[Record], max_future_ms: int, values: Sequence[_Opened]) -> Events | None:
    """Decode a run, whose opened values are `values`, in one call; None when any record must be checked alone."""
    keys = [record.key for record in records]
    try:
        lines = b"\n".join(values)  # type: ignore[arg-type]  # TypeError for what is not bytes
        # The decoder reads objects, not lines. With a closing and an opening brace at every line break, and no other line
        # breaks, no object can cross a line break (there would have to be a comma, or a string around it). So every line has at
        # least one object, and as many objects as lines means one object each.
        breaks = max(len(values) - 1, 0)
        if lines.count(b"\n") != breaks or lines.count(b"}\n{") != breaks:
            return None
        lines.decode()
        envelopes = _decoder.decode_lines(lines)
    except (TypeError, UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return None
    if [envelope.impression_id.encode() for envelope in envelopes] != keys:
        return None
    times = [envelope.timestamp for envelope in envelopes]
    arrivals = [record.timestamp for record in records]
    if records and (max(times) - min(arrivals) > max_future_ms or max(arrivals) - min(times) > MAX_AGE_MS):
        return None
    # `values` are bytes and `keys` are ids by now.
    return Events(keys, times, [record.offset for record in records], values, list(records), arrivals)  # type: ignore[arg-type]


def _read_slow(
    records: Sequence[Record], max_future_ms: int, max_watermark_future_ms: int, values: Sequence[_Opened]
) -> Events:
    events = Events()
    for record, value in zip(records, values, strict=True):
        if isinstance(value, Refused):
            events.dead.append(DeadLetter.of(record, *value))
            continue
        try:
            verdict = _read_one(record, value, max_future_ms) if value else read_watermark(record, max_watermark_future_ms)
        except Exception as error:  # one record must not end all workers that read it
            log.exception("%s/%s/%s could not be judged", record.topic, record.partition, record.offset)
            message = f"expected an event, found one that can't be read ({type(error).__name__})"
            verdict = DeadLetter.of(record, "malformed_json", "$", message)
        if isinstance(verdict, DeadLetter):
            events.dead.append(verdict)
        elif isinstance(verdict, int):
            events.watermark_ms = max(events.watermark_ms, verdict)
        else:
            events.keys.append(record.key)  # type: ignore[arg-type]  # not None: it is the id
            events.times_ms.append(verdict.timestamp)
            events.offsets.append(record.offset)
            events.values.append(value)  # type: ignore[arg-type]  # not None: it had an envelope
            events.arrivals_ms.append(record.timestamp)
            events.records.append(record)
    return events


def _read_one(record: Record, value: bytes, max_future_ms: int) -> _Envelope | DeadLetter:
    """The verdict on one record with this value in JSON: its envelope, or a dead letter."""
    hint = about_unread(value)
    if hint is not None:
        return DeadLetter.of(record, *hint)
    try:
        value.decode()
    except UnicodeDecodeError as error:
        return DeadLetter.of(record, "bad_utf8", "$", f"expected UTF-8, found byte {value[error.start]:#04x} at {error.start}")
    try:
        envelope = _decoder.decode(value)
    except msgspec.ValidationError as error:
        return DeadLetter.of(record, *_not_the_contract(value, str(error), record.timestamp))
    except RecursionError:
        return DeadLetter.of(record, "malformed_json", "$", "expected JSON nested less than some 600 levels deep")
    except msgspec.DecodeError as error:
        return DeadLetter.of(record, "malformed_json", "$", str(error))
    if envelope.impression_id.encode() != record.key:
        found = about_key(record.key, envelope.impression_id)
        message = f"expected the id {envelope.impression_id!r} as the record's key, found {found}"
        return DeadLetter.of(record, "id_mismatch", "$.impression_id", message)
    if record.timestamp - envelope.timestamp > MAX_AGE_MS:
        return DeadLetter.of(record, "out_of_range", "$.timestamp", too_old(envelope.timestamp, record.timestamp))
    if envelope.timestamp - record.timestamp > max_future_ms:
        message = (
            f"expected at most {max_future_ms} ms after the record's arrival at {record.timestamp}, found {envelope.timestamp}"
        )
        return DeadLetter.of(record, "future_timestamp", "$.timestamp", message)
    return envelope


def _not_the_contract(value: bytes, text: str, arrival_ms: int) -> Refused:
    """The verdict on JSON that is no event, from the text of msgspec's error."""
    path = _path_in(text)
    if "missing required field" in text:
        return about_enveloped(value) or Refused("missing_field", path, text)
    if path == "$":
        return Refused("wrong_type", path, text + about_wrapped_string(value))
    beyond = any(mark in text for mark in ("Expected `int` >=", "Expected `int` <=", "length >=", "out of range"))
    return Refused("out_of_range" if beyond else "wrong_type", path, about_field(value, path, arrival_ms) or text)


def _path_in(text: str) -> str:
    """The path at the end of msgspec's text, `… - at `$.timestamp``. The text about a missing field names the field instead."""
    if " - at `" in text:
        return text.rsplit(" - at `", 1)[1].rstrip("`")
    if "missing required field `" in text:
        return "$." + text.split("missing required field `", 1)[1].split("`", 1)[0]
    return "$"
