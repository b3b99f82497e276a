"""Frames of each schema type, by a registry that the tests stand in for: what becomes of each value."""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
import uuid
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from hypothesis import given
from hypothesis import strategies as st

from stream.formats import Formats, Refused, open_formats
from stream.formats.avro import avro_decoder
from stream.formats.protobuf import protobuf_decoder
from stream.formats.schema_registry import Decoder
from stream.join.events import read_run
from stream.records.dead_letter import REASONS
from stream.settings import SchemaRegistrySettings
from tests.stream.formats.official_frames import AVRO, EVENT, FEATURES_FILE, FILE, JSON, OFFICIAL
from tests.stream.formats.stand_in import StandIn, avro_frame, framed, message_of, proto_file

NOW_MS = 1_700_000_000_123
DAY_MS = 86_400_000
STRING, INT64, DOUBLE, BOOL, BYTES, ENUM = 9, 3, 1, 8, 12, 14

IMPRESSION = {
    "type": "record",
    "name": "Impression",
    "namespace": "shop",
    "fields": [
        {"name": "impression_id", "type": "string"},
        {"name": "timestamp", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {
            "name": "features",
            "type": {
                "type": "record",
                "name": "Features",
                "fields": [
                    {"name": "user", "type": ["null", "string"]},
                    {"name": "price", "type": "double"},
                    {"name": "tags", "type": {"type": "array", "items": "string"}},
                    {"name": "place", "type": {"type": "enum", "name": "Place", "symbols": ["TOP", "SIDE"]}},
                ],
            },
        },
    ],
}


def flat(*fields: dict[str, Any]) -> dict[str, Any]:
    """A schema whose features stand beside the contract's fields."""
    contract = [{"name": "impression_id", "type": "string"}, {"name": "timestamp", "type": "long"}]
    return {"type": "record", "name": "Flat", "fields": [*contract, *fields]}


def record(value: bytes | None, key: bytes = b"i", offset: int = 0) -> Any:
    return SimpleNamespace(
        topic="impressions", partition=0, offset=offset, key=key, value=value, headers=(), timestamp=NOW_MS + 50
    )


def opened(registry: StandIn, *values: bytes, form: str = "f") -> list[bytes | Refused | None]:
    """What a worker makes of these values."""

    async def go() -> list[bytes | Refused | None]:
        formats = open_formats(SchemaRegistrySettings(url=registry.url))
        try:
            records = [record(value, offset=offset) for offset, value in enumerate(values)]
            await formats.prepare(records, form)
            return formats.open(records, form)
        finally:
            await formats.close()

    return asyncio.run(go())


def one(registry: StandIn, value: bytes, form: str = "f") -> Any:
    """The JSON of one value, or why it was refused."""
    [found] = opened(registry, value, form=form)
    return found if isinstance(found, Refused) else json.loads(found or b"null")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("stream.formats.reader.CONFIRM_S", 0.02)
    monkeypatch.setattr("stream.formats.reader.FIRST_WAIT_S", 0.02)
    with StandIn() as running:
        yield running


def test_json_schema_is_the_payload_to_the_byte(registry):
    registry.register(7, "JSON", {"type": "object"})
    payload = b'{ "impression_id":"i","timestamp":1700000000123,"features":{"price":1.50} }'
    assert opened(registry, framed(7, payload)) == [payload]


def test_avro_with_features_as_a_record(registry):
    registry.register(1, "AVRO", IMPRESSION)
    features = {"user": "u7", "price": 9.5, "tags": ["red"], "place": "SIDE"}
    moment = datetime.datetime.fromtimestamp(NOW_MS / 1_000, datetime.UTC)
    for time in (NOW_MS, moment):
        row = {"impression_id": "i", "timestamp": time, "features": features}
        assert one(registry, avro_frame(1, IMPRESSION, row)) == {
            "impression_id": "i",
            "timestamp": NOW_MS,
            "features": features,
        }
    row["features"] = {**features, "user": None}
    assert one(registry, avro_frame(1, IMPRESSION, row))["features"]["user"] is None


def test_avro_with_features_as_a_map(registry):
    schema = flat({"name": "features", "type": {"type": "map", "values": ["null", "string", "double", "long"]}})
    registry.register(2, "AVRO", schema)
    row = {"impression_id": "i", "timestamp": NOW_MS, "features": {"user": "u", "price": 1.5, "n": 2**60, "none": None}}
    assert one(registry, avro_frame(2, schema, row)) == row


def test_a_flat_record_has_its_other_fields_as_features(registry):
    schema = flat(
        {"name": "user", "type": ["null", "string"]},
        {"name": "score", "type": "double"},
        {"name": "model_version", "type": "int"},
    )
    registry.register(3, "AVRO", schema)
    row = {"impression_id": "i", "timestamp": NOW_MS, "user": "u", "score": 0.25, "model_version": 3}
    assert one(registry, avro_frame(3, schema, row)) == {
        "impression_id": "i",
        "timestamp": NOW_MS,
        "score": 0.25,
        "model_version": 3,
        "features": {"user": "u"},
    }


def logical(kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "logicalType": name, **more}


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (logical("long", "timestamp-millis"), NOW_MS, NOW_MS),
        (logical("long", "timestamp-micros"), NOW_MS * 1_000 + 999, NOW_MS),
        (logical("long", "local-timestamp-millis"), NOW_MS, NOW_MS),
        (logical("long", "timestamp-millis"), -(2**60), -(2**60)),
        (logical("int", "time-millis"), 5, 5),
        (logical("int", "date"), datetime.date(2024, 5, 1), "2024-05-01"),
        (logical("bytes", "decimal", precision=30, scale=20), Decimal("1.23456789012345678901"), 1.23456789012345678901),
        (logical("string", "uuid"), uuid.UUID(int=7), str(uuid.UUID(int=7))),
        ("boolean", True, True),
        ({"type": "map", "values": "long"}, {"a": 1}, {"a": 1}),
    ],
    ids=lambda each: str(each)[:40],
)
def test_avro_types_as_features(registry, kind, value, expected):
    schema = flat({"name": "x", "type": kind})
    registry.register(4, "AVRO", schema)
    event = one(registry, avro_frame(4, schema, {"impression_id": "i", "timestamp": NOW_MS, "x": value}))
    assert event["features"] == {"x": expected}


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("bytes", b"\xff\xfe", "wrong_type"),
        ({"type": "fixed", "name": "F", "size": 2}, b"ab", "wrong_type"),
        ("double", float("nan"), "not_finite"),
        ("float", float("-inf"), "not_finite"),
    ],
    ids=str,
)
def test_what_json_cannot_say_is_refused_with_its_path(registry, kind, value, reason):
    schema = flat({"name": "features", "type": {"type": "map", "values": kind}})
    registry.register(5, "AVRO", schema)
    found = one(registry, avro_frame(5, schema, {"impression_id": "i", "timestamp": NOW_MS, "features": {"x": value}}))
    assert (found.reason, found.path) == (reason, "$.features.x")
    assert found.message.startswith("schema id 5: expected ")


