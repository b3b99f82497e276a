"""Frames with Avro schemas: what becomes of each value."""

from __future__ import annotations

import datetime
import uuid
from decimal import Decimal
from typing import Any

import pytest

from tests.stream.formats.framed_values import (
    IMPRESSION,
    NOW_MS,
    flat,
    logical,
    one,
)
from tests.stream.formats.stand_in import avro_frame, framed


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
        {"name": "delta", "type": ["null", "long"]},
    )
    registry.register(3, "AVRO", schema)
    row = {"impression_id": "i", "timestamp": NOW_MS, "user": "u", "score": 0.25, "model_version": 3, "delta": 17}
    assert one(registry, avro_frame(3, schema, row)) == {
        "impression_id": "i",
        "timestamp": NOW_MS,
        "score": 0.25,
        "model_version": 3,
        "delta": 17,
        "features": {"user": "u"},
    }


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
