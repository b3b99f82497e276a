"""Envelopes of Kafka Connect and Debezium: taken out by `join.envelope`, and named where the setting is another."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.formats import Formats
from stream.join.events import Events, read_run
from tests.corpus import TIME_MS

EVENT = {"impression_id": "i", "timestamp": TIME_MS, "features": {"user": "u"}}
INNER = b'{"impression_id": "i",  "timestamp": %d, "features": {"price": 1.50}}' % TIME_MS  # as somebody else writes it
SCHEMA = {"type": "struct", "fields": [], "optional": False}


def connect(event: bytes) -> bytes:
    return b'{"schema":' + json.dumps(SCHEMA).encode() + b',"payload":' + event + b"}"


def debezium(event: bytes, op: str = "c") -> bytes:
    return b'{"before":null,"after":' + event + b',"source":{"db":"shop"},"op":"%b","ts_ms":%d}' % (op.encode(), TIME_MS)


def read(form: str, *values: bytes | None, key: bytes = b"i") -> Events:
    records = [
        SimpleNamespace(topic="impressions", partition=0, offset=n, key=key, value=value, headers=(), timestamp=TIME_MS)
        for n, value in enumerate(values)
    ]
    return read_run(records, 0, 0, Formats(), form)


@pytest.mark.parametrize(
    ("form", "value"),
    [("c", connect(INNER)), ("d", debezium(INNER)), ("d", debezium(INNER, "r")), ("d", connect(debezium(INNER, "u")))],
    ids=["connect", "debezium", "snapshot", "debezium in connect"],
)
def test_the_event_inside_is_taken_to_the_byte(form, value):
    """Alone, among others of its kind, and beside plain events."""
    for values in ((value,), (value,) * 3, (INNER, value), (value, INNER)):
        events = read(form, *values)
        assert events.dead == []
        assert events.values == [INNER] * len(values)
        assert [each.value for each in events.records] == list(values)


@pytest.mark.parametrize(
    ("form", "value", "setting"),
    [
        ("", connect(INNER), "connect"),
        ("", debezium(INNER), "debezium"),
        ("", connect(debezium(INNER)), "debezium"),
        ("c", debezium(INNER), "debezium"),
        ("c", connect(debezium(INNER)), "debezium"),
    ],
)
def test_an_envelope_that_the_setting_does_not_name_is_named(form, value, setting):
    [letter] = read(form, value).dead
    assert (letter.reason, letter.path, letter.value) == ("enveloped", "$", value)
    assert f'set join.envelope = "{setting}"' in letter.message


def test_connects_payload_without_debezium_is_taken_by_either_setting():
    assert read("d", connect(INNER)).values == [INNER]


@pytest.mark.parametrize(
    ("form", "value", "path"),
    [
        ("c", connect(b"null"), "$.payload"),
        ("d", connect(b" null "), "$.payload"),
        ("d", debezium(b"null", "d"), "$.after"),
        ("d", connect(debezium(b"null", "d")), "$.after"),
        ("d", b'{"before":{"impression_id":"i"},"op":"d"}', "$.after"),
    ],
)
def test_deletes_and_tombstones_are_dead_letters(form, value, path):
    events = read(form, value, None)
    assert [(letter.reason, letter.path) for letter in events.dead] == [("empty_value", path), ("empty_value", "$")]
    assert len(events) == 0


def test_a_row_without_features_is_written_as_an_event():
    row = {"impression_id": "i", "timestamp": TIME_MS, "user": "u", "price": 1.5, "score": 0.5, "delta": 2}
    expected = {"impression_id": "i", "timestamp": TIME_MS, "score": 0.5, "delta": 2, "features": {"user": "u", "price": 1.5}}
    for form, value in (("d", debezium(json.dumps(row).encode())), ("c", connect(json.dumps(row).encode()))):
        [found] = read(form, value).values
        assert json.loads(found) == expected


def test_numbers_of_a_row_keep_their_digits():
    """No way through Python's numbers: an id of 30 digits, a price as it was written, a number beyond all floats."""
    row = b'{"impression_id":"i","timestamp":%d,"id":%b,"price":1.50,"huge":1e999}' % (TIME_MS, b"9" * 30)
    [found] = read("d", debezium(row)).values
    assert found.endswith(b'"features":{"id":%b,"price":1.50,"huge":1e999}}' % (b"9" * 30))


