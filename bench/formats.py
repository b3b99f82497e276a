"""CPU time of reading events, by their format: from the record's value to the join's columns, in µs an event.

python bench/formats.py          # one JSON line
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from types import SimpleNamespace
from typing import Any

from stream.formats import Formats
from stream.formats.avro import avro_decoder
from stream.formats.protobuf import protobuf_decoder
from stream.formats.reader import FRAMES
from stream.formats.schema_registry import Decoder
from stream.join.events import read_run

RECORDS, ROUNDS = 6_000, 15
TIME_MS = 1_700_000_000_000
AVRO: dict[str, Any] = {
    "type": "record",
    "name": "Impression",
    "fields": [
        {"name": "impression_id", "type": "string"},
        {"name": "timestamp", "type": "long"},
        {"name": "user", "type": "string"},
        {"name": "item", "type": "string"},
        {"name": "price", "type": "double"},
        {"name": "age", "type": ["null", "long"]},
    ],
}


def _event(index: int) -> dict[str, Any]:
    features = {"user": f"u{index % 997}", "item": f"i{index % 89}", "price": 0.25 * index, "age": index % 80}
    return {"impression_id": f"imp-{index}", "timestamp": TIME_MS + index, "features": features}


def _flat(index: int) -> dict[str, Any]:
    event = _event(index)
    return {"impression_id": event["impression_id"], "timestamp": event["timestamp"], **event["features"]}


def _protobuf() -> tuple[str, Any]:
    """A message type's descriptor in base64, and its Python class."""
    import base64

    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="events.proto", package="shop", syntax="proto3")
    message = file.message_type.add(name="Impression")
    kinds = {"impression_id": 9, "timestamp": 3, "user": 9, "item": 9, "price": 1, "age": 3}
    for number, (name, kind) in enumerate(kinds.items(), start=1):
        message.field.add(name=name, number=number, type=kind, label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName("shop.Impression"))
    return base64.b64encode(file.SerializeToString()).decode(), made


def _values() -> tuple[dict[str, list[bytes]], Formats]:
    """The same events as record values in each format, and decoders for them."""
    import io

    import fastavro

    formats = Formats()
    descriptor, message = _protobuf()
    avro = Decoder("avro", avro_decoder(json.dumps(AVRO), {}))
    formats._decoders = {1: avro, 2: Decoder("protobuf", protobuf_decoder(descriptor, {})), 3: Decoder("json", None)}
    parsed = fastavro.parse_schema(AVRO)

    def avro_payload(row: dict[str, Any]) -> bytes:
        stream = io.BytesIO()
        fastavro.schemaless_writer(stream, parsed, row)
        return stream.getvalue()

    plain = [json.dumps(_event(index)).encode() for index in range(RECORDS)]
    flat = [_flat(index) for index in range(RECORDS)]
    return {
        "plain": plain,
        "json_schema": [b"\0\0\0\0\x03" + value for value in plain],
        "avro": [b"\0\0\0\0\x01" + avro_payload(row) for row in flat],
        "protobuf": [b"\0\0\0\0\x02\0" + message(**row).SerializeToString() for row in flat],
        "debezium": [b'{"before":null,"after":' + value + b',"op":"c","ts_ms":1}' for value in plain],
    }, formats


def _us_an_event(values: list[bytes], formats: Formats, form: str) -> float:
    """Median CPU time over the rounds, in µs an event."""
    records = [
        SimpleNamespace(
            topic="t", partition=0, offset=index, key=b"imp-%d" % index, value=value, headers=(), timestamp=TIME_MS + RECORDS
        )
        for index, value in enumerate(values)
    ]
    taken = []
    for _ in range(ROUNDS):
        began = time.process_time()
        asyncio.run(formats.prepare(records, form))
        events = read_run(records, 0, 0, formats, form)
        taken.append(time.process_time() - began)
        assert len(events) == RECORDS, events.dead[:1]
    return round(statistics.median(taken) / RECORDS * 1e6, 2)


def main() -> None:
    """Print the figures."""
    values, formats = _values()
    figures = {
        "plain": _us_an_event(values["plain"], formats, ""),
        "plain, registry set": _us_an_event(values["plain"], formats, FRAMES),
        "json_schema": _us_an_event(values["json_schema"], formats, FRAMES),
        "avro": _us_an_event(values["avro"], formats, FRAMES),
        "protobuf": _us_an_event(values["protobuf"], formats, FRAMES),
        "debezium": _us_an_event(values["debezium"], formats, "d"),
    }
    print(json.dumps({"bench": "formats", "records": RECORDS, "us_an_event": figures}))


if __name__ == "__main__":
    main()
