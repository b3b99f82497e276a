"""What plain producers get wrong is named in the dead letter: what was found, and what to do."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest

from stream.join.events import read_run
from stream.records.dead_letter import DeadLetter
from tests.corpus import TIME_MS, envelope


def letter_of(value: bytes | None, key: bytes | None = b"i") -> DeadLetter:
    record = SimpleNamespace(topic="clicks", partition=0, offset=3, key=key, value=value, headers=(), timestamp=TIME_MS)
    [letter] = read_run([record], 0, 0).dead
    assert (letter.key, letter.value) == (key, value)
    return letter


TIME = "expected milliseconds since 1970 as an integer, found "


@pytest.mark.parametrize(
    ("time", "reason", "message"),
    [
        ('"2023-11-14T22:13:20.000Z"', "wrong_type", "STRING: a time in ISO 8601. Send 1700000000000"),
        ('"2023-11-14T23:13:20+01:00"', "wrong_type", "STRING: a time in ISO 8601. Send 1700000000000"),
        ('"2023-11-14 22:13"', "wrong_type", "STRING: a time in ISO 8601 without a zone. Send milliseconds since 1970 UTC"),
        ('"1700000000000"', "wrong_type", "STRING: a number in quotes. Send it without them"),
        ('"1700000000"', "wrong_type", "STRING: a number in quotes, which looks like seconds. Send it without them"),
        ('"yesterday"', "wrong_type", "STRING"),
        ("1700000000.123", "wrong_type", "1700000000.123: seconds with a fraction. Multiply by 1,000 and round"),
        ("1700000000000.5", "wrong_type", "1700000000000.5: milliseconds with a fraction. Round it"),
        ("1700000000", "out_of_range", None),
        ("1700000000000000", "out_of_range", "1700000000000000, which looks like microseconds"),
        ("-1", "out_of_range", "-1"),
        ("null", "wrong_type", "null"),
        ("true", "wrong_type", "true"),
        ("[1700000000000]", "wrong_type", "[1700000000000]"),
        ("1e999", "out_of_range", "1e999"),
        ("9" * 30, "out_of_range", "9" * 30),
        ("1" + "0" * 5_000, "out_of_range", "1" + "0" * 59 + "…"),
    ],
)  # fmt: skip
def test_a_time_that_is_none(time, reason, message):
    letter = letter_of(envelope("i", time=time))
    assert (letter.reason, letter.path) == (reason, "$.timestamp")
    if message is None:
        assert "found 1700000000, which looks like seconds" in letter.message
    else:
        assert letter.message == TIME + message.replace("STRING", f"the string {time}")


@pytest.mark.parametrize(
    ("found", "reason", "message"),
    [
        ("7", "wrong_type", "expected a string, found 7. Put the id in quotes, and send the same digits as the key"),
        ("null", "wrong_type", "expected a string, found null"),
        ('{"$oid": "5f"}', "wrong_type", 'expected a string, found {"$oid": "5f"}'),
        ('""', "out_of_range", "expected an id, found an empty string"),
    ],
)
def test_an_id_that_is_none(found, reason, message):
    letter = letter_of(b'{"impression_id":%b,"timestamp":%d}' % (found.encode(), TIME_MS))
    assert (letter.reason, letter.path, letter.message) == (reason, "$.impression_id", message)


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (None, "no key: send the id as the key too, so that both topics choose the same partition for it"),
        (b"", "b''"),
        (b'"i"', "b'\"i\"': the id as a JSON string. Use a plain string serializer for keys"),
        (b'{"id":"i"}', "b'{\"id\":\"i\"}': a JSON object. Send the id alone (Kafka Connect: ExtractField$Key and a "
         "StringConverter for keys)"),
        (b"\0\0\0\0\x03\x02i", "a Schema Registry frame with schema id 3 as the key: use a plain string serializer for keys. "
         "The schema's id differs between the topics, so framed keys of one id lie in different partitions"),
        (b"another", "b'another'"),
        (b'"\xff"', "b'\"\\xff\"'"),
    ],
)  # fmt: skip
def test_a_key_that_is_not_the_id(key, found):
    letter = letter_of(envelope("i"), key)
    assert (letter.reason, letter.path) == ("id_mismatch", "$.impression_id")
    assert letter.message == f"expected the id 'i' as the record's key, found {found}"


@pytest.mark.parametrize(
    ("value", "reason", "said"),
    [
        (
            b"\0\0\0\0\x07" + envelope("i"),
            "framed",
            "found a Schema Registry frame with schema id 7: set schema_registry.url, or use a plain JSON serializer",
        ),
        (b"\x03\x05" + bytes(16) + envelope("i"), "framed", "AWS Glue"),
        (
            json.dumps(envelope("i").decode()).encode(),
            "wrong_type",
            "a JSON string that holds JSON. The event was encoded twice",
        ),
        (b"\xef\xbb\xbf" + envelope("i"), "malformed_json", "a byte order mark before the JSON: write UTF-8 without it"),
        (envelope("i").decode().encode("utf-16"), "bad_utf8", "UTF-16: write UTF-8"),
        (gzip.compress(envelope("i")), "bad_utf8", "gzip: let the producer compress its batches"),
        (b"Obj\x01\x04\x14avro.codec", "malformed_json", "an Avro file with its schema"),
    ],
    ids=["frame", "glue", "twice", "bom", "utf-16", "gzip", "avro file"],
)
def test_a_value_in_another_format(value, reason, said):
    letter = letter_of(value)
    assert (letter.reason, letter.path) == (reason, "$")
    assert said in letter.message


@pytest.mark.parametrize("found", ['"--5"', '"\u00b2"', '"1\u0660"', '"' + "9" * 50 + '"', '"0001-01-01T00:00:00+23:00"'])
def test_a_time_that_only_looks_like_a_number(found):
    letter = letter_of(b'{"impression_id":"i","timestamp":%b}' % found.encode())
    assert (letter.reason, letter.path) == ("wrong_type", "$.timestamp")
    assert letter.message.startswith("expected milliseconds since 1970 as an integer, found the string ")


def test_a_record_that_breaks_the_reader_is_a_dead_letter(monkeypatch):
    """Whatever a library makes of it: otherwise it would end every worker that reads it, one after the other."""

    def broken(*arguments):
        raise ValueError("a bug")

    monkeypatch.setattr("stream.join.events.about_key", broken)
    letter = letter_of(envelope("i"), b"another")
    assert (letter.reason, letter.message) == ("malformed_json", "expected an event, found one that can't be read (ValueError)")
