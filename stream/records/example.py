"""An example: a labelled impression, as a record on `examples`.

The record has the impression's own key and value. The label is in the headers:

| header | value |
| --- | --- |
| `label` | `1` clicked, `0` not |
| `weight` | importance weight, 0 to 10,000; the join writes `1` |
| `kind` | `first`, `correction` of a label that was sent before, or `replay` of a first label; without it, `first` |
| `impression_ms`, `click_ms` | event times; `click_ms` only when there is a click |
| `click_arrived_ms` | arrival of the click in Kafka, by the broker's clock; only when there is a click and it is known |
| `source_offset` | the impression's offset in `impressions`: it names the labelled record even when an id is used twice |
| `rate` | share of negatives that were sent at the time of this example, 0.0001 to 1; absent when all were |

This file holds every header of the topic. The records without a key are in `stream.records.join_notes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from state.held_click import NOT_KNOWN_MS
from stream.records.dead_letter import DeadLetter
from stream.records.packing import pack_header, varint
from stream.records.record import Header, Outgoing, Record
from stream.records.times import MAX_TIMESTAMP_MS

__all__ = [
    "CLICK_ARRIVED_MS",
    "CORRECTION",
    "FIRST",
    "KIND",
    "REPLAY",
    "Example",
    "ExampleColumns",
    "example_records",
    "max_example_bytes",
    "rate_header",
    "read_example",
    "read_examples",
    "replayed_example",
]

FIRST = "first"
CORRECTION = "correction"  # of a label that was sent before and was the other one
REPLAY = "replay"  # of a first label that became a dead letter; the impression has had its `first`

_LABEL, _WEIGHT, KIND, _RATE = "label", "weight", "kind", "rate"
_IMPRESSION_MS, _CLICK_MS, _SOURCE_OFFSET = "impression_ms", "click_ms", "source_offset"
CLICK_ARRIVED_MS = "click_arrived_ms"
_CLICKED, _NOT_CLICKED = b"1", b"0"
_KINDS = {FIRST.encode(): FIRST, CORRECTION.encode(): CORRECTION, REPLAY.encode(): REPLAY}
_FIRST, _CORRECTION = FIRST.encode(), CORRECTION.encode()

# The most that headers and Kafka's own framing add to an example's key and value.
_HEADERS_BYTES = 512
# Any number of 18 digits fits an int64. `MAX_TIMESTAMP_MS` has 15.
_MAX_DIGITS = 18
# An example of this weight counts as 10,000 examples. Adagrad keeps the squares of gradients: after one example of weight
# 10,000, a row learns as slowly as after a hundred million examples of weight 1.
MAX_WEIGHT = 10_000.0
# At this rate a negative weighs 10,000, the largest weight. `join.negative_rate` has the same bound.
MIN_RATE = 1e-4


class Example(msgspec.Struct, frozen=True, gc=False):
    """One label of an impression. A struct without garbage collection: the join makes one for each impression."""

    key: bytes
    value: bytes
    impression_ms: int
    source_offset: int
    click_ms: int
    """-1 when the label is 0."""
    kind: str
    click_arrived_ms: int = NOT_KNOWN_MS
    """When the click arrived in Kafka; -1 when the label is 0, or when the arrival is not known."""


def rate_header(negative_rate: float) -> tuple[Header, ...]:
    """The header that says which share of negatives is sent; none when all are."""
    return () if negative_rate >= 1 else ((_RATE, repr(negative_rate).encode()),)


def max_example_bytes(key: bytes, value: bytes) -> int:
    """The most that a batch with an example of this key and value takes."""
    return len(key) + len(value) + _HEADERS_BYTES


def example_records(examples: Iterable[Example], negative_rate: float) -> Iterator[Outgoing]:
    """Records of first labels and corrections, with packed headers. All headers but two to four are packed once."""
    negative, unknown, positive = (
        {kind: _packed_start(label, kind, negative_rate, numbers) for kind in (FIRST, CORRECTION)}
        for label, numbers in ((_NOT_CLICKED, 2), (_CLICKED, 3), (_CLICKED, 4))
    )
    for example in examples:
        at, source, click_ms = b"%d" % example.impression_ms, b"%d" % example.source_offset, example.click_ms
        numbers = varint[len(at)] + at + _PACKED_SOURCE_OFFSET + varint[len(source)] + source
        if click_ms < 0:
            yield example.key, example.value, negative[example.kind] + numbers
            continue
        numbers += pack_header(_CLICK_MS, b"%d" % click_ms)
        if example.click_arrived_ms < 0:
            yield example.key, example.value, unknown[example.kind] + numbers
        else:
            arrived = pack_header(CLICK_ARRIVED_MS, b"%d" % example.click_arrived_ms)
            yield example.key, example.value, positive[example.kind] + numbers + arrived


def _packed_start(label: bytes, kind: str, negative_rate: float, numbers: int) -> bytes:
    """Packed headers up to the value of `impression_ms`, the first of the `numbers` last headers, which hold numbers."""
    headers = ((_LABEL, label), (_WEIGHT, b"1"), (KIND, kind.encode()), *rate_header(negative_rate))
    packed = b"".join([pack_header(name, value) for name, value in headers])
    return varint[len(headers) + numbers] + packed + _packed_name(_IMPRESSION_MS)


def _packed_name(header: str) -> bytes:
    return varint[len(header)] + header.encode()


_PACKED_SOURCE_OFFSET = _packed_name(_SOURCE_OFFSET)


def replayed_example(headers: Iterable[Header]) -> list[Header]:
    """The headers of an example that a replay of dead letters sends again: a `first` becomes a `replay`."""
    return [(name, REPLAY.encode() if (name, value) == (KIND, _FIRST) else value) for name, value in headers]


def read_example(record: Record) -> Example:
    """One example, as the join writes it.

    Raises:
        KeyError, TypeError, ValueError: the join has not written this record.
    """
    headers = dict(record.headers)
    kind, label, key = headers[KIND], headers[_LABEL], record.key
    if key is None or kind not in _KINDS or label not in (_NOT_CLICKED, _CLICKED):
        raise ValueError(f"expected an example, found key {key!r}, kind {kind!r}, label {label!r}")
    source_offset, impression_ms = _natural(headers[_SOURCE_OFFSET]), _natural(headers[_IMPRESSION_MS])
    if label == _NOT_CLICKED:
        return Example(key, record.value or b"", impression_ms, source_offset, -1, _KINDS[kind])
    click_ms, arrived_ms = _natural(headers[_CLICK_MS]), _arrival(headers.get(CLICK_ARRIVED_MS))
    return Example(key, record.value or b"", impression_ms, source_offset, click_ms, _KINDS[kind], arrived_ms)


def _natural(value: bytes | None) -> int:
    """A number from 0 to 2**63 - 1: an event time or an offset."""
    number = int(value)  # type: ignore[arg-type]  # TypeError as promised
    if not 0 <= number < 1 << 63:
        raise ValueError(number)
    return number


def _arrival(value: bytes | None) -> int:
    """The time in a header `click_arrived_ms`; -1 without one, or for what is no time. No label depends on it."""
    return int(value) if value and value.isdigit() and len(value) <= _MAX_DIGITS else NOT_KNOWN_MS


@dataclass(frozen=True, slots=True)
class ExampleColumns:
    """What the headers of many examples say, N of them in the order of the log, and the records whose headers are bad.

    records        the examples, N of them
    labels         float32 (N,)  1 clicked, 0 not
    weights        float32 (N,)  importance
    impression_ms  int64 (N,)    event time
    rates          float64 (N,)  share of negatives that were sent at the time; None when all were
    corrects       bool (N,)     whether the example takes back a label; None when none does
    arrived_ms     int64 (N,)    when the click arrived in Kafka, -1 without one or if that isn't known; None if known of none
    letters        dead letters of the other records
    """

    records: Sequence[Record]
    labels: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    impression_ms: npt.NDArray[np.int64]
    rates: npt.NDArray[np.float64] | None
    corrects: npt.NDArray[np.bool_] | None
    arrived_ms: npt.NDArray[np.int64] | None
    letters: list[DeadLetter]


Headers = dict[str, bytes | None]


def read_examples(records: Sequence[Record]) -> ExampleColumns:
    """The headers of many examples as columns, whoever wrote them. Bad records become dead letters, never errors.

    Headers are checked a column at a time. Only when a column does not pass, each record is checked to find the bad ones.
    """
    headers: list[Headers] = [dict(record.headers) for record in records]
    columns = None if any(record.key is None for record in records) else _columns(records, headers)
    if columns is not None:
        return columns
    good: list[Record] = []
    good_headers: list[Headers] = []
    letters: list[DeadLetter] = []
    for record, each in zip(records, headers, strict=True):
        try:
            if record.key is None:
                raise _BadHeader("missing_field", "key", "expected the impression id as the record's key, found none")
            _check(each)
        except _BadHeader as error:
            letters.append(DeadLetter.of(record, error.reason, error.path, str(error)))
        else:
            good.append(record)
            good_headers.append(each)
    columns = _columns(good, good_headers)
    assert columns is not None
    columns.letters.extend(letters)
    return columns


def _columns(records: Sequence[Record], headers: Sequence[Headers]) -> ExampleColumns | None:
    """The columns, or None when a header of any record is bad."""
    try:
        labels = [each[_LABEL] for each in headers]
        weighed = [each[_WEIGHT] for each in headers]
        times = [each[_IMPRESSION_MS] for each in headers]
        # Nearly always all weights are 1, and nothing is parsed.
        weights = np.ones(len(headers)) if set(weighed) <= {b"1"} else np.array([float(each) for each in weighed])  # type: ignore[arg-type]
        if not set(labels) <= {_NOT_CLICKED, _CLICKED} or not all(map(bytes.isdigit, times)):  # type: ignore[arg-type]
            return None
        rated = [each.get(_RATE) for each in headers]
        rate_of = {each: 1.0 if each is None else float(each) for each in set(rated)}
        if not all(MIN_RATE <= rate <= 1 for rate in rate_of.values()):
            return None
    except (KeyError, TypeError, ValueError):  # TypeError: Kafka allows headers without a value
        return None
    if max(map(len, times), default=0) > _MAX_DIGITS:  # type: ignore[arg-type]
        return None
    if not ((weights >= 0) & (weights <= MAX_WEIGHT)).all():
        return None
    milliseconds = np.array(times, dtype="S").astype(np.int64) if times else np.empty(0, np.int64)
    if len(milliseconds) and milliseconds.max() > MAX_TIMESTAMP_MS:
        return None
    kinds = [each.get(KIND, _FIRST) for each in headers]
    if not set(kinds) <= _KINDS.keys():
        return None
    corrects = [kind == _CORRECTION for kind in kinds]
    clicked = np.array([label == _CLICKED for label in labels], np.float32)
    return ExampleColumns(
        records=records,
        labels=clicked,
        weights=weights.astype(np.float32),
        impression_ms=milliseconds,
        rates=np.array([rate_of[each] for each in rated]) if rate_of.keys() - {None} else None,
        corrects=np.array(corrects) if any(corrects) else None,
        arrived_ms=_arrivals(headers, np.flatnonzero(clicked).tolist()),
        letters=[],
    )


def _arrivals(headers: Sequence[Headers], clicked: list[int]) -> npt.NDArray[np.int64] | None:
    """When clicks arrived, int64 (N,): -1 where that isn't known; None when it is known of none. `clicked` are their rows."""
    arrived = [headers[row].get(CLICK_ARRIVED_MS) for row in clicked]
    if not any(arrived):
        return None
    column = np.full(len(headers), NOT_KNOWN_MS, np.int64)
    column[clicked] = [_arrival(each) for each in arrived]
    return column


