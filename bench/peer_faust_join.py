"""The peer of `bench/join.py`: the same window join with agents and tables, as in Faust's documentation.

It has one agent for each input, a table of pending impressions, a table of clicks without an impression, and expiry by the
watermark. It is not exactly-once, which makes it faster. Records are handled one by one, and every table change is a changelog
record.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import faust

PREFIX = os.environ["PEER_PREFIX"]
WINDOW_MS = int(os.environ["PEER_WINDOW_MS"])
PARTITIONS = int(os.environ["PEER_PARTITIONS"])

app = faust.App(
    f"{PREFIX}peer",
    broker=f"kafka://{os.environ['PEER_BROKER']}",
    store="memory://",  # the fastest of its stores
    datadir=os.environ["PEER_DATA_DIR"],
    topic_partitions=PARTITIONS,
    consumer_auto_offset_reset="earliest",
    topic_disable_leader=True,
    web_enabled=False,
    producer_linger_ms=5,
)
raw: dict[str, Any] = {"key_serializer": "raw", "value_serializer": "raw"}  # bytes as they are, no JSON on top
impressions = app.topic(f"{PREFIX}impressions", key_type=bytes, value_type=bytes, **raw)
clicks = app.topic(f"{PREFIX}clicks", key_type=bytes, value_type=bytes, **raw)
examples = app.topic(f"{PREFIX}examples", key_type=bytes, value_type=bytes, **raw)
pending = app.Table(
    "pending", default=None, schema=faust.Schema(key_type=bytes, value_type=bytes, **raw), partitions=PARTITIONS
)
early = app.Table("early", default=None, schema=faust.Schema(key_type=bytes, value_type=bytes, **raw), partitions=PARTITIONS)

# Event times in the order of arrival, by partition, so that expired impressions are found without a scan of the table.
queues: dict[int, list[tuple[int, bytes]]] = {}
heads: dict[int, int] = {}
seen: dict[tuple[str, int], int] = {}


def note_start() -> None:
    """Write down when the first record comes: the benchmark's timing starts there."""
    started = Path(os.environ["PEER_STARTED"])
    if not seen and not started.exists():
        started.write_text(str(time.monotonic()))


async def label(key: bytes, value: bytes, text: bytes, partition: int) -> None:
    await examples.send(key=key, value=value, headers={"label": text}, partition=partition)


async def expire(partition: int) -> None:
    watermark = min(seen.get(("impressions", partition), 0), seen.get(("clicks", partition), 0))
    queue, head = queues.setdefault(partition, []), heads.get(partition, 0)
    while head < len(queue) and queue[head][0] + WINDOW_MS < watermark:
        key = queue[head][1]
        head += 1
        value = pending.get(key)
        if value is not None:
            del pending[key]
            await label(key, value, b"0", partition)
    heads[partition] = head


def watermark_of(event: Any) -> int | None:
    mark = dict(event.message.headers or {}).get("headrace-watermark")
    return int(mark) if mark else None


@app.agent(impressions)
async def on_impressions(stream: Any) -> None:
    async for event in stream.events():
        note_start()
        partition = event.message.partition
        mark = watermark_of(event)
        if mark is not None:
            seen["impressions", partition] = mark
        else:
            time_ms = json.loads(event.value)["timestamp"]
            seen["impressions", partition] = max(time_ms, seen.get(("impressions", partition), 0))
            key = event.key
            if early.get(key) is not None:
                del early[key]
                await label(key, event.value, b"1", partition)
            elif pending.get(key) is None:
                pending[key] = event.value
                queues.setdefault(partition, []).append((time_ms, key))
        await expire(partition)


@app.agent(clicks)
async def on_clicks(stream: Any) -> None:
    async for event in stream.events():
        note_start()
        partition = event.message.partition
        mark = watermark_of(event)
        if mark is not None:
            seen["clicks", partition] = mark
            await expire(partition)
            continue
        seen["clicks", partition] = max(json.loads(event.value)["timestamp"], seen.get(("clicks", partition), 0))
        value = pending.get(event.key)
        if value is None:
            early[event.key] = event.value
        else:
            del pending[event.key]
            await label(event.key, value, b"1", partition)


if __name__ == "__main__":
    app.main()
