"""Frames with Protobuf schemas: what becomes of each value."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import descriptor_pb2

from tests.stream.formats.framed_values import (
    BOOL,
    BYTES,
    DOUBLE,
    ENUM,
    EVENTS,
    FEATURES,
    INDEX_1,
    INT64,
    NOW_MS,
    STRING,
    one,
)
from tests.stream.formats.stand_in import StandIn, framed, message_of, proto_file


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
