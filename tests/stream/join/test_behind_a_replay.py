"""Somebody else has a transaction open on `examples` while a worker is lost: a replay of dead letters, say."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import AIOKafkaProducer

from stream.kafka.clients import aiokafka_options
from stream.records.replay import REPLAY_HEADER
from stream.records.watermark import WATERMARK_HEADER
from stream.topics.names import TopicNames
from tests.stream.join.one_partition import read, runs, take

pytestmark = pytest.mark.kafka


@pytest.mark.parametrize("how", ["commit", "abort"])
def test_labels_behind_an_open_transaction_are_not_given_again(topics, tmp_path, how):
    names = TopicNames.of(topics.topics)

    async def run() -> None:
        replay = AIOKafkaProducer(**aiokafka_options(topics.kafka), transactional_id=f"{names.prefix}replay")
        async with AIOKafkaProducer(**aiokafka_options(topics.kafka)) as producer, replay:
            value = b'{"impression_id":"a","timestamp":1700000001000,"features":{}}'
            await producer.send_and_wait(names.impressions, value, key=b"a", partition=0)
            await producer.send_and_wait(
                names.clicks, b'{"impression_id":"a","timestamp":1700000001500}', key=b"a", partition=0
            )
            mark = [(WATERMARK_HEADER, b"1700000099000")]  # the label is due
            for topic in (names.impressions, names.clicks):
                await producer.send_and_wait(topic, b"", partition=0, headers=mark)
            first = await take(topics)
            await replay.begin_transaction()
            headers = [(REPLAY_HEADER, b"dead-letters/0/0")]
            await replay.send_and_wait(names.examples, b"{}", key=b"other", partition=0, headers=headers)
            await first._step(await runs(topics, [names.impressions, names.clicks]))
            await first.close()
            # A worker without its folder has nothing but the log, whose committed part ends before the label.
            assert await read(topics, names.examples) == []
            taking = asyncio.ensure_future(take(topics.model_copy(update={"state_dir": tmp_path / "another"})))
            await asyncio.wait([taking], timeout=1.0)
            await (replay.commit_transaction() if how == "commit" else replay.abort_transaction())
            second = await taking
            assert (second.pending, second._state.entries([b"a"])) == (0, [(1_700_000_001_000, 0, True)])
            await second.close()

    asyncio.run(run())