def test_avro_types_of_another_subject(registry):
    features = {"type": "record", "name": "shop.Features", "fields": [{"name": "user", "type": "string"}]}
    registry.register(10, "AVRO", features, subject="shop features/v1")
    schema = flat({"name": "features", "type": "shop.Features"})
    registry.register(11, "AVRO", schema, references=(("shop.Features", "shop features/v1", 10),))
    named: dict[str, Any] = {}
    avro_frame(0, features, {"user": "u"}, named)
    row = {"impression_id": "i", "timestamp": NOW_MS, "features": {"user": "u9"}}
    assert one(registry, avro_frame(11, schema, row, named)) == row
    assert registry.asked == ["/schemas/ids/11", "/subjects/shop%20features%2Fv1/versions/10"]


@pytest.mark.parametrize("payload", [b"", b"\x02", b"\x02i", b"\xff" * 40, b"\x02i\x02\x00extra"], ids=repr)
def test_a_payload_that_does_not_fit_its_schema(registry, payload):
    schema = flat({"name": "user", "type": ["null", "string"]})
    registry.register(6, "AVRO", schema)
    found = one(registry, framed(6, payload))
    assert (found.reason, found.path) == ("malformed_frame", "$")
    assert found.message.startswith("schema id 6: ")


def test_an_avro_value_that_is_no_record(registry):
    registry.register(6, "AVRO", {"type": "string"})
    assert one(registry, avro_frame(6, {"type": "string"}, "i")).reason == "wrong_type"


