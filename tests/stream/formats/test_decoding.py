"""Frames of every schema type in one run, and frames that real serializers wrote: what becomes of each value."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.formats import Formats, Refused, open_formats
from stream.formats.avro import avro_decoder
from stream.formats.protobuf import protobuf_decoder
from stream.formats.schema_registry import Decoder
from stream.join.events import read_run
from stream.records.dead_letter import REASONS
from stream.settings import SchemaRegistrySettings
from tests.stream.formats.framed_values import (
    EVENTS,
    FEATURES,
    IMPRESSION,
    NOW_MS,
    flat,
    logical,
    one,
    opened,
    record,
)
from tests.stream.formats.official_frames import AVRO, EVENT, FEATURES_FILE, FILE, JSON, OFFICIAL
from tests.stream.formats.stand_in import framed


def test_json_schema_is_the_payload_to_the_byte(registry):
    registry.register(7, "JSON", {"type": "object"})
    payload = b'{ "impression_id":"i","timestamp":1700000000123,"features":{"price":1.50} }'
    assert opened(registry, framed(7, payload)) == [payload]


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
