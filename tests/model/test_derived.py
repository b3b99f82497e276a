"""Times, crosses, and values to serve as: all paths of the decoders give what the reference gives, bit for bit."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import features_reference as reference
from model.clock import LATEST_MS, hours, weekdays
from model.derived import as_served
from model.errors import ModelError
from model.features import FeatureDecoder
from model.hashing import cross_key, hash_bytes, missing_key
from model.requests import RequestDecoder
from model.schema import FeatureSchema, FieldSpec
from tests.model.made_features import impression, rows_of

SCHEMA = FeatureSchema(
    timezone="Australia/Lord_Howe",  # half an hour of daylight saving
    fields=(
        FieldSpec(name="when", kind="cross", of=("hour", "day")),
        FieldSpec(name="user"),
        FieldSpec(name="tags", kind="list"),
        FieldSpec(name="position", serve_as=1),
        FieldSpec(name="hour", kind="hour"),
        FieldSpec(name="day", kind="weekday"),
        FieldSpec(name="price", kind="numeric"),
        FieldSpec(name="age", kind="numeric", buckets="standard", mean=40.0, deviation=12.5),
        FieldSpec(name="slots", kind="list", serve_as=("top", "left")),
        FieldSpec(name="height", kind="numeric", buckets="scaled", serve_as=-2.5),
        FieldSpec(name="user × tags", kind="cross", of=("user", "tags"), space="pairs"),
        FieldSpec(name="tags × user", kind="cross", of=("tags", "user"), space="pairs"),
        FieldSpec(name="slots × price × position", kind="cross", of=("slots", "price", "position")),
        FieldSpec(name="user × position", kind="cross", of=("user", "position")),
    ),
)

_text = st.text("abé🎬", max_size=6)  # nothing that makes the fast path doubt: other tests see to that
_number = st.floats(allow_nan=False, allow_infinity=False)
_features = st.fixed_dictionaries(
    {},
    optional={
        name: st.none() | value
        for name, value in {
            "user": _text,
            "tags": st.lists(_text, max_size=3),
            "position": st.sampled_from("0123"),
            "price": _number,
            "age": _number,
            "slots": st.lists(_text, max_size=2),
            "height": _number,
            "hour": st.just("not read"),
            "when": st.just({"not": "read"}),
        }.items()
    },
)
_times = st.integers(0, LATEST_MS) | st.integers(1_600_000_000_000, 1_700_000_000_000)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(_features, _times), min_size=9, max_size=14))
def test_impressions_are_read_as_they_were_sent_and_can_be_read_as_they_are_served(examples: list[tuple[Any, int]]) -> None:
    payloads = [impression(features) for features, _ in examples]
    times_ms = np.array([time_ms for _, time_ms in examples])
    values = [reference.decode_impression(payload, SCHEMA).values for payload in payloads]
    rows = [reference.reference_row(each, SCHEMA, at) for each, at in zip(values, times_ms.tolist(), strict=True)]
    fast = FeatureDecoder(SCHEMA)._fast_impressions(payloads, times_ms)
    slow = FeatureDecoder(SCHEMA)._slow_impressions(payloads, times_ms)
    assert rows_of(fast.batch) == rows_of(slow.batch) == rows
    asked = [name.name for name in SCHEMA.asked]
    known = [dict(zip((field.name for field in SCHEMA.sent), each, strict=True)) for each in values]
    served = [
        reference.reference_row([each[name] for name in asked], SCHEMA, at, served=True)
        for each, at in zip(known, times_ms.tolist(), strict=True)
    ]
    assert rows_of(as_served(fast.batch, SCHEMA)) == served
    assert rows_of(as_served(fast.batch.slice(3, 7), SCHEMA)) == served[3:7]


_candidate = st.fixed_dictionaries({"id": _text}, optional={"features": _features})
_request = st.fixed_dictionaries(
    {"request_id": _text, "candidates": st.lists(_candidate, max_size=3)},
    optional={"context": _features, "timestamp": st.none() | _times},
)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(_request, _times), min_size=9, max_size=12))
def test_requests_are_read_as_they_are_served_at_their_own_time(records: list[tuple[Any, int]]) -> None:
    payloads = [json.dumps(each).encode() for each, _ in records]
    arrived_ms = np.array([at for _, at in records])
    expected = []
    for payload, at in zip(payloads, arrived_ms.tolist(), strict=True):
        request = reference.decode_request(payload, SCHEMA)
        time_ms = at if request.time_ms < 0 else request.time_ms
        expected += [reference.reference_row(values, SCHEMA, time_ms, served=True) for values in request.candidates]
    decoder = FeatureDecoder(SCHEMA)
    for decoded in (
        decoder._fast_requests(payloads, arrived_ms),
        decoder._slow_requests(payloads, arrived_ms),
        RequestDecoder(SCHEMA)._few(payloads, arrived_ms),
    ):
        assert rows_of(decoded.batch) == expected


def test_times_stay_with_their_records_when_a_run_is_halved() -> None:
    payloads = [impression({"user": index}) for index in range(40)]
    payloads[23] = b"{"
    times_ms = np.arange(40) * 3_600_000
    decoded = FeatureDecoder(SCHEMA).impressions(payloads, times_ms)
    alone = FeatureDecoder(SCHEMA).impressions([payloads[30]], times_ms[30:31])
    assert [bad.index for bad in decoded.bad] == [23]
    assert rows_of(decoded.batch)[29] == rows_of(alone.batch)[0]


def test_a_cross_reads_missing_values_as_values() -> None:
    schema = FeatureSchema(
        fields=(FieldSpec(name="a"), FieldSpec(name="b", kind="list"), FieldSpec(name="c", kind="cross", of=("a", "b")))
    )
    batch = (
        FeatureDecoder(schema)
        .impressions([impression({}), impression({"a": "x", "b": []}), impression({"b": ["y", "z"]})])
        .batch
    )
    a, b = missing_key("a"), missing_key("b")
    crosses = [
        [cross_key((a, b), "c")],
        [cross_key((hash_bytes(b"x", "a"), b), "c")],
        [cross_key((a, hash_bytes(each, "b")), "c") for each in (b"y", b"z")],
    ]
    pairs = np.split(batch.list_keys, batch.list_offsets[1:-1])
    assert [each.tolist() for each in pairs[1::2]] == crosses
    assert cross_key((a, b), "c") not in (cross_key((b, a), "c"), missing_key("c"), a, b)


def test_hours_from_the_time_share_the_rows_of_hours_that_were_sent() -> None:
    made = FeatureSchema(fields=(FieldSpec(name="hour", kind="hour"), FieldSpec(name="weekday", kind="weekday")))
    sent = FeatureSchema(fields=(FieldSpec(name="hour"), FieldSpec(name="weekday")))
    at_ms = 1_700_000_000_000  # Tuesday, 14 November 2023, 22:13:20 UTC
    left = FeatureDecoder(made).impressions([impression({"hour": 3})], np.array([at_ms])).batch
    right = FeatureDecoder(sent).impressions([impression({"hour": 22, "weekday": "1"})]).batch
    assert left.keys.tolist() == right.keys.tolist()


@pytest.mark.parametrize(
    ("time_ms", "zone", "hour", "weekday"),
    [
        (0, "UTC", 0, 3),
        (0, "America/New_York", 19, 2),
        (1_711_846_799_999, "Europe/Paris", 1, 6),  # the last millisecond before daylight saving time
        (1_711_846_800_000, "Europe/Paris", 3, 6),
        (1_700_000_000_000, "Asia/Kathmandu", 3, 2),  # 5:45 ahead
        (LATEST_MS, "Pacific/Kiritimati", 13, 5),
    ],
)
def test_hours_and_weekdays(time_ms: int, zone: str, hour: int, weekday: int) -> None:
    assert (int(hours(np.array([time_ms]), zone)[0]), int(weekdays(np.array([time_ms]), zone)[0])) == (hour, weekday)


def test_times_that_are_not_given() -> None:
    with pytest.raises(ModelError, match=r"field hour: expected the times of the events, found none"):
        FeatureDecoder(SCHEMA).impressions([impression({})])
    with pytest.raises(ModelError, match=r"field hour: expected the times"):
        RequestDecoder(SCHEMA).requests([b'{"request_id":"r","candidates":[{"id":"a"}]}'])


def test_a_time_beyond_the_year_9999_is_refused() -> None:
    payload = b'{"request_id":"r","candidates":[],"timestamp":253402300800000}'
    (bad,) = RequestDecoder(SCHEMA).requests([payload] * 20, np.zeros(20, np.int64)).bad[:1]
    assert (bad.reason, bad.path) == ("out_of_range", "$.timestamp")


def _spec(**parts: Any) -> FieldSpec:
    return FieldSpec.model_validate(parts)


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"name": "c", "kind": "cross", "of": ["a"]}, "expected `of` to name two or more different fields, found ['a']"),
        ({"name": "c", "kind": "cross", "of": ["a", "a"]}, "two or more different fields"),
        ({"name": "c", "of": ["a", "b"]}, 'expected `of` with kind = "cross" only'),
        ({"name": "c", "kind": "cross", "of": ["a", "b"], "serve_as": "x"}, "expected serve_as on the fields that it crosses"),
        ({"name": "p", "serve_as": True}, "found true or false"),
        ({"name": "p", "serve_as": 1.5}, "expected serve_as to be a string or an integer, found 1.5"),
        ({"name": "p", "kind": "numeric", "serve_as": "1"}, "expected serve_as to be a finite number"),
        ({"name": "p", "kind": "numeric", "serve_as": 10**400}, "expected serve_as to be a finite number"),
        ({"name": "p", "kind": "numeric", "serve_as": 1 << 64}, "expected serve_as to be a finite number"),
        ({"name": "p", "kind": "numeric", "buckets": "linear", "width": math.inf}, "should be a finite number"),
        ({"name": "p", "kind": "list", "serve_as": "a"}, "expected serve_as to be a list of strings"),
        ({"name": "p", "kind": "weekday", "serve_as": 7}, "expected serve_as to be a whole number from 0 to 6"),
    ],
)
def test_fields_that_make_no_sense(field: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as error:
        _spec(**field)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("of", "says"),
    [
        (["a", "x"], "expected names of other fields in `of`, found x"),
        (["a", "c2"], "found c2: a cross. Name the fields of that cross"),
        (["a", "s"], 'found s: a number with buckets = "standard", which has one row'),
        (["l", "m"], "expected one list at most in `of`, found several: l, m"),
    ],
)
def test_crosses_that_make_no_sense(of: list[str], says: str) -> None:
    others = (
        FieldSpec(name="a"),
        FieldSpec(name="l", kind="list"),
        FieldSpec(name="m", kind="list"),
        FieldSpec(name="s", kind="numeric", buckets="standard"),
        FieldSpec(name="c2", kind="cross", of=("a", "l")),
    )
    with pytest.raises(ValueError) as error:
        FeatureSchema(fields=(*others, _spec(name="c", kind="cross", of=of)))
    assert says in str(error.value)


def test_a_time_zone_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="expected the name of a time zone that this machine knows"):
        FeatureSchema(timezone="Mars/Olympus")


def test_a_schema_without_what_is_new_is_written_as_before() -> None:
    schema = FeatureSchema(fields=(FieldSpec(name="a"),))
    field = {"name": "a", "kind": "categorical", "space": None, "buckets": "log", "per_octave": 4, "width": 1.0}
    assert schema.model_dump(mode="json") == {"fields": [field], "embedding_dim": 16}
    assert schema.fingerprint() == "477555c20325e167bd64ec5ee30195897c40a6c1ad24ec1e1c7cedc805e84ff1"
    assert FeatureSchema.model_validate(SCHEMA.model_dump(mode="json")) == SCHEMA
