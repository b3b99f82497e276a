"""Reading stretches of a log whose offsets aren't all records."""

from __future__ import annotations

import asyncio
import time

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.structs import TopicPartition

from stream.errors import Abandoned, NoAnswer
from stream.kafka.clients import aiokafka_options, started
from stream.kafka.read_log import Positions, Span, first_records, log_consumer, log_spans, read_spans, read_to
from stream.topics.names import TopicNames

PATIENCE_S = 60.0


@pytest.mark.kafka
def test_where_markers_and_aborted_records_lie(topics):
    """Offsets of one partition: 0 and 1 records, 2 their marker, 3 aborted, 4 its marker, 5 a record, 6 its marker."""
    topic = TopicNames.of(topics.topics).impressions
    one, empty = TopicPartition(topic, 0), TopicPartition(topic, 1)

    async def check() -> None:
        async with AIOKafkaProducer(**aiokafka_options(topics.kafka), transactional_id=f"{topic}-test") as producer:
            for values, ends in (((b"0", b"1"), True), ((b"3",), False), ((b"5",), True)):
                await producer.begin_transaction()
                for value in values:
                    await producer.send_and_wait(topic, value, partition=0)
                await (producer.commit_transaction() if ends else producer.abort_transaction())
        for committed, behind_two in ((True, 5), (False, 3)):
            consumer = log_consumer(topics.kafka, committed=committed, max_partition_fetch_bytes=1)
            await consumer.start()
            began = time.monotonic()
            try:
                for span, offset in (
                    ((0, 7), 0),
                    ((1, 7), 1),
                    ((2, 3), None),
                    ((2, 7), behind_two),
                    ((4, 5), None),
                    ((6, 7), None),
                    ((7, 7), None),
                ):
                    first = await first_records(consumer, {one: Span(*span), empty: Span(0, 0)}, within_s=PATIENCE_S)
                    assert {tp: record and record.offset for tp, record in first.items()} == {one: offset, empty: None}
                assert await first_records(consumer, {one: Span(7, 8)}, within_s=0.5) == {}
                read = [record.offset async for _, run in read_spans(consumer, {one: Span(1, 7)}, stall_s=20) for record in run]
            finally:
                await consumer.stop()
            assert time.monotonic() - began < PATIENCE_S, "where no record is the position says so, and nobody waits for one"
            assert read == ([1, 5] if committed else [1, 3, 5])

    asyncio.run(check())


@pytest.mark.kafka
def test_reading_goes_on_from_where_it_was(topics):
    topic = TopicNames.of(topics.topics).impressions
    one = TopicPartition(topic, 0)

    async def check() -> None:
        async with AIOKafkaProducer(**aiokafka_options(topics.kafka)) as producer:
            for number in range(10):
                await producer.send_and_wait(topic, b"%d" % number, partition=0)
        consumer = await started(topics.kafka, log_consumer(topics.kafka), "a test")
        try:
            assert await log_spans(topics.kafka, consumer, [one]) == {one: Span(0, 10)}
            consumer.assign([one])
            consumer.seek(one, 0)
            read: list[int] = []
            rounds: list[int] = []
            for end in (5, 10, 10):  # the last finds nothing to read
                async for tp, records in read_to(
                    consumer, {one: end}, max_records=4, on_round=lambda at: rounds.append(at[one])
                ):
                    assert tp == one
                    read += [record.offset for record in records]
                assert await consumer.position(one) >= end and rounds[-1] >= end
            assert read == list(range(10)), "each record once, also those that came with the end of an earlier reading"
            assert rounds == sorted(rounds) and rounds[0] == 0

            def leave(at: Positions) -> None:
                raise Abandoned("enough")

            consumer.seek(one, 0)
            with pytest.raises(Abandoned, match="enough"):
                async for _ in read_to(consumer, {one: 10}, on_round=leave):
                    raise AssertionError("nothing is read once the caller has enough")
            with pytest.raises(NoAnswer, match=rf"{topic}, partition 0: expected to read up to offset 11, found nothing"):
                async for _ in read_spans(consumer, {one: Span(0, 11)}, stall_s=0.5):
                    pass
        finally:
            await consumer.stop()

    asyncio.run(check())