class _BadHeader(Exception):
    """A header that is missing or isn't what the contract says."""

    def __init__(self, reason: str, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}" if name == "key" else f"header {name}: {message}")
        self.reason = reason
        self.path = name if name == "key" else f"headers.{name}"


def _check(headers: Headers) -> None:
    """The verdict of `_columns` on one record. Raises _BadHeader."""
    label, weighed, time_ms = (_required(headers, name) for name in (_LABEL, _WEIGHT, _IMPRESSION_MS))
    if label not in (_NOT_CLICKED, _CLICKED):
        raise _BadHeader("wrong_type", _LABEL, f"expected 0 or 1, found {_shown(label)}")
    try:
        weight = float(weighed)
    except ValueError as error:
        raise _BadHeader("wrong_type", _WEIGHT, f"expected a number, found {_shown(weighed)}") from error
    if not 0 <= weight <= MAX_WEIGHT:
        raise _BadHeader("out_of_range", _WEIGHT, f"expected a number from 0 to {MAX_WEIGHT:,.0f}, found {weight}")
    rated = headers.get(_RATE)
    try:
        rate = 1.0 if rated is None else float(rated)
    except ValueError as error:
        raise _BadHeader("wrong_type", _RATE, f"expected a number, found {_shown(rated)}") from error
    if not MIN_RATE <= rate <= 1:
        raise _BadHeader("out_of_range", _RATE, f"expected a number from {MIN_RATE} to 1, found {rate}")
    kind = headers.get(KIND, _FIRST)
    if kind not in _KINDS:
        raise _BadHeader("wrong_type", KIND, f"expected first, correction or replay, found {_shown(kind)}")
    if not time_ms.isdigit():
        raise _BadHeader("wrong_type", _IMPRESSION_MS, f"expected epoch milliseconds, found {_shown(time_ms)}")
    if len(time_ms) > _MAX_DIGITS or int(time_ms) > MAX_TIMESTAMP_MS:
        expected = f"expected epoch milliseconds, at most {MAX_TIMESTAMP_MS} (the year 9999)"
        raise _BadHeader("out_of_range", _IMPRESSION_MS, f"{expected}, found {_shown(time_ms)}")


def _required(headers: Headers, name: str) -> bytes:
    value = headers.get(name)
    if value is None:
        raise _BadHeader("missing_field", name, "expected it on every example, found none")
    return value


def _shown(value: bytes | None) -> str:
    """A header's value for an error text, kept short."""
    if value is None:
        return "a header without a value"
    return repr(value if len(value) <= 40 else value[:40] + b"...")
