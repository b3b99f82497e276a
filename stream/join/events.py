"""Reading a run of impressions or clicks: the envelope only (id, event time, well-formed JSON).

The fast path decodes a whole run in one call. Whatever it can't vouch for is opened first where its values may be in another
format (`stream.formats`), and goes record by record through `_read_one`, which has the last word: both use the same decoder, so
they agree by construction where the run is one object a line. No value that is in another format passes the fast path as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from stream.formats import Formats, Refused
from stream.formats.hints import about_enveloped, about_key, about_unread, about_wrapped_string
from stream.join.wrong_fields import about_field
from stream.records.dead_letter import DeadLetter
from stream.records.times import MAX_AGE_MS, wrong_unit

log = logging.getLogger(__name__)

__all__ = ["MAX_TIMESTAMP_MS", "WATERMARK_HEADER", "Events", "read_run"]

WATERMARK_HEADER = "headrace-watermark"
MAX_TIMESTAMP_MS = 253_402_300_799_999  # the end of year 9999, the last that ISO 8601 writes in four digits
_MAX_DIGITS = len(str(MAX_TIMESTAMP_MS))  # of a watermark record: Python refuses to read thousands


class _Envelope(msgspec.Struct):
    impression_id: Annotated[str, msgspec.Meta(min_length=1)]
    timestamp: Annotated[int, msgspec.Meta(ge=0, le=MAX_TIMESTAMP_MS)]


_decoder = msgspec.json.Decoder(_Envelope)
# Of a value: JSON as it came or as it was opened, or why there is none.
_Opened = bytes | Refused | None


@dataclass(slots=True)
class Events:
    """The usable events of one run, column by column, and what was found beside them.

    `values` are the contract's JSON; `records` have the bytes as they came, which may be in another format.
    """

    keys: list[bytes] = field(default_factory=list)
    times_ms: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)
    arrivals_ms: list[int] = field(default_factory=list)  # at the broker
    dead: list[DeadLetter] = field(default_factory=list)
    watermark_ms: int = -1  # the largest watermark record, -1 without one
    front_ms: int | None = None  # how far the source has come with this run; `SourceClock` says it
    ahead: int = 0  # events ahead of their arrival, by `SourceClock`

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def newest_ms(self) -> int:
        """The event time up to which the source has come, -1 where that isn't known."""
        return max(self.times_ms, default=-1) if self.front_ms is None else self.front_ms


def read_run(
    records: Sequence[Any],
    max_future_ms: int,
    max_watermark_future_ms: int,
    formats: Formats | None = None,
    form: str = "",
) -> Events:
    """Read the envelopes of one run (aiokafka ConsumerRecords of one partition, in order of offset).

    An event more than `max_future_ms` ahead of its own arrival (the record's Kafka timestamp) is a dead letter: judged against
    the record and not against the clock, so that a replay decides the same. So is a watermark record that is more than
    `max_watermark_future_ms` ahead: believed, it would make every later impression late. And so are both when they lie more
    than `MAX_AGE_MS` before their arrival: such a time is in seconds, or made up.

    Args:
        formats: opens values that are in another format than plain JSON; `prepare` must have had these records.
        form: which formats are looked for; none where it is empty.
    """
    values: list[_Opened] = [record.value for record in records]
    fast = _read_fast(records, max_future_ms, values)
    if fast is None and formats is not None and form:
        values = formats.open(records, form)
        fast = _read_fast(records, max_future_ms, values)
    return fast if fast is not None else _read_slow(records, max_future_ms, max_watermark_future_ms, values)


def _read_fast(records: Sequence[Any], max_future_ms: int, opened: Sequence[_Opened] | None = None) -> Events | None:
    """Decode a run in one call; None where any record needs a closer look."""
    values: Any = [record.value for record in records] if opened is None else opened
    keys = [record.key for record in records]
    try:
        lines = b"\n".join(values)
        # The decoder takes objects as they come, not lines. With a closing and an opening brace at every line break, and no
        # other line breaks, no object can go on over one (a comma would have to stand there, or a string would have to hold
        # it), so every line has at least one object, and as many objects as lines means one each.
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
    return Events(keys, times, [record.offset for record in records], values, list(records), arrivals)


