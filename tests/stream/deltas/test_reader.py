"""What a reader makes of a log that isn't as it should be, on the real Kafka."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import RecordsToDelete
from aiokafka.structs import TopicPartition
from crc32c import crc32c

from deploy.local_kafka.cluster import LocalKafka
from deploy.settings import Settings
from stream.deltas import reader as reading
from stream.deltas.pieces import DeltaProblem, FoundDelta
from stream.deltas.reader import DeltaReader, read_back
from stream.errors import NoAnswer
from stream.kafka.clients import admin_client
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.names import TopicNames
from tests.stream.deltas.scene import Scene, scene, shown, until
from tests.stream.records.made_deltas import pieces

pytestmark = pytest.mark.kafka


def of(writer_or_epoch: Any, sequence: int, *, count: int = 1) -> list[bytes]:
    epoch = getattr(writer_or_epoch, "_epoch", writer_or_epoch)
    return pieces(sequence, chain=f"deepfm/{epoch}/0", count=count)


async def taken(reader: DeltaReader, count: int) -> list[FoundDelta | DeltaProblem]:
    found: list[FoundDelta | DeltaProblem] = []
    async for each in reader:
        found.append(each)
        if len(found) == count:
            break
    return found


def test_a_log_that_was_hurt_is_reported_and_read_on(topics: Settings) -> None:
    async def run() -> None:
        async with scene(topics) as made:
            first, second, third = of(1, 1, count=3), of(1, 2, count=2), of(1, 3)
            flipped = second[1][:-1] + bytes([second[1][-1] ^ 4])
            later = first[0][:4] + struct.pack("<H", 9) + first[0][6:]
            later = later[:40] + struct.pack("<I", crc32c(later[:40] + later[44:])) + later[44:]
            log = [
                *first,  # 0 to 2
                *(second[0], flipped),  # 3, 4: a byte that flipped
                *(first[0], first[2], first[1]),  # 5 to 7: another order
                *(second[0], second[0], second[1]),  # 8 to 10: begun twice, and whole the second time
                *(later, first[1]),  # 11, 12: a format of the future
                *(None, b"x"),  # 13, 14: not ours
                *first[:2],  # 15, 16: the last piece is missing
                *third,  # 17
            ]
            reader = await made.reader(None)
            assert reader.position == 0
            await made.write(log)
            found = await taken(reader, 10)
            assert [shown(each) for each in found] == [
                *((1, 1), "checksum", "missing_piece", "repeated_piece", (1, 2), "unknown_format"),
                *("not_a_delta", "not_a_delta", "missing_piece", (1, 3)),
            ]
            assert [(each.offset, each.next_offset) for each in found] == [
                *((0, 3), (3, 5), (5, 7), (8, 9), (9, 11), (11, 12), (13, 14), (14, 15), (15, 17), (17, 18)),
            ]
            broken = found[1]
            assert isinstance(broken, DeltaProblem)
            assert (broken.epoch, broken.ordinal, broken.sequence) == (1, 0, 2) and "CRC-32C" in broken.message
            assert await made.log() == [shown(each) for each in found]
            assert await made.log(1) == ["missing_piece", *[shown(each) for each in found[1:]]]
            assert reader.at_end and reader.position == 18

    asyncio.run(run())


def test_positions_and_the_end(topics: Settings) -> None:
    async def run() -> None:
        async with scene(topics) as made:
            writer = await made.writer()
            reader = DeltaReader(made.kafka, made.names, start=None)
            made.opened.append(reader)
            assert (reader.position, reader.at_end, reader.seen_end_at) == (-1, False, None)
            await writer.send(of(writer, 1, count=2))
            await reader.open()
            assert reader.position == 3
            assert await reader.next(timeout_s=0.5) is None
            await until(lambda: reader.at_end)
            seen = reader.seen_end_at
            assert seen is not None
            sent = await writer.send(of(writer, 2, count=2))
            third = await writer.send(of(writer, 3))
            found = await reader.next(timeout_s=30)
            assert isinstance(found, FoundDelta) and (found.offset, found.next_offset) == (sent.offset, sent.next_offset)
            assert reader.position in (sent.next_offset, sent.next_offset + 1, third.offset)
            [last] = await taken(reader, 1)
            assert last.offset == third.offset and await reader.end() == third.next_offset + 1
            await until(lambda: reader.at_end and (reader.seen_end_at or 0.0) > seen)
            # A reader that starts at any of these positions reads what this one did from there on.
            assert await made.log(sent.next_offset) == [(1, 3)]
            assert await made.log(sent.next_offset + 1) == [(1, 3)]

    asyncio.run(run())


def test_half_a_delta_at_the_end_of_a_copied_log(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the topic grows record by record. Its rest is waited for; if it doesn't come, that is reported once."""

    async def run() -> None:
        async with scene(topics) as made:
            reader = await made.reader()
            first, second = of(1, 1, count=3), of(1, 2, count=3)
            await made.write(first[:2])
            assert await reader.next(timeout_s=1.0) is None
            assert reader.position == 0 and not reader.at_end
            assert await made.log() == ["missing_piece"]
            await made.write(first[2:])
            assert [shown(each) for each in await taken(reader, 1)] == [(1, 1)]

            monkeypatch.setattr(reading, "UNFINISHED_S", 0.3)
            await made.write(second[:2])
            [problem] = await taken(reader, 1)
            assert isinstance(problem, DeltaProblem) and (problem.offset, problem.next_offset) == (3, 5)
            assert problem.message.endswith("expected piece 2 of 3, found the end of the log.")
            await made.write([second[2], *of(1, 3)])
            assert [shown(each) for each in await taken(reader, 1)] == [(1, 3)]

    asyncio.run(run())


