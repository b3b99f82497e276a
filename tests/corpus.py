"""One corpus of records as the world sends them: bad ones with the verdict that each must get, and odd ones that are good.

| judge | who finds it |
| --- | --- |
| `envelope` | the join, by the record alone |
| `join` | the join, by what it knows of the log |
| `trainer` | the trainer: the join can't know, so the label stands |
| None | nobody: the record is good |

Every record has an id of its own, so that its verdict can be found again whatever it is mixed with. Headers are as they are on
the wire, where a name may be any bytes; `Case.headers_read` are as a consumer hands them over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from model.schema import FeatureSchema, FieldSpec

__all__ = ["CORPUS", "SCHEMA", "TIME_MS", "Case", "value_of_size"]

# What the features below are judged by.
SCHEMA = FeatureSchema(
    fields=(FieldSpec(name="user"), FieldSpec(name="price", kind="numeric"), FieldSpec(name="tags", kind="list")),
    embedding_dim=4,
)

TIME_MS = 1_700_000_000_000
# Of a record with its key, headers and Kafka's own framing, by the default `topics.max_message_bytes`.
MAX_RECORD_BYTES = 1_048_588 - 200

Judge = Literal["envelope", "join", "trainer"]


@dataclass(frozen=True)
class Case:
    """One record, and its verdict: `reason` and `path` are empty where it is good."""

    name: str
    value: bytes | None
    judge: Judge | None = None
    reason: str = ""
    path: str = ""
    key: bytes | None = b""
    headers: tuple[tuple[bytes, bytes | None], ...] = ()
    source: Literal["impressions", "clicks"] = "impressions"

    def __str__(self) -> str:
        return self.name

    @property
    def headers_read(self) -> tuple[tuple[str, bytes | None], ...]:
        return tuple((name.decode(errors="backslashreplace"), content) for name, content in self.headers)


def envelope(name: str, features: str = '{"user":"u"}', *, time: str = str(TIME_MS), rest: str = "") -> bytes:
    """An impression, with parts to be written as one likes."""
    return f'{{"impression_id":{json.dumps(name)},"timestamp":{time},"features":{features}{rest}}}'.encode()


def value_of_size(name: str, size: int) -> bytes:
    """A good impression whose value has exactly `size` bytes."""
    bare = envelope(name, rest=',"padding":""')
    return bare[:-2] + b"x" * (size - len(bare)) + bare[-2:]


def good(name: str, value: bytes, key: bytes | None = None, **more: object) -> Case:
    return Case(name, value, key=name.encode() if key is None else key, **more)  # type: ignore[arg-type]


def bad(name: str, value: bytes | None, reason: str, path: str = "$", *, key: bytes | None = b"", **more: object) -> Case:
    return Case(name, value, "envelope", reason, path, name.encode() if key == b"" else key, **more)  # type: ignore[arg-type]


def feature(name: str, features: str, reason: str, path: str, *, rest: str = "") -> Case:
    return Case(name, envelope(name, features, rest=rest), "trainer", reason, path, name.encode())


_HUGE_ID = "i" * (MAX_RECORD_BYTES // 2)
# More than the topics take: a producer that compresses gets it in all the same.
_BEYOND = 5_000_000

CORPUS: tuple[Case, ...] = (
    # Not there, or not text.
    bad("empty value", b"", "empty_value"),
    bad("null value", None, "empty_value"),
    bad("null key and value", None, "empty_value", key=None),
    bad("null value under a huge key", None, "empty_value", key=b"k" * (MAX_RECORD_BYTES - 100)),
    bad("null value with a header of a megabyte", None, "empty_value", headers=((b"h", b"x" * (MAX_RECORD_BYTES - 100)),)),
    bad(
        "null value with a header named by a megabyte", None, "empty_value", headers=((b"n" * (MAX_RECORD_BYTES - 100), None),)
    ),
    bad("null value with a header name not UTF-8", None, "empty_value", headers=((b"caf\xe9", b"1"), (b"\xff" * 300, None))),
    bad("null value with many headers", None, "empty_value", headers=((b"", None),) * 50_000),
    bad("five megabytes that aren't UTF-8", b"\xff" * _BEYOND, "bad_utf8"),
    bad("five megabytes under another id", envelope("else", f'{{"user":"{"x" * _BEYOND}"}}'), "id_mismatch", "$.impression_id"),
    bad("bad utf-8", envelope("bad utf-8", '{"user":"?"}').replace(b"?", b"\xff"), "bad_utf8"),
    bad("bad utf-8 in the id", envelope("bad utf-8 in the id").replace(b"bad", b"b\xc3d"), "bad_utf8"),
    bad("a surrogate as utf-8", envelope("a surrogate as utf-8", '{"user":"?"}').replace(b"?", b"\xed\xa0\x80"), "bad_utf8"),
    # Not JSON.
    bad("whitespace only", b" \t ", "malformed_json"),
    bad("not closed", envelope("not closed")[:-1], "malformed_json"),
    bad("cut in a string", envelope("cut in a string")[:24], "malformed_json"),
    bad("no json", b"impression", "malformed_json"),
    bad("single quotes", envelope("single quotes").replace(b'"', b"'"), "malformed_json"),
    bad("trailing comma", envelope("trailing comma")[:-1] + b",}", "malformed_json"),
    bad("two objects", envelope("two objects") * 2, "malformed_json"),
    bad("two objects on two lines", b"\n".join([envelope("two objects on two lines")] * 2), "malformed_json"),
    bad("trailing text", envelope("trailing text") + b" x", "malformed_json"),
    bad("byte order mark", b"\xef\xbb\xbf" + envelope("byte order mark"), "malformed_json"),
    bad("tab in a string", envelope("tab in a string", '{"user":"a\tb"}'), "malformed_json"),
    bad("line break in a string", envelope("line break in a string", '{"user":"a\nb"}'), "malformed_json"),
    bad("unknown escape", envelope("unknown escape", '{"user":"\\x"}'), "malformed_json"),
    bad("half a surrogate pair in the id", b'{"impression_id":"\\ud800","timestamp":1}', "malformed_json"),
    bad("leading zero", envelope("leading zero", '{"price":01}'), "malformed_json"),
    bad("NaN", envelope("NaN", '{"price":NaN}'), "malformed_json"),
    bad("Infinity", envelope("Infinity", '{"price":Infinity}'), "malformed_json"),
    bad("minus Infinity", envelope("minus Infinity", '{"price":-Infinity}'), "malformed_json"),
    bad("NaN in a field of nobody's", envelope("NaN in a field of nobody's", rest=',"x":[NaN]'), "malformed_json"),
    bad("NaN as time", envelope("NaN as time", time="NaN"), "malformed_json"),
    bad(
        "nested a thousand deep",
        envelope("nested a thousand deep", '{"x":' + "[" * 5_000 + "]" * 5_000 + "}"),
        "malformed_json",
    ),
    # JSON of another shape.
    bad("a list", b"[]", "wrong_type"),
    bad("null", b"null", "wrong_type"),
    bad("a number", b"1", "wrong_type"),
    bad("no id", b'{"timestamp":1,"features":{}}', "missing_field", "$.impression_id"),
    bad("no time", b'{"impression_id":"no time","features":{}}', "missing_field", "$.timestamp"),
    bad("nothing", b"{}", "missing_field", "$.impression_id"),
    bad("id a number", b'{"impression_id":7,"timestamp":1}', "wrong_type", "$.impression_id", key=b"7"),
    bad("id null", b'{"impression_id":null,"timestamp":1}', "wrong_type", "$.impression_id"),
    bad("id empty", b'{"impression_id":"","timestamp":1}', "out_of_range", "$.impression_id", key=b"-"),
    bad("time a string", envelope("time a string", time='"1"'), "wrong_type", "$.timestamp"),
    bad("time a fraction", envelope("time a fraction", time="1.5"), "wrong_type", "$.timestamp"),
    bad("time with an exponent", envelope("time with an exponent", time="1e3"), "wrong_type", "$.timestamp"),
    bad("time true", envelope("time true", time="true"), "wrong_type", "$.timestamp"),
    bad("time null", envelope("time null", time="null"), "wrong_type", "$.timestamp"),
    bad("time negative", envelope("time negative", time="-1"), "out_of_range", "$.timestamp"),
    bad("time infinite", envelope("time infinite", time="1e999"), "out_of_range", "$.timestamp"),
    bad("time of thirty digits", envelope("time of thirty digits", time="1" * 30), "out_of_range", "$.timestamp"),
    bad("time in microseconds", envelope("time in microseconds", time=f"{TIME_MS}000"), "out_of_range", "$.timestamp"),
    bad("time in nanoseconds", envelope("time in nanoseconds", time=f"{TIME_MS}000000"), "out_of_range", "$.timestamp"),
    bad("time in seconds", envelope("time in seconds", time=f"{TIME_MS // 1_000}"), "out_of_range", "$.timestamp"),
    bad("time zero", envelope("time zero", time="0"), "out_of_range", "$.timestamp"),
    # At odds with the record that carries it.
    bad("id not the key", envelope("another"), "id_mismatch", "$.impression_id"),
    bad("no key", envelope("no key"), "id_mismatch", "$.impression_id", key=None),
    bad("key of other bytes", envelope("é"), "id_mismatch", "$.impression_id", key=b"e\xcc\x81"),
    bad("second id counts", envelope("second id counts", rest=',"impression_id":"b"'), "id_mismatch", "$.impression_id"),
    bad("far future", envelope("far future", time="253402300799999"), "future_timestamp", "$.timestamp"),
    bad("a huge id that is not the key", envelope(_HUGE_ID), "id_mismatch", "$.impression_id"),
    # Watermark records that are none.
    bad("mark of words", b"", "out_of_range", headers=((b"headrace-watermark", b"now"),)),
    bad("mark empty", b"", "out_of_range", headers=((b"headrace-watermark", b""),)),
    bad("mark negative", b"", "out_of_range", headers=((b"headrace-watermark", b"-1"),)),
    bad("mark too late", b"", "out_of_range", headers=((b"headrace-watermark", b"253402300800000"),)),
    bad("mark in seconds", b"", "out_of_range", headers=((b"headrace-watermark", b"1700000000"),)),
    bad("mark of many digits", b"", "out_of_range", headers=((b"headrace-watermark", b"9" * 6_000),)),
    # A click for nobody: known only when its time has run out.
    Case(
        "nobody",
        b'{"impression_id":"nobody","timestamp":%d}' % TIME_MS,
        "join",
        "orphan_click",
        "$.impression_id",
        b"nobody",
        source="clicks",
    ),
    # Features that no model can use.
    feature("price 1e999", '{"price":1e999}', "not_finite", "$.features.price"),
    feature("price -1e999", '{"price":-1e999}', "not_finite", "$.features.price"),
    feature("user 1e999", '{"user":1e999}', "not_finite", "$.features.user"),
    feature("object as a feature", '{"user":{"id":1}}', "nested", "$.features.user"),
    feature("objects in a list", '{"tags":[{}]}', "nested", "$.features.tags[0]"),
    feature("number as a list", '{"tags":1}', "wrong_type", "$.features.tags"),
    feature("numbers in a list", '{"tags":["a",1]}', "wrong_type", "$.features.tags[1]"),
    feature("null in a list", '{"tags":[null]}', "wrong_type", "$.features.tags[0]"),
    feature("list as a category", '{"user":["a"]}', "wrong_type", "$.features.user"),
    feature("true as a category", '{"user":true}', "wrong_type", "$.features.user"),
    feature("text as a number", '{"price":"1"}', "wrong_type", "$.features.price"),
    feature("features a list", "[]", "wrong_type", "$.features"),
    feature("features null", "null", "missing_field", "$"),
    Case(
        "no features",
        b'{"impression_id":"no features","timestamp":%d}' % TIME_MS,
        "trainer",
        "missing_field",
        "$",
        b"no features",
    ),
    feature("score 2", "{}", "out_of_range", "$.score", rest=',"score":2'),
    feature("score of words", "{}", "wrong_type", "$.score", rest=',"score":"high"'),
    feature("version negative", "{}", "wrong_type", "$.model_version", rest=',"model_version":-1'),
    feature("delta negative", "{}", "wrong_type", "$.delta", rest=',"model_version":3,"delta":-1'),
    feature("delta of words", "{}", "wrong_type", "$.delta", rest=',"model_version":3,"delta":"none"'),
    feature("delta a fraction", "{}", "wrong_type", "$.delta", rest=',"model_version":3,"delta":0.5'),
    # Odd, and good.
    good("no feature at all", envelope("no feature at all", "{}")),
    good("unknown features", envelope("unknown features", '{"colour":"blue","x":{"y":[1,null]},"z":1e999}')),
    good("user null", envelope("user null", '{"user":null,"tags":null,"price":null}')),
    good("user a number", envelope("user a number", '{"user":17}')),
    good("tags empty", envelope("tags empty", '{"tags":[]}')),
    good("last of two users", envelope("last of two users", '{"user":"a","user":"b"}')),
    good("first id is nobody's", envelope("x", rest=',"impression_id":"first id is nobody\'s"')),
    good("spread over lines", b"\n" + envelope("spread over lines").replace(b",", b",\n  ") + b"\n"),
    good("carriage returns", envelope("carriage returns").replace(b",", b",\r\n")),
    good("spaces around", b"  " + envelope("spaces around") + b"  "),
    good("escaped id", b'{"impression_id":"esc\\u0061ped id","timestamp":%d,"features":{}}' % TIME_MS),
    good("escaped pair", b'{"impression_id":"\\ud83c\\udfac","timestamp":%d,"features":{}}' % TIME_MS, "🎬".encode()),
    good("beyond the BMP 🎬", envelope("beyond the BMP 🎬", '{"user":"🎬"}')),
    good("id of one byte 0", b'{"impression_id":"\\u0000","timestamp":%d,"features":{}}' % TIME_MS, b"\x00"),
    good("braces in a string", envelope("braces in a string", '{"user":"}{"}')),
    good("line break escaped", envelope("line break escaped", '{"user":"}\\n{"}')),
    good("of the year 1990", envelope("of the year 1990", time="631152000000")),
    good("a header name not UTF-8", envelope("a header name not UTF-8"), headers=((b"caf\xe9", b"1"), (b"\xff", None))),
    good("a header of a megabyte", envelope("a header of a megabyte"), headers=((b"h", b"x" * (MAX_RECORD_BYTES - 200)),)),
    good("five megabytes", value_of_size("five megabytes", _BEYOND)),
    good("a key of five megabytes", envelope("k" * _BEYOND), b"k" * _BEYOND),
    good("served", envelope("served", rest=',"score":0.25,"model_version":3')),
    good("served after a delta", envelope("served after a delta", rest=',"score":0.25,"model_version":3,"delta":17')),
    good("at the size limit", value_of_size("at the size limit", MAX_RECORD_BYTES)),
    good("a long id", envelope("i" * 20_000), b"i" * 20_000),
)