def _read_slow(
    records: Sequence[Any], max_future_ms: int, max_watermark_future_ms: int, opened: Sequence[_Opened] | None = None
) -> Events:
    events = Events()
    values = [record.value for record in records] if opened is None else opened
    for record, value in zip(records, values, strict=True):
        if isinstance(value, Refused):
            events.dead.append(DeadLetter.of(record, *value))
            continue
        try:
            verdict = _read_one(record, value, max_future_ms) if value else _read_mark(record, max_watermark_future_ms)
        except Exception as error:  # one record must not end every worker that reads it
            log.exception("%s/%s/%s could not be judged", record.topic, record.partition, record.offset)
            message = f"expected an event, found one that can't be read ({type(error).__name__})"
            verdict = DeadLetter.of(record, "malformed_json", "$", message)
        if isinstance(verdict, DeadLetter):
            events.dead.append(verdict)
        elif isinstance(verdict, int):
            events.watermark_ms = max(events.watermark_ms, verdict)
        else:
            events.keys.append(record.key)
            events.times_ms.append(verdict.timestamp)
            events.offsets.append(record.offset)
            events.values.append(value)  # type: ignore[arg-type]  # not None: it had an envelope
            events.arrivals_ms.append(record.timestamp)
            events.records.append(record)
    return events


def _read_mark(record: Any, max_future_ms: int) -> DeadLetter | int:
    """The verdict on a record without a value: the time of a watermark record, or a dead letter."""
    mark = dict(record.headers).get(WATERMARK_HEADER)
    if mark is None:
        return DeadLetter.of(record, "empty_value", "$", "expected a JSON object, found an empty value")
    if not (mark.isdigit() and len(mark) <= _MAX_DIGITS and int(mark) <= MAX_TIMESTAMP_MS):
        message = f"header {WATERMARK_HEADER}: expected milliseconds since the epoch, found {mark[:40]!r}"
        return DeadLetter.of(record, "out_of_range", "$", message)
    if record.timestamp - int(mark) > MAX_AGE_MS:
        message = f"header {WATERMARK_HEADER}: {_too_old(int(mark), record.timestamp)}"
        return DeadLetter.of(record, "out_of_range", "$", message)
    if int(mark) - record.timestamp > max_future_ms:
        message = (
            f"header {WATERMARK_HEADER}: expected at most {max_future_ms} ms after the record's arrival at {record.timestamp} "
            f"(max_future_ms + window_ms + lateness_ms), found {int(mark)}"
        )
        return DeadLetter.of(record, "future_timestamp", "$", message)
    return int(mark)


def _read_one(record: Any, value: bytes, max_future_ms: int) -> _Envelope | DeadLetter:
    """The verdict on one record by its value in JSON: its envelope, or a dead letter."""
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
        return DeadLetter.of(record, "out_of_range", "$.timestamp", _too_old(envelope.timestamp, record.timestamp))
    if envelope.timestamp - record.timestamp > max_future_ms:
        message = (
            f"expected at most {max_future_ms} ms after the record's arrival at {record.timestamp}, found {envelope.timestamp}"
        )
        return DeadLetter.of(record, "future_timestamp", "$.timestamp", message)
    return envelope


def _not_the_contract(value: bytes, text: str, arrival_ms: int) -> Refused:
    """What is wrong with JSON that msgspec, in this text, says is no event."""
    path = _path_in(text)
    if "missing required field" in text:
        return about_enveloped(value) or Refused("missing_field", path, text)
    if path == "$":
        return Refused("wrong_type", path, text + about_wrapped_string(value))
    beyond = any(mark in text for mark in ("Expected `int` >=", "Expected `int` <=", "length >=", "out of range"))
    return Refused("out_of_range" if beyond else "wrong_type", path, about_field(value, path, arrival_ms) or text)


def _too_old(time: int, arrival_ms: int) -> str:
    expected = f"expected milliseconds since 1970, at most 40 years before the record's arrival at {arrival_ms}"
    return f"{expected}, found {time}{wrong_unit(time, arrival_ms)}"


def _path_in(text: str) -> str:
    """The path that msgspec's message ends with: `… - at `$.timestamp``; a missing field is named in the message."""
    if " - at `" in text:
        return text.rsplit(" - at `", 1)[1].rstrip("`")
    if "missing required field `" in text:
        return "$." + text.split("missing required field `", 1)[1].split("`", 1)[0]
    return "$"
