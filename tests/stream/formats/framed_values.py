"""Frames by a registry that the tests stand in for, and what the decoder makes of each."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

from stream.formats import Refused, open_formats
from stream.settings import SchemaRegistrySettings
from tests.stream.formats.stand_in import StandIn, proto_file

__all__ = [
    "BOOL",
    "BYTES",
    "DAY_MS",
    "DOUBLE",
    "ENUM",
    "EVENTS",
    "FEATURES",
    "IMPRESSION",
    "INDEX_1",
    "INT64",
    "NOW_MS",
    "STRING",
    "flat",
    "logical",
    "one",
    "opened",
    "record",
]


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


def logical(kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "logicalType": name, **more}


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