LIST = {"type": "record", "name": "L", "fields": [{"name": "next", "type": ["null", "L"]}]}
NOTHING = {"type": "record", "name": "N", "fields": [{"name": "none", "type": "null"}]}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (LIST, "L contains itself"),
        ({**LIST, "namespace": "a.b"}, "L contains itself"),
        (flat({"name": "x", "type": {"type": "array", "items": "null"}}), "items that take no bytes"),
        (flat({"name": "x", "type": {"type": "array", "items": NOTHING}}), "items that take no bytes"),
        (flat({"name": "n", "type": NOTHING}, {"name": "x", "type": {"type": "array", "items": "N"}}), "no bytes"),
        ({"type": "record"}, "expected an Avro schema"),
        ("{", "expected an Avro schema"),
        (flat({"name": "x", "type": "shop.Unknown"}), "expected an Avro schema"),
    ],
    ids=str,
)
def test_an_avro_schema_that_cannot_be_used(registry, schema, said):
    """Some a worker could not survive: a linked list of a million elements, or 2⁶⁰ items of no bytes."""
    registry.register(8, "AVRO", schema)
    found = one(registry, framed(8, b"\x02" * 9))
    assert found.reason == "unusable_schema"
    assert found.message.startswith("schema id 8: ")
    assert said in found.message


FEATURES = proto_file(
    "features.proto",
    (
        "Features",
        [("user", 1, STRING), ("price", 2, DOUBLE), ("tags", 3, STRING, "repeated"), ("age", 4, INT64, "optional")],
    ),
)
EVENTS = proto_file(
    "events.proto",
    ("Click", [("impression_id", 1, STRING), ("timestamp", 2, INT64)]),
    ("Impression", [("impression_id", 1, STRING), ("timestamp", 2, INT64), ("features", 3, ".shop.Features")]),
    imports=("features.proto",),
)
INDEX_1 = b"\x02\x02"  # one index, 1, in zigzag


def impression(**features: Any) -> bytes:
    kind = message_of("shop.Impression", FEATURES, EVENTS)
    message = kind(impression_id="i", timestamp=NOW_MS)
    for name, value in features.items():
        if isinstance(value, list):
            getattr(message.features, name).extend(value)
        else:
            setattr(message.features, name, value)
    payload: bytes = message.SerializeToString()
    return payload


@pytest.fixture
def protobuf(registry):
    registry.register(20, "PROTOBUF", FEATURES, subject="features")
    registry.register(21, "PROTOBUF", EVENTS, references=(("features.proto", "features", 20),))
    return registry


def test_protobuf_by_the_messages_indexes_and_with_imports(protobuf):
    event = one(protobuf, framed(21, INDEX_1 + impression(user="u", price=0.0, tags=["a", "b"], age=0)))
    assert event == {
        "impression_id": "i",
        "timestamp": NOW_MS,
        "features": {"user": "u", "price": 0.0, "tags": ["a", "b"], "age": 0},
    }
    # Without presence a scalar has its default, with it it isn't there.
    event = one(protobuf, framed(21, INDEX_1 + impression(user="u")))
    assert event["features"] == {"user": "u", "price": 0.0, "tags": []}
    click = message_of("shop.Click", FEATURES, EVENTS)(impression_id="i", timestamp=NOW_MS).SerializeToString()
    for first in (b"\x00", b"\x02\x00"):  # both name the first message
        assert one(protobuf, framed(21, first + click))["timestamp"] == NOW_MS
    assert protobuf.asked[:2] == ["/schemas/ids/21", "/schemas/ids/21?format=serialized"]


