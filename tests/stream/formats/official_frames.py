"""Recorded frames of Confluent's own serializers: confluent-kafka 2.16.1 for Python against Apicurio Registry 2.6.13."""

from __future__ import annotations

from typing import Any

from tests.stream.formats.stand_in import proto_file

__all__ = ["AVRO", "EVENT", "FEATURES_FILE", "FILE", "JSON", "OFFICIAL"]

TIME_MS = 1_700_000_000_123

AVRO: dict[str, Any] = {
    "type": "record",
    "name": "Impression",
    "namespace": "shop",
    "fields": [
        {"name": "impression_id", "type": "string"},
        {"name": "timestamp", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "features", "type": {"type": "map", "values": ["null", "string", "double"]}},
    ],
}
JSON: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "Click",
    "type": "object",
    "properties": {"impression_id": {"type": "string"}, "timestamp": {"type": "integer"}},
}
FEATURES_FILE = proto_file("features.proto", ("Features", [("user", 1, 9), ("price", 2, 1)]))
FILE = proto_file(
    "events.proto",
    ("Click", [("impression_id", 1, 9), ("timestamp", 2, 3)]),
    ("Impression", [("impression_id", 1, 9), ("timestamp", 2, 3), ("features", 3, ".shop.Features")]),
    imports=("features.proto",),
)

OFFICIAL = {
    "avro": bytes.fromhex("00000000050269f6a1abfef962060875736572020475370a7072696365040000000000002340066167650000"),
    "json": bytes.fromhex(
        "00000000067b22696d7072657373696f6e5f6964223a2269222c2274696d657374616d70223a313730303030303030303132337d"
    ),
    "protobuf": bytes.fromhex("000000000802020a016910fbd095ffbc311a0d0a027537110000000000002340"),
}
EVENT: dict[str, Any] = {
    "avro": {"impression_id": "i", "timestamp": TIME_MS, "features": {"user": "u7", "price": 9.5, "age": None}},
    "json": {"impression_id": "i", "timestamp": TIME_MS},
    "protobuf": {"impression_id": "i", "timestamp": TIME_MS, "features": {"user": "u7", "price": 9.5}},
}