def test_a_json_column_arrives_as_a_string():
    row = {**EVENT, "features": json.dumps(EVENT["features"])}
    [found] = read("d", debezium(json.dumps(row).encode())).values
    assert json.loads(found) == EVENT
    [letter] = read("d", debezium(json.dumps({**EVENT, "features": "none"}).encode())).dead
    assert (letter.reason, letter.path) == ("wrong_type", "$.features")


def test_an_event_with_fields_called_like_an_envelopes_is_an_event():
    value = json.dumps({**EVENT, "schema": 1, "payload": 2, "op": "c", "after": None}).encode()
    for form in ("", "c", "d", "f", "fc"):
        assert read(form, value).values == [value]


@pytest.mark.parametrize(
    "value",
    [b"{", b"[]", b"1", b'"x"', connect(b"1"), connect(b"[]"), connect(b'"x"'), debezium(b"1"), b'{"schema":1,"payload":}'],
    ids=repr,
)
def test_what_is_in_no_order_gets_a_verdict(value):
    for form in ("c", "d"):
        events = read(form, INNER, value, INNER)
        assert events.offsets == [0, 2]
        assert [letter.value for letter in events.dead] == [value]


def test_what_is_wrong_inside_is_said_of_the_inside():
    late: dict[str, Any] = {**EVENT, "timestamp": TIME_MS * 1_000}
    [letter] = read("d", debezium(json.dumps(late).encode())).dead
    assert (letter.reason, letter.path) == ("out_of_range", "$.timestamp")
    assert "looks like microseconds" in letter.message


PIECES = st.sampled_from(
    [
        b"{",
        b"}",
        b'"schema":{}',
        b'"payload":',
        b'"after":',
        b'"op":"c"',
        b'"op":1e999',
        b",",
        b"null",
        INNER,
        b'"x"',
        b"[",
        b"1e999",
    ]
)
VALUES = st.one_of(
    st.sampled_from([INNER, connect(INNER), debezium(INNER), connect(debezium(INNER)), debezium(b"null"), b"", None]),
    st.lists(PIECES, max_size=8).map(b"".join),
)


@given(st.lists(VALUES, max_size=5), st.sampled_from(["", "c", "d"]))
def test_a_run_is_read_as_its_records_are_alone(values, form):
    together = read(form, *values)
    alone = [read(form, value) for value in values]
    assert together.values == [found for each in alone for found in each.values]
    assert [(letter.reason, letter.message, letter.value) for letter in together.dead] == [
        (letter.reason, letter.message, letter.value) for each in alone for letter in each.dead
    ]


@pytest.mark.parametrize(
    ("form", "value", "reason", "path"),
    [
        ("c", connect(b'"a string"'), "wrong_type", "$.payload"),
        ("c", connect(b"[1]"), "wrong_type", "$.payload"),
        ("d", debezium(b'"{\\"impression_id\\": 1}"'), "wrong_type", "$.after"),
        ("d", debezium(b"[]"), "wrong_type", "$.after"),
        ("c", connect(b'{"impression_id":"i","timestamp":1,"features":"\xff"}'), "bad_utf8", "$"),
        ("c", connect(b'{"impression_id":"i","timestamp":1,"\xff":1}'), "bad_utf8", "$"),
        ("d", b'{"before":null,"after":null,"op":"\xff"}', "bad_utf8", "$"),
    ],
)
def test_what_is_inside_an_envelope_and_is_no_event(form, value, reason, path):
    good = connect(INNER) if form == "c" else debezium(INNER)
    events = read(form, good, value, good)
    [letter] = events.dead
    assert (letter.reason, letter.path, letter.value) == (reason, path, value)
    assert "set join.envelope" not in letter.message
    assert len(events) == 2, "its neighbours are taken"


def test_a_value_that_breaks_a_decoder_is_a_dead_letter(monkeypatch):
    def broken(*arguments):
        raise AttributeError("a bug")

    monkeypatch.setattr("stream.formats.reader.unwrapped", broken)
    [letter] = read("c", connect(INNER)).dead
    assert (letter.reason, letter.message) == (
        "malformed_json",
        "expected an event, found one that can't be read (AttributeError)",
    )