def test_retention_that_passes_the_reader(topics: Settings) -> None:
    async def run() -> None:
        async with scene(topics) as made:
            writer = await made.writer()
            sent = [await writer.send(of(writer, sequence, count=2)) for sequence in (1, 2, 3)]
            async with admin_client(made.kafka) as admin:
                # In the middle of the second delta.
                await admin.delete_records({TopicPartition(made.names.deltas, 0): RecordsToDelete(sent[1].offset + 1)})
            reader = await made.reader(0)
            gone, third = await taken(reader, 2)  # the rest of the second delta is passed over
            assert isinstance(gone, DeltaProblem) and (gone.reason, gone.next_offset) == ("log_gone", sent[1].offset + 1)
            assert f"expected offset 0, found a log from {sent[1].offset + 1} to {sent[2].next_offset + 1}" in gone.message
            assert (shown(third), third.offset) == ((1, 3), sent[2].offset)
            assert await made.log(0) == ["log_gone", (1, 3)]
            assert await made.log(sent[2].offset) == [(1, 3)]

    asyncio.run(run())


def test_a_topic_that_is_deleted_and_created_again(topics: Settings) -> None:
    async def run() -> None:
        async with scene(topics) as made:
            old = await made.writer()
            for sequence in (1, 2, 3):
                await old.send(of(old, sequence, count=2))
            reader = await made.reader()
            assert [shown(each) for each in await taken(reader, 3)] == [(1, 1), (1, 2), (1, 3)]
            await until(lambda: reader.at_end)
            await made.delete()
            assert await reader.next(timeout_s=0.5) is None
            await made.create()
            new = await made.writer()
            sent = await new.send(of(new, 1))
            gone, first = await taken(reader, 2)
            assert (shown(gone), gone.next_offset, shown(first), first.offset) == ("log_gone", 0, (2, 1), sent.offset)
            # A version of the old topic names an offset that the new one doesn't have.
            assert await made.log(9) == ["log_gone", (2, 1)]

    asyncio.run(run())


def flip(folder: Path, topic: str, value: bytes) -> None:
    """Flip a bit of a record's value in the log of partition 0, as it lies on the broker's disk."""
    [log] = [path for path in folder.rglob("*.log") if path.parent.name == f"{topic}-0"]
    data = log.read_bytes()
    at = data.index(value) + len(value) // 2
    with log.open("r+b") as file:
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))


def test_a_byte_that_flips_on_the_brokers_disk(topics: Settings, kafka: LocalKafka) -> None:
    """Kafka's own checksum is wrong then. The batch is passed over, and what is before and after it is read."""

    async def run() -> None:
        async with scene(topics) as made:
            writer = await made.writer()
            encoded = [of(writer, sequence, count=count) for sequence, count in ((1, 1), (2, 3), (3, 1))]
            sent = [await writer.send(each) for each in encoded]
            flip(kafka.dir, made.names.deltas, encoded[1][1])
            reader = await made.reader()
            first, damaged, third = await taken(reader, 3)
            assert (shown(first), shown(damaged), shown(third)) == ((1, 1), "checksum", (1, 3))
            assert (damaged.offset, damaged.next_offset, third.offset) == (sent[1].offset, sent[1].offset + 2, sent[2].offset)
            assert await made.log() == [(1, 1), "checksum", (1, 3)]

    asyncio.run(run())


def test_a_reader_that_loses_its_consumer_connects_again(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with scene(topics) as made:
            monkeypatch.setattr(reading, "RECONNECT_S", 0.05)
            writer, reader = await made.writer(), await made.reader()
            await made.write(of(1, 1, count=3)[:1])
            assert await reader.next(timeout_s=0.5) is None
            broken = reader._consumer

            async def fail(*partitions: object, **options: object) -> None:
                raise ConnectionResetError("gone")

            monkeypatch.setattr(broken, "getmany", fail)
            assert await reader.next(timeout_s=0.2) is None
            await made.write(of(1, 1, count=3)[1:])
            await writer.send(of(writer, 2))
            assert [shown(each) for each in await taken(reader, 2)] == [(1, 1), (1, 2)]
            assert reader._consumer is not broken

    asyncio.run(run())


def test_reading_back_ends_though_the_writer_goes_on(topics: Settings) -> None:
    async def run() -> None:
        async with scene(topics) as made:
            writer = await made.writer()
            for sequence in range(1, 6):
                await writer.send(of(writer, sequence, count=2))
            found, sequence = [], 5
            async for each in read_back(made.kafka, made.names, 0):
                found.append(shown(each))
                sequence += 1
                await writer.send(of(writer, sequence))
            # Deltas that were written after the beginning may have come with the last fetch.
            assert found == [(1, each) for each in range(1, len(found) + 1)] and len(found) >= 5

    asyncio.run(run())


def test_nothing_comes(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "STALL_S", 0.3)

    async def run(made: Scene) -> None:
        reader = await made.reader()
        with pytest.raises(NoAnswer, match=r"expected deltas up to offset 5, found none after 0 for 0 s\."):
            [each async for each in reader.until(5)]

    async def scenes() -> None:
        async with scene(topics) as made:
            await run(made)

    asyncio.run(scenes())


def test_a_kafka_that_is_not_there() -> None:
    nowhere = KafkaSettings(bootstrap_servers="127.0.0.1:1", connect_timeout_ms=300)

    async def run() -> None:
        with pytest.raises(NoAnswer, match=r"127\.0\.0\.1:1 .*headrace kafka status"):
            await DeltaReader(nowhere, TopicNames.of(TopicSettings()), start=0).open()

    asyncio.run(run())
