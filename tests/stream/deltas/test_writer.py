"""Deltas are written whole, in order, and by one trainer at a time, on the real Kafka."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from deploy.settings import Settings
from stream.deltas import writer as writing
from stream.deltas.newest_epoch import newest_epoch
from stream.deltas.writer import DeltaWriter, Sent, deltas_transactional_id
from stream.errors import DeltaTooLarge, Fenced, TopicError
from stream.kafka.clients import aiokafka_options
from stream.records.delta import DeltaHeader, encode_delta
from stream.registry.writer import RegistryWriter
from tests.stream.deltas.scene import Scene, scene
from tests.stream.records.made_deltas import header, model_delta, pieces, same

pytestmark = pytest.mark.kafka


def of(writer: DeltaWriter, sequence: int, *, count: int = 1, limit: int = 65_536) -> list[bytes]:
    return pieces(sequence, chain=f"deepfm/{writer._epoch}/0", count=count, limit=limit)


def stated(writer: DeltaWriter, sequence: int) -> DeltaHeader:
    return header(sequence, chain=f"deepfm/{writer._epoch}/0")


def test_a_registry_that_has_lost_epochs_gives_out_none_that_is_in_the_log(topics: Settings) -> None:
    async def run() -> None:
        async with scene(topics) as made:
            assert await newest_epoch(made.kafka, made.names) == 0
            registry = RegistryWriter(made.kafka, made.names, who="trainer@here")
            made.opened.append(registry)
            writer = await made.writer(await registry.take_trainer_epoch(above=6))
            await writer.send(of(writer, 1))
            await made.write([b"a stranger's", None])
            assert await newest_epoch(made.kafka, made.names) == 7
            # As after a reindexing, which knows the epochs of versions only: 7 was never announced.
            assert await registry.take_trainer_epoch(above=await newest_epoch(made.kafka, made.names)) == 8

    asyncio.run(run())


def test_a_delta_is_read_as_it_was_written(topics: Settings) -> None:
    async def run() -> None:
        async with scene(topics) as made:
            writer = await made.writer()
            assert (writer.position, writer.limit) == (0, topics.topics.deltas_max_message_bytes)
            reader = await made.reader()
            first = model_delta(rows=100_000, dim=16, gone=50, dense={"w": (400, 40), "b": ()})
            sent = await writer.publish(stated(writer, 1), first)
            assert (sent.offset, sent.next_offset) == (0, 8)
            found = await reader.next(timeout_s=30)
            assert same(found.delta.model, first) and (found.offset, found.next_offset) == (0, 8)
            assert found.delta.header.rows == 100_000

            second = await writer.send(of(writer, 2))
            assert (second.offset, second.next_offset) == (9, 10)  # 8 has the marker of the transaction
            assert second.arrived_ms >= sent.arrived_ms > 1_700_000_000_000
            assert writer.position == 10
            assert await made.log() == [(1, 1), (1, 2)]
            assert await made.log(sent.next_offset) == [(1, 2)]
            assert await made.log(second.next_offset) == []
            again = await made.writer()
            assert again.position == 11

    asyncio.run(run())


def test_a_torn_transaction_is_never_read(topics: Settings) -> None:
    """Half of a delta is in the log, and its writer says nothing more: readers wait, and the next writer ends it."""

    async def run() -> None:
        async with scene(topics) as made:
            writer = await made.writer()
            await writer.send(of(writer, 1))
            torn = AIOKafkaProducer(**aiokafka_options(made.kafka), transactional_id=deltas_transactional_id(made.names))
            await torn.start()
            try:
                await torn.begin_transaction()
                for piece in of(writer, 2, count=3)[:2]:
                    await torn.send_and_wait(made.names.deltas, piece, partition=0)
                assert await made.log() == [(1, 1)]
                reader = await made.reader(None)
                second = await made.writer()
                await second.send(of(second, 7))
                found = await reader.next(timeout_s=30)
                assert found.delta.header.chain == "deepfm/2/0"
                assert await made.log() == [(1, 1), (2, 7)]
            finally:
                await torn.stop()

    asyncio.run(run())


KILLED = """
import asyncio, sys
from pathlib import Path
from stream.deltas.writer import DeltaWriter
from stream.kafka.batches import send_batches
from stream.kafka.clients import written
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.names import TopicNames
from tests.stream.records.made_deltas import pieces

