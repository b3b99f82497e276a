"""Deltas are written once and whole while answers are lost, the network is cut, and the broker stops."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaConnectionError

from deploy.local_kafka.cluster import LocalKafka
from deploy.settings import LocalKafkaSettings, Settings
from stream.deltas import writer as writing
from stream.deltas.writer import DeltaWriter, Sent
from stream.errors import NoAnswer, Unsettled
from stream.kafka import transactional
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.admin import create_topics
from stream.topics.names import TopicNames
from tests.faults.network import END_TRANSACTION, Link
from tests.stream.deltas.scene import scene, until
from tests.stream.records.made_deltas import pieces

pytestmark = pytest.mark.kafka


def of(writer: DeltaWriter, sequence: int, *, count: int = 1, limit: int = 65_536) -> list[bytes]:
    return pieces(sequence, chain=f"deepfm/{writer._epoch}/0", count=count, limit=limit)


@pytest.mark.parametrize("written", [True, False])
def test_a_commit_whose_answer_is_lost_is_not_done_twice(
    topics: Settings, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    async def run() -> None:
        async with scene(topics) as made:
            writer = await made.writer()
            await writer.send(of(writer, 1))
            commit, lost = writer._commit, []

            async def lose_the_answer(encoded: Any) -> Sent:
                if lost:
                    return await commit(encoded)
                if written:
                    lost.append(await commit(encoded))
                else:
                    lost.append(None)
                    await writer._producer.begin_transaction()
                    await writer._producer.send(made.names.deltas, encoded[0], partition=0)
                raise writing._CommitFailed from KafkaConnectionError("lost")

            monkeypatch.setattr(writer, "_commit", lose_the_answer)
            sent = await writer.send(of(writer, 2, count=3))
            assert not written or sent == lost[0]
            third = await writer.send(of(writer, 3))
            assert third.offset > sent.next_offset and await made.log() == [(1, 1), (1, 2), (1, 3)]
            assert await made.log(sent.offset) == [(1, 2), (1, 3)]

    asyncio.run(run())


def test_a_network_that_loses_answers_and_is_cut(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to a commit is lost: the delta is in the log once. Nothing passes: the writer says that it doesn't know."""
    impatient = topics.kafka.model_copy(update={"request_timeout_ms": 1_000, "connect_timeout_ms": 1_000})
    settings = topics.model_copy(update={"kafka": impatient})
    port = int(topics.kafka.bootstrap_servers.rpartition(":")[2])
    connect = AIOKafkaConnection.connect

    async def run() -> None:
        async with Link(port) as link, scene(topics) as made, scene(settings) as linked:
            linking: set[int] = set()

            async def through_the_link(connection: Any) -> Any:
                connection._port = link.port if linking else port
                return await connect(connection)

            monkeypatch.setattr(AIOKafkaConnection, "connect", through_the_link)
            epoch = await made.epoch()
            linking.add(link.port)
            writer = await linked.writer(epoch)
            await writer.send(of(writer, 1))
            for sequence, silently in ((2, False), (3, True)):
                link.lose(END_TRANSACTION, times=1, silently=silently)
                await writer.send(of(writer, sequence, count=2))
            assert link.lost == 2

            link.cut()
            with monkeypatch.context() as hurried:
                hurried.setattr(writing, "GIVE_UP_S", 0.1)
                hurried.setattr(writing, "ATTEMPT_TIMEOUT_S", 0.5)
                hurried.setattr(transactional, "CLOSE_TIMEOUT_S", 0.2)
                with pytest.raises(Unsettled, match=r"expected an answer about delta 4 .* It may have been written\."):
                    await writer.send(of(writer, 4, count=2))
            with pytest.raises(ValueError, match=r"that isn't settled, \(1, 0, 4\), again, found \(1, 0, 5\)"):
                await writer.send(of(writer, 5))
            link.restore()
            await writer.send(of(writer, 4, count=2))
            await writer.send(of(writer, 5))
            linking.clear()
            assert await made.log() == [(1, each) for each in range(1, 6)]
            await writer.close()

    asyncio.run(run())


def test_a_kafka_that_is_not_there() -> None:
    nowhere = KafkaSettings(bootstrap_servers="127.0.0.1:1", connect_timeout_ms=300)

    async def run() -> None:
        with pytest.raises(NoAnswer, match=r"127\.0\.0\.1:1 .*headrace kafka status"):
            await DeltaWriter(nowhere, TopicNames.of(TopicSettings()), epoch=1).open()

    asyncio.run(run())


def test_a_broker_that_stops_and_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short stop is waited out. In a long one, the writer says that it doesn't know, and settles it with the same delta."""
    chosen = LocalKafkaSettings(dir=tmp_path / "kafka", start_timeout_ms=120_000)
    with LocalKafka(chosen) as kafka:
        settings = Settings(
            kafka=KafkaSettings(bootstrap_servers=kafka.bootstrap_servers, request_timeout_ms=2_000, connect_timeout_ms=60_000)
        )
        create_topics(settings.kafka, settings.topics)

        async def run() -> None:
            async with scene(settings) as made:
                writer, reader = await made.writer(), await made.reader()
                await writer.send(of(writer, 1))
                assert (await reader.next(timeout_s=30)).delta.header.sequence == 1

                await asyncio.to_thread(kafka.stop)
                sending = asyncio.create_task(writer.send(of(writer, 2, count=3)))
                await asyncio.to_thread(kafka.start)
                sent = await sending
                found = None
                while found is None:
                    found = await reader.next(timeout_s=30)
                assert (found.delta.header.sequence, found.next_offset) == (2, sent.next_offset)

                await asyncio.to_thread(kafka.stop)
                monkeypatch.setattr(writing, "GIVE_UP_S", 0.5)
                monkeypatch.setattr(writing, "ATTEMPT_TIMEOUT_S", 1.0)
                monkeypatch.setattr(transactional, "CLOSE_TIMEOUT_S", 0.2)
                third = of(writer, 3, count=2)
                with pytest.raises(Unsettled, match=r"expected an answer about delta 3 .* It may have been written\."):
                    await writer.send(third)
                with pytest.raises(ValueError, match=r"that isn't settled, \(1, 0, 3\), again, found \(1, 0, 4\)"):
                    await writer.send(of(writer, 4))
                monkeypatch.undo()
                await asyncio.to_thread(kafka.start)
                await writer.send(third)
                await writer.send(of(writer, 4))
                assert await made.log() == [(1, 1), (1, 2), (1, 3), (1, 4)]
                await until(lambda: reader.position > 0)
                rest = [found async for found in reader.until(writer.position)]
                assert [each.delta.header.sequence for each in rest] == [3, 4]

        asyncio.run(run())