def test_protobuf_types_as_features(registry):
    file = proto_file(
        "odd.proto",
        (
            "Odd",
            [
                ("impression_id", 1, STRING),
                ("timestamp", 2, ".google.protobuf.Timestamp"),
                ("struct", 3, ".google.protobuf.Struct"),
                ("name", 4, ".google.protobuf.StringValue"),
                ("unset", 5, ".google.protobuf.DoubleValue"),
                ("many", 6, ".shop.Odd.ManyEntry", "repeated"),
                ("yes", 7, BOOL),
                ("large", 8, INT64),
            ],
        ),
        imports=("google/protobuf/timestamp.proto", "google/protobuf/struct.proto", "google/protobuf/wrappers.proto"),
    )
    entry = file.message_type[0].nested_type.add(name="ManyEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=INT64, label=1)
    entry.field.add(name="value", number=2, type=DOUBLE, label=1)
    file.enum_type.add(name="Place").value.add(name="TOP", number=0)
    file.enum_type[0].value.add(name="SIDE", number=1)
    file.message_type[0].field.add(name="place", number=9, type=ENUM, type_name=".shop.Place", label=1)
    registry.register(30, "PROTOBUF", file)
    message = message_of("shop.Odd", file)(impression_id="i", yes=True, large=2**60, place=1)
    message.timestamp.FromMilliseconds(NOW_MS)
    message.struct.update({"a": 1.5, "b": [None, "x"], "c": {"d": True}})
    message.name.value = "n"
    message.many[7] = 0.5
    assert one(registry, framed(30, b"\x00" + message.SerializeToString())) == {
        "impression_id": "i",
        "timestamp": NOW_MS,
        "features": {
            "struct": {"a": 1.5, "b": [None, "x"], "c": {"d": True}},
            "name": "n",
            "many": {"7": 0.5},
            "yes": True,
            "large": 2**60,
            "place": "SIDE",
        },
    }


@pytest.mark.parametrize(
    "payload",
    [b"", b"\x02", b"\x02\x08", b"\x01\x00", b"\x82\x80", b"\xff" * 20, b"\x80\x08", INDEX_1 + b"\x0a\xff", b"\x02\x01" + b"x"],
    ids=repr,
)
def test_a_protobuf_frame_that_does_not_fit(protobuf, payload):
    found = one(protobuf, framed(21, payload))
    assert found.reason == "malformed_frame"
    assert found.message.startswith("schema id 21: ")


def test_bytes_in_protobuf_are_refused(registry):
    file = proto_file("b.proto", ("B", [("impression_id", 1, STRING), ("timestamp", 2, INT64), ("image", 3, BYTES)]))
    registry.register(31, "PROTOBUF", file)
    payload = message_of("shop.B", file)(impression_id="i", image=b"png").SerializeToString()
    found = one(registry, framed(31, b"\x00" + payload))
    assert (found.reason, found.path) == ("wrong_type", "$.image")


def test_a_registry_without_descriptors_is_named():
    with StandIn(serialized=False) as registry:
        registry.register(21, "PROTOBUF", 'syntax = "proto3";\nmessage Click { string impression_id = 1; }')
        found = one(registry, framed(21, b"\x00"))
    assert found.reason == "unusable_schema"
    assert "the registry doesn't serve `format=serialized`" in found.message


def test_a_protobuf_import_that_is_not_there(registry):
    lone = descriptor_pb2.FileDescriptorProto()
    lone.CopyFrom(EVENTS)
    registry.register(22, "PROTOBUF", lone)
    assert one(registry, framed(22, INDEX_1)).reason == "unusable_schema"
    registry.register(23, "PROTOBUF", lone, references=(("features.proto", "features", 99),))
    found = one(registry, framed(23, INDEX_1))
    assert found.reason == "unusable_schema"
    assert "found no version 99 of subject features" in found.message


def test_a_type_of_schema_that_nobody_knows(registry):
    registry.register(9, "XML", "<schema/>")
    found = one(registry, framed(9, b"<event/>"))
    assert found == Refused("unusable_schema", "$", "schema id 9: expected AVRO, JSON or PROTOBUF, found type 'XML'")


def test_frames_that_confluents_serializers_wrote(registry):
    registry.register(5, "AVRO", AVRO)
    registry.register(6, "JSON", JSON)
    registry.register(7, "PROTOBUF", FEATURES_FILE, subject="features.proto")
    registry.register(8, "PROTOBUF", FILE, references=(("features.proto", "features.proto", 7),))
    assert {kind: one(registry, frame) for kind, frame in OFFICIAL.items()} == EVENT


@given(st.sampled_from([1, 2, 3, 4]), st.binary(max_size=60), st.sampled_from(["f", "fc", "fd"]))
def test_any_payload_gets_a_verdict(number, payload, form):
    """Nothing but a `RefusedError` comes out of a decoder: anything else would end the worker, again and again."""
    [found] = BUILT.open([record(framed(number, payload))], form)
    assert isinstance(found, bytes | Refused)
    if isinstance(found, Refused):
        assert found.reason in REASONS


ODD = flat(
    {"name": "d", "type": logical("bytes", "decimal", precision=60, scale=5)},
    {"name": "t", "type": logical("long", "timestamp-micros")},
    {"name": "day", "type": logical("int", "date")},
    {"name": "u", "type": ["null", "double", logical("string", "uuid"), {"type": "map", "values": "float"}]},
)
BUILT = Formats()
BUILT._decoders = {
    1: Decoder("avro", avro_decoder(json.dumps(IMPRESSION), {})),
    2: Decoder("avro", avro_decoder(json.dumps(ODD), {})),
    3: Decoder(
        "protobuf",
        protobuf_decoder(
            base64.b64encode(EVENTS.SerializeToString()).decode(),
            {"features.proto": base64.b64encode(FEATURES.SerializeToString()).decode()},
        ),
    ),
    4: Decoder("json", None),
}


def test_frames_among_plain_json_in_one_run(registry):
    """Each gets its own verdict; the letters have the bytes as they came."""
    registry.register(7, "JSON", {})
    plain = [b'{"impression_id":"i","timestamp":%d,"features":{}}' % (NOW_MS + each) for each in range(4)]
    values = [plain[0], framed(7, plain[1]), framed(7, b"{"), plain[2], framed(404, plain[3])]

    async def go() -> Any:
        formats = open_formats(SchemaRegistrySettings(url=registry.url))
        records = [record(value, offset=offset) for offset, value in enumerate(values)]
        await formats.prepare(records, "f")
        events = read_run(records, 0, 0, formats, "f")
        await formats.close()
        return events, formats.decoded

    events, decoded = asyncio.run(go())
    assert events.offsets == [0, 1, 3]
    assert events.values == plain[:3]
    assert [each.value for each in events.records] == [values[0], values[1], values[3]]
    assert [(letter.offset, letter.reason, letter.value) for letter in events.dead] == [
        (2, "malformed_json", values[2]),
        (4, "unknown_schema", values[4]),
    ]
    assert decoded == {"json": 2}


def test_plain_runs_ask_nothing(registry):
    assert opened(registry, b'{"impression_id":"i"}', b"[1]", b"") == [b'{"impression_id":"i"}', b"[1]", b""]
    assert registry.asked == []


def test_without_the_packages_a_worker_says_so_at_its_start(monkeypatch):
    from stream.errors import StreamError
    from stream.formats import reader

    monkeypatch.setattr(reader, "_there", lambda module: module not in ("fastavro", "google.protobuf"))
    with pytest.raises(StreamError, match=r"found no fastavro, protobuf. Run `make setup` in the checkout"):
        open_formats(SchemaRegistrySettings(url="http://registry"))
    assert isinstance(open_formats(SchemaRegistrySettings()), Formats)
