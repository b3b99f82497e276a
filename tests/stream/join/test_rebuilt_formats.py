"""Rebuilding from a log of other formats: each record is read as it was read then, whatever has changed since."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client import CollectorRegistry

from state.join_state import JoinState, StateOptions
from stream.errors import PositionError, StreamError
from stream.formats import Formats, open_formats
from stream.join.commit_metadata import decode_progress
from stream.join.committed import Committed
from stream.join.metrics import JoinMetrics
from stream.join.partition import PartitionJoin, TakenOver
from stream.join.rebuild import Rebuild
from stream.kafka.transport import LogEnd, Run
from stream.records.dead_letter import Origin
from stream.settings import JoinSettings, SchemaRegistrySettings
from tests.stream.formats.stand_in import StandIn, avro_frame, framed
from tests.stream.join.fake_log import FakeConsumer, FakeLog, FakeProducer
from tests.stream.join.owner import Owner
from tests.stream.join.world import NAMES

TIME_MS = 10**12  # when the fake log's records arrive
FLAT = {
    "type": "record",
    "name": "Event",
    "fields": [
        {"name": "impression_id", "type": "string"},
        {"name": "timestamp", "type": "long"},
        {"name": "user", "type": "string"},
    ],
}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr("stream.formats.reader.CONFIRM_S", 0.02)
    monkeypatch.setattr("stream.formats.reader.FIRST_WAIT_S", 0.02)
    with StandIn() as running:
        running.register(1, "AVRO", FLAT)
        running.register(2, "JSON", {})
        yield running


class Chosen(NamedTuple):
    """Settings of one start."""

    join: JoinSettings
    schema_registry: SchemaRegistrySettings


class OnePartition:
    """A partition over a log in memory, whose disk is lost at every start."""

    def __init__(self, folder: Path, registry: StandIn) -> None:
        self.folder, self.registry, self.log, self.starts = folder, registry, FakeLog(NAMES), 0

    def settings(self, envelope: str = "none", *, url: bool = True) -> Chosen:
        join = JoinSettings(window_ms=60_000, hold_ms=1_000, lateness_ms=0, envelope=envelope)  # type: ignore[arg-type]
        return Chosen(join, SchemaRegistrySettings(url=self.registry.url if url else None))

    def formats(self, chosen: Chosen) -> Formats:
        return open_formats(chosen.schema_registry)

    async def start(self, chosen: Chosen) -> PartitionJoin:
        self.starts += 1
        committed = Committed(0, 0, 0, 0, 0, len(self.log.topics[NAMES.examples]), None)
        if self.log.committed:
            (impressions, metadata), (clicks, _) = (self.log.committed[topic] for topic in (NAMES.impressions, NAMES.clicks))
            committed.impressions, committed.clicks, committed.progress = impressions, clicks, decode_progress(metadata)
        settings, formats = chosen.join, self.formats(chosen)
        state = JoinState(self.folder / str(self.starts), StateOptions(8))
        try:
            rebuild = Rebuild(
                settings,
                NAMES,
                0,
                "i",
                consumer=FakeConsumer(self.log),
                state=state,
                committed=committed,
                still_ours=lambda: True,
                formats=formats,
                letters_of=self.letters_of,
            )
            rebuilt = await rebuild.run()
            taken = TakenOver(FakeProducer(self.log), state, rebuilt.memory, rebuilt.positions, rebuilt.pending)
        except BaseException:
            state.close()
            await formats.close()
            raise
        return PartitionJoin(
            0,
            settings=settings,
            names=NAMES,
            group="g",
            identity="i",
            partitions=1,
            taken=taken,
            owner=Owner(lambda topic: LogEnd(0, 0, 0)),
            metrics=JoinMetrics(CollectorRegistry()),
            formats=formats,
        )

    async def letters_of(self, origins: set[Origin]) -> set[Origin]:
        headers = [dict(record.headers) for record in self.log.records(NAMES.dead_letters)]
        return {
            Origin(each["source_topic"].decode(), 0, int(each["source_offset"]))
            for each in headers
            if each["reason"] == b"unknown_schema"
        } & origins

    async def step(self, partition: PartitionJoin) -> None:
        runs = []
        for topic, start in (
            (NAMES.impressions, partition.positions.impressions),
            (NAMES.clicks, partition.positions.clicks),
        ):
            end = len(self.log.topics[topic])
            runs.append(Run(topic, 0, start, end, self.log.records(topic, start)))
        await partition._step(await partition._prepared(runs))

    async def stop(self, partition: PartitionJoin) -> None:
        await partition.close()
        await partition._formats.close()

    def send(self, topic: str, key: str, value: bytes) -> None:
        self.log.append(topic, key.encode(), value)

    @property
    def examples(self) -> list[tuple[bytes, dict[str, Any], bytes]]:
        """Key, value and label of each example."""
        return [
            (record.key, json.loads(record.value), dict(record.headers)["label"])
            for record in self.log.records(NAMES.examples)
            if record.key is not None
        ]

    @property
    def reasons(self) -> list[bytes]:
        return [dict(record.headers)["reason"] for record in self.log.records(NAMES.dead_letters)]

    async def end(self, partition: PartitionJoin) -> None:
        """Every first label leaves."""
        for topic in (NAMES.impressions, NAMES.clicks):
            self.log.append(topic, None, b"", (("headrace-watermark", b"%d" % (TIME_MS + 3_600_000)),))
        for _ in range(3):
            await self.step(partition)


def event(key: str, **more: Any) -> dict[str, Any]:
    return {"impression_id": key, "timestamp": TIME_MS, **more}


def test_pending_frames_are_read_again_as_they_were(registry, tmp_path):
    async def go() -> OnePartition:
        world = OnePartition(tmp_path, registry)
        for index in range(4):
            key = f"i{index}"
            world.send(NAMES.impressions, key, avro_frame(1, FLAT, event(key, user=f"u{index}")))
        world.send(NAMES.clicks, "i1", framed(2, json.dumps(event("i1")).encode()))
        world.send(NAMES.clicks, "nobody", framed(2, json.dumps(event("nobody")).encode()))
        first = await world.start(world.settings())
        await world.step(first)
        await world.stop(first)
        second = await world.start(world.settings())
        assert second.pending == 4
        await world.end(second)
        await world.stop(second)
        return world

    world = asyncio.run(go())
    labels = {b"i0": b"0", b"i1": b"1", b"i2": b"0", b"i3": b"0"}
    assert world.examples == [
        (key, event(key.decode(), features={"user": f"u{key.decode()[1]}"}), label) for key, label in labels.items()
    ]
    [letter] = world.log.records(NAMES.dead_letters)
    assert dict(letter.headers)["reason"] == b"orphan_click"
    assert letter.value == framed(2, json.dumps(event("nobody")).encode())  # as it came


def test_other_settings_change_nothing_for_what_was_read(registry, tmp_path):
    """What was a dead letter stays one, and what was taken out of its envelope is taken out of it again."""
    row = json.dumps({"before": None, "after": event("i0", features={}), "op": "c"}).encode()
    wrapped = json.dumps({"schema": {}, "payload": event("i1", features={})}).encode()

    async def go() -> OnePartition:
        world = OnePartition(tmp_path, registry)
        world.send(NAMES.impressions, "i0", row)
        world.send(NAMES.impressions, "i1", wrapped)
        world.send(NAMES.impressions, "i2", framed(2, json.dumps(event("i2", features={})).encode()))
        first = await world.start(world.settings("debezium", url=False))
        await world.step(first)
        await world.stop(first)
        assert world.reasons == [b"framed"]
        second = await world.start(world.settings("none"))
        assert second.pending == 2
        # From here on the new settings count.
        world.send(NAMES.impressions, "i3", wrapped.replace(b"i1", b"i3"))
        world.send(NAMES.impressions, "i4", framed(2, json.dumps(event("i4", features={})).encode()))
        await world.end(second)
        await world.stop(second)
        return world

    world = asyncio.run(go())
    assert [key for key, _, _ in world.examples] == [b"i0", b"i1", b"i4"]
    assert world.reasons == [b"framed", b"enveloped"]


def test_a_rebuild_without_the_registry_stops(registry, tmp_path):
    async def go() -> None:
        world = OnePartition(tmp_path, registry)
        world.send(NAMES.impressions, "i0", avro_frame(1, FLAT, event("i0", user="u")))
        first = await world.start(world.settings())
        await world.step(first)
        await world.stop(first)
        with pytest.raises(StreamError, match=r"schema_registry.url: expected the registry that records of this partition"):
            await world.start(world.settings(url=False))
        again = await world.start(world.settings())
        assert again.pending == 1
        await world.stop(again)

    asyncio.run(go())


def test_a_schema_that_was_deleted_stops_a_rebuild(registry, tmp_path):
    """A record that was a dead letter then stays one; one that was accepted can't become one."""

    async def go() -> None:
        world = OnePartition(tmp_path, registry)
        world.send(NAMES.impressions, "i0", framed(77, b"{}"))
        world.send(NAMES.impressions, "i1", avro_frame(1, FLAT, event("i1", user="u")))
        first = await world.start(world.settings())
        await world.step(first)
        await world.stop(first)
        assert world.reasons == [b"unknown_schema"]
        again = await world.start(world.settings())
        assert again.pending == 1
        await world.stop(again)
        registry.forget(1)
        with pytest.raises(PositionError, match=r"rebuilding reads 1 records again whose schema .* such as impressions/0/1 "):
            await world.start(world.settings())
        registry.register(1, "AVRO", FLAT)
        last = await world.start(world.settings())
        await world.end(last)
        await world.stop(last)
        assert [key for key, _, _ in world.examples] == [b"i1"]

    asyncio.run(go())
