"""Records that only a compressing producer can send, and foreign ones in `examples`, on the real Kafka: no partition stops."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from deploy.settings import Settings
from stream.join.outgoing import set_aside_too_large
from stream.join.partition import PartitionJoin
from stream.join.plan import Plan
from stream.kafka.clients import aiokafka_options
from stream.kafka.transport import Run
from stream.records.dead_letter import read_letter
from stream.records.example import CORRECTION, FIRST, Example
from stream.records.watermark import WATERMARK_HEADER
from stream.topics.limits import OutputLimits
from stream.topics.names import TopicNames
from tests.raw_batches import RawRecord, raw_batch, raw_records, send_raw_batch
from tests.stream.join.one_partition import read, runs, take

pytestmark = pytest.mark.kafka

T = 1_700_000_000_000
SIZE = 5_000_000


def impression(key: bytes, size: int = 0) -> RawRecord:
    return key, b'{"impression_id":"%b","timestamp":%d,"features":{"text":"%b"}}' % (key, T, b"x" * size), ()


def click(key: bytes, padding: int = 0, after_ms: int = 500) -> RawRecord:
    value = b'{"impression_id":"%b","timestamp":%d,"padding":"%b"}' % (key, T + after_ms, b"x" * padding)
    return key, value, ((b"caf\xe9", b"1"),)


def mark(time_ms: int) -> RawRecord:
    return None, b"", ((WATERMARK_HEADER.encode(), b"%d" % time_ms),)


async def send(settings: Settings, topic: str, *records: RawRecord) -> None:
    await send_raw_batch(settings, topic, 0, raw_batch(raw_records(records), len(records), "zstd"))


async def labels(settings: Settings) -> list[tuple[bytes, bytes, bytes]]:
    found = await read(settings, TopicNames.of(settings.topics).examples)
    ours = [(record.key, dict(record.headers)) for record in found if record.key not in (None, b"k")]
    return sorted((key, headers["label"], headers["kind"]) for key, headers in ours)


async def letters(settings: Settings) -> list[Any]:
    return [read_letter(record) for record in await read(settings, TopicNames.of(settings.topics).dead_letters)]


async def step(settings: Settings, partition: PartitionJoin) -> None:
    """Hand over what has come since."""
    names, ours = TopicNames.of(settings.topics), partition.positions
    for run in await runs(settings, (names.impressions, names.clicks)):
        before = ours.impressions if run.topic == names.impressions else ours.clicks
        records = [record for record in run.records if record.offset >= before]
        await partition._step([Run(run.topic, 0, before, run.after, records)])


def test_what_is_larger_than_the_outputs_take_is_a_dead_letter_without_its_bytes(topics, tmp_path):
    """An impression without a click, one clicked within the hold, one clicked after it; a click for nobody; broken ones."""
    names = TopicNames.of(topics.topics)
    chosen = topics.model_copy(update={"join": topics.join.model_copy(update={"hold_ms": 1_000, "window_ms": 60_000})})

    async def check() -> None:
        await send(chosen, names.impressions, impression(b"large", SIZE), impression(b"early", SIZE), impression(b"late", SIZE))
        await send(chosen, names.impressions, impression(b"small"), (b"broken", b"{" * SIZE, ()), mark(T + 2_000))
        await send(chosen, names.clicks, click(b"small"), click(b"early"), click(b"nobody", SIZE), mark(T + 2_000))
        first = await take(chosen)
        await step(chosen, first)
        await first.close()
        assert await labels(chosen) == [(b"small", b"1", b"first")]
        # A worker without the first one's folder goes on as the first would have.
        second = await take(chosen.model_copy(update={"state_dir": tmp_path / "another"}))
        await send(chosen, names.clicks, click(b"late", after_ms=1_500), mark(T + 70_000))
        await send(chosen, names.impressions, mark(T + 70_000))
        await step(chosen, second)
        await second.close()
        assert await labels(chosen) == [(b"small", b"1", b"first")]
        told = sorted((each.origin.topic, each.key, each.reason, each.origin.offset) for each in await letters(chosen))
        assert told == sorted(
            [
                (names.impressions, b"large", "too_large", 0),
                (names.impressions, b"early", "too_large", 1),
                (names.impressions, b"late", "too_large", 2),
                (names.impressions, b"late", "too_large", 2),  # its correction
                (names.impressions, b"broken", "too_large", 4),
                (names.clicks, b"nobody", "too_large", 2),
            ]
        )
        found = {each.key: each for each in await letters(chosen)}
        assert {each.value for each in found.values()} == {None}
        assert all(SIZE < each.source_size < SIZE + 200 for each in found.values())
        assert "expected an example of at most" in found[b"large"].error
        assert "malformed_json" in found[b"broken"].error
        assert "orphan_click" in found[b"nobody"].error

    asyncio.run(check())


def test_a_limit_that_was_raised_lets_the_next_labels_through(topics):
    names = TopicNames.of(topics.topics)
    mark_ms = T + 70_000

    async def check() -> None:
        await send(topics, names.impressions, impression(b"a", 10_000), impression(b"b"), mark(mark_ms))
        await send(topics, names.clicks, mark(mark_ms))
        partition = await take(topics)
        partition._limits = OutputLimits(example_bytes=10_100)
        await partition._step(await runs(topics, (names.impressions, names.clicks)))
        await partition.close()
        assert await labels(topics) == [(b"b", b"0", b"first")]
        [letter] = await letters(topics)
        assert (letter.key, letter.reason, str(letter.origin)) == (b"a", "too_large", f"{names.impressions}/0/0")

    asyncio.run(check())


def test_an_impression_whose_example_is_too_large_is_named_as_left_out():
    """A rebuild would else take it for one that came late: its next click an orphan, and its id free to be used again."""
    rows = [
        Example(b"a", b"x", 5, 0, -1, FIRST),
        Example(b"b", b"x" * 900, 6, 1, -1, FIRST),
        Example(b"c", b"x" * 900, 7, 2, 9, FIRST),
    ]
    plan = Plan(examples=[*rows, Example(b"d", b"x" * 900, 8, 3, 9, CORRECTION)], left_out=[7], counts=Counter(negatives=2))
    set_aside_too_large(plan, 1_000, "impressions", 4)
    assert plan.examples == rows[:1]
    assert (plan.left_out, plan.counts["negatives"]) == ([7, 1, 2], 1)
    assert [(letter.reason, letter.partition, letter.offset) for letter in plan.dead] == [
        ("too_large", 4, 1),
        ("too_large", 4, 2),
        ("too_large", 4, 3),
    ]
    whole = Plan(examples=list(rows))
    set_aside_too_large(whole, 2_000, "impressions", 4)
    assert whole == Plan(examples=rows)


def test_a_correction_that_is_too_large_has_a_letter_where_its_negative_has_none_in_the_same_step():
    """The negative went out under a higher limit, or was left out by the rate: without a letter the click is gone."""
    correction = Example(b"a", b"x" * 900, 5, 0, 9, CORRECTION)
    alone = Plan(examples=[correction], counts=Counter(negatives=0))
    set_aside_too_large(alone, 1_000, "impressions", 4)
    assert ([letter.offset for letter in alone.dead], alone.left_out, alone.examples) == ([0], [], [])
    by_rate = Plan(examples=[correction], left_out=[0], counts=Counter(negatives=0))
    set_aside_too_large(by_rate, 1_000, "impressions", 4)
    assert ([letter.offset for letter in by_rate.dead], by_rate.left_out) == ([0], [0])
    both = Plan(examples=[Example(b"a", b"x" * 900, 5, 0, -1, FIRST), correction], counts=Counter(negatives=1))
    set_aside_too_large(both, 1_000, "impressions", 4)
    assert ([letter.offset for letter in both.dead], both.left_out) == ([0], [0])


def test_letters_go_to_a_partition_that_dead_letters_has():
    assert [OutputLimits(letter_partitions=3).letter_partition(number) for number in (0, 2, 3, 7)] == [0, 2, 0, 1]
    assert OutputLimits().letter_partition(7) == 7


FOREIGN: list[RawRecord] = [
    (None, b"", ()),
    (None, None, ()),
    (b"k", b"v", ()),
    (b"k", None, ((b"label", b"1"),)),
    (b"k", b"v", ((b"kind", b"first"), (b"label", b"2"))),
    (b"k", b"v", ((b"kind", b"first"), (b"label", None))),
    (b"k", b"v", ((b"kind", None), (b"label", b"1"))),
    (b"k", b"v", ((b"kind", b"first"), (b"label", b"1"), (b"source_offset", b"x"), (b"impression_ms", b"1"))),
    (b"k", b"v", ((b"kind", b"first"), (b"label", b"1"), (b"source_offset", b"1"), (b"impression_ms", b"1"))),
    (
        b"k",
        b"v",
        ((b"kind", b"first"), (b"label", b"1"), (b"source_offset", b"9" * 40), (b"impression_ms", b"1"), (b"click_ms", b"1")),
    ),
    (
        b"k",
        b"v",
        ((b"kind", b"first"), (b"label", b"1"), (b"source_offset", b"1"), (b"impression_ms", b"-1"), (b"click_ms", b"1")),
    ),
    (None, b"v", ((b"kind", b"left_out"),)),
    (None, None, ((b"kind", b"left_out"),)),
    (None, b'["x"]', ((b"kind", b"left_out"),)),
    (None, b"[[1]]", ((b"kind", b"matched"),)),
    (None, b"[[-1,%d,1]]" % (1 << 63), ((b"kind", b"matched"),)),
    (b"k", b"v", ((b"\xff\xfe", b"1"),)),
]


def test_foreign_records_in_examples_are_passed_over_and_counted(topics, tmp_path):
    names = TopicNames.of(topics.topics)

    async def check() -> None:
        async with AIOKafkaProducer(**aiokafka_options(topics.kafka)) as producer:
            for key, value, _ in (impression(b"a"), impression(b"b")):
                await producer.send_and_wait(names.impressions, value, key=key, partition=0)
            key, value, _ = click(b"a")
            await producer.send_and_wait(names.clicks, value, key=key, partition=0)
        first = await take(topics)
        await first._step(await runs(topics, (names.impressions, names.clicks)))
        await first.close()
        await send(topics, names.examples, *FOREIGN)
        for _ in range(2):  # without a folder, and with one that is up to date
            second = await take(topics.model_copy(update={"state_dir": tmp_path / "another"}))
            assert second.pending == 2
            await second.close()
        await send(topics, names.impressions, mark(T + 70_000))
        await send(topics, names.clicks, mark(T + 70_000))
        third = await take(topics.model_copy(update={"state_dir": tmp_path / "a third"}))
        await step(topics, third)
        await third.close()
        assert [row[:2] for row in await labels(topics)] == [(b"a", b"1"), (b"b", b"0")]

    asyncio.run(check())