async def run(servers, prefix, epoch, torn):
    kafka = KafkaSettings(bootstrap_servers=servers)
    writer = DeltaWriter(kafka, TopicNames.of(TopicSettings(prefix=prefix)), epoch=epoch)
    await writer.open()
    for sequence in range(1, 10_000):
        encoded = pieces(sequence, chain=f"deepfm/{epoch}/0", count=3)
        if sequence == torn:
            await writer._producer.begin_transaction()
            for piece in encoded[:2]:
                await written(kafka, await send_batches(writer._producer, writer._topic, 0, [(None, piece, ())]), "half")
            print("torn", flush=True)
            await asyncio.sleep(600)
        await writer.send(encoded)
        print(sequence, flush=True)

asyncio.run(run(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""


def killed_writer(made: Scene, epoch: int, *, torn: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED, made.kafka.bootstrap_servers, made.names.prefix, str(epoch), str(torn)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])


def test_kill_9_in_the_middle_of_a_delta(topics: Settings) -> None:
    async def run() -> None:
        async with scene(topics) as made:
            process = killed_writer(made, await made.epoch(), torn=3)
            assert process.stdout is not None
            with process.stdout:
                told = [await asyncio.to_thread(process.stdout.readline) for _ in range(3)]
                process.send_signal(signal.SIGKILL)
                process.wait()
            assert told == ["1\n", "2\n", "torn\n"]
            reader = await made.reader(0)
            assert [(await reader.next(timeout_s=30)).delta.header.sequence for _ in range(2)] == [1, 2]
            writer = await made.writer()
            sent = await writer.send(of(writer, 3))
            assert writer.position == sent.next_offset
            found = await reader.next(timeout_s=30)
            assert (found.delta.header.chain, found.offset) == ("deepfm/2/0", sent.offset)
            assert await made.log() == [(1, 1), (1, 2), (2, 3)]

    asyncio.run(run())


def test_kill_9_at_any_moment(topics: Settings) -> None:
    """The log has what the writer was told to be written, and at most one delta more, all whole and in order."""

    async def run() -> None:
        async with scene(topics) as made:
            expected: list[Any] = []
            for epoch in (1, 2, 3):
                assert await made.epoch() == epoch
                process = killed_writer(made, epoch, torn=0)
                assert process.stdout is not None
                with process.stdout:
                    await asyncio.to_thread(process.stdout.readline)
                    await asyncio.sleep(random.uniform(0.0, 0.5))
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    told = 1 + len(process.stdout.read().splitlines())
                after = await made.writer(epoch)
                found = await made.log()
                assert found[: len(expected)] == expected
                mine = found[len(expected) :]
                assert mine == [(epoch, sequence) for sequence in range(1, len(mine) + 1)]
                assert told <= len(mine) <= told + 1
                await after.send(of(after, len(mine) + 1))
                expected = [*found, (epoch, len(mine) + 1)]
            assert await made.log() == expected

    asyncio.run(run())


def test_a_trainer_thought_dead_writes_nothing_more(topics: Settings) -> None:
    async def run() -> None:
        async with scene(topics) as made:
            old = await made.writer()
            await old.send(of(old, 1))
            new = await made.writer()
            expected = r"expected the trainer's epoch 2 \(taken by trainer@here\), found 1: another trainer has taken over"
            for _ in range(2):  # it stays out, and each attempt fences the new one, which goes on all the same
                with pytest.raises(Fenced, match=expected):
                    await old.send(of(old, 2))
                await new.send(of(new, 1 + len(await made.log())))
            with pytest.raises(Fenced, match=expected):
                await made.writer(1)
            assert await made.log() == [(1, 1), (2, 2), (2, 3)]

    asyncio.run(run())


def test_a_trainer_that_has_its_epoch_but_no_writer_yet(topics: Settings) -> None:
    """The old one may still write until the new one opens its writer; what it wrote is below the new one's position."""

    async def run() -> None:
        async with scene(topics) as made:
            old = await made.writer()
            epoch = await made.epoch()
            sent = await old.send(of(old, 1))
            new = await made.writer(epoch)
            assert new.position > sent.offset
            assert await made.log(0) == [(1, 1)]

    asyncio.run(run())


def test_two_writers_of_one_epoch(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MAX_FENCED", 2)

    async def run() -> None:
        async with scene(topics) as made:
            one, other = await made.writer(), await made.writer(1)
            commit, interfering = one._commit, []

            async def after_the_other(encoded: Any) -> Sent:
                interfering.append(await other.send(of(other, 100 + len(interfering))))
                return await commit(encoded)

            monkeypatch.setattr(one, "_commit", after_the_other)
            with pytest.raises(Fenced, match="expected to be the only writer of epoch 1, found another one 3 times"):
                await one.send(of(one, 1))
            assert await made.log() == [(1, 100), (1, 101), (1, 102)]

    asyncio.run(run())


def test_a_limit_that_is_lowered(topics: Settings) -> None:
    async def run() -> None:
        async with scene(topics) as made:
            writer = await made.writer()
            delta = model_delta(rows=5_000, dim=16)
            await writer.publish(stated(writer, 1), delta)
            await made.configure(max_message_bytes=70_000)
            sent = await writer.publish(stated(writer, 2), delta)
            assert writer.limit == 70_000 and sent.next_offset - sent.offset == 6
            with pytest.raises(DeltaTooLarge, match=r"expected to take records of 70,000 bytes, found a limit of 70,000"):
                await writer.send(encode_delta(stated(writer, 3), delta, 200_000))
            await writer.publish(stated(writer, 3), delta)
            await made.configure(max_message_bytes=65_536)
            with pytest.raises(DeltaTooLarge, match=r"70,000 bytes, found a limit of 65,536"):
                await writer.send(encode_delta(stated(writer, 4), delta, writer.limit))
            assert await made.log() == [(1, 1), (1, 2), (1, 3)]

    asyncio.run(run())


def test_pieces_that_do_not_belong(topics: Settings) -> None:
    async def run() -> None:
        async with scene(topics) as made:
            writer = await made.writer()
            with pytest.raises(ValueError, match=r"a delta of epoch 1, found delta 1 of epoch 9, chain 0\. Each epoch"):
                await writer.send(pieces(1, chain="deepfm/9/0"))
            assert await made.log() == []

    asyncio.run(run())


def test_a_topic_that_is_not_there(topics: Settings) -> None:
    async def run() -> None:
        async with scene(topics) as made:
            await made.delete()
            expected = rf"expected topics {made.names.deltas}, did not find .*Run `headrace topics create`"
            with pytest.raises(TopicError, match=expected):
                await made.writer()
            with pytest.raises(TopicError, match=expected):
                await made.reader()

    asyncio.run(run())


def test_a_topic_made_anew_under_the_writer(topics: Settings) -> None:
    """Either Kafka takes the next delta, or the writer says what has happened; the log has only whole deltas of that writer."""

    async def run() -> None:
        async with scene(topics) as made:
            writer = await made.writer()
            for sequence in (1, 2):
                await writer.send(of(writer, sequence))
            await made.delete()
            await made.create()
            await writer._drop()  # as after any failure
            with pytest.raises(TopicError, match=r"expected the topic with id .*: it was deleted and made anew\. "):
                await writer.send(of(writer, 3))
            again = await made.writer()
            assert again.position == 0
            await again.send(of(again, 1))
            assert await made.log() == [(2, 1)]

    asyncio.run(run())
