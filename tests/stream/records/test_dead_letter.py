"""Dead letters always fit: a record that `dead-letters` doesn't take becomes a letter that says where its bytes are."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from stream.kafka.clients import aiokafka_options
from stream.letters.log import LetterLog, Wanted
from stream.letters.replay import plan_replay, replay_letters
from stream.records.dead_letter import REASONS, SIZE_HEADER, WITHOUT_BYTES, DeadLetter, read_letter
from stream.records.packing import batch_bytes
from stream.records.unreadable import UNREADABLE_HEADER
from stream.scorer.answers import Answers
from stream.scorer.outbox import Outbox
from stream.topics.contract import OUTPUT_MARGIN_BYTES
from stream.topics.limits import letter_limit, max_message_bytes
from stream.topics.names import TopicNames
from stream.trainer.letters import LetterBox
from stream.trainer.metrics import TrainerMetrics

LIMIT = 20_000


def letter(key: bytes | None, value: bytes | None, headers: Any = (), reason: str = "wrong_type") -> DeadLetter:
    return DeadLetter(reason, "expected this, found that", "$.x", "clicks", 3, 17, key, value, tuple(headers))


def consumed(outgoing: Any) -> Any:
    key, value, headers = outgoing
    return SimpleNamespace(partition=0, offset=1, timestamp=5, key=key, value=value, headers=tuple(headers))


def test_a_letter_that_fits_is_as_it_was():
    whole = letter(b"k", b"v" * 15_000, [("trace", b"1"), (SIZE_HEADER, b"theirs")])
    assert whole.outgoing(LIMIT) == (b"k", b"v" * 15_000, whole.out_headers())
    found = read_letter(consumed(whole.outgoing(LIMIT)))
    assert found is not None
    assert (found.headers, found.source_size, found.has_bytes) == (whole.headers, None, True)


def test_a_letter_that_does_not_fit_goes_without_the_bytes_and_says_where_they_are():
    for each in (
        letter(b"k", b"v" * LIMIT),
        letter(b"k" * LIMIT, b""),
        letter(b"k", None, [("large", b"h" * LIMIT)]),
        letter(b"k", None, [("n" * LIMIT, None)]),
        letter(b"k", None, [("reason", b"")] * 100 + [(f"{number}", b"") for number in range(5_000)]),
    ):
        key, value, headers = each.outgoing(LIMIT)
        assert batch_bytes(key, value, headers) <= LIMIT
        found = read_letter(consumed((key, value, headers)))
        assert found is not None
        assert (found.reason, found.path, found.has_bytes) == ("too_large", "$.x", False)
        assert str(found.origin) == "clicks/3/17"
        assert "wrong_type: expected this, found that" in found.error
        assert "20000" in found.error
        assert found.source_size is not None
        assert found.source_size > 10_000
        assert found.key == (b"k" if each.key == b"k" else None)
        assert found.headers == ()


def test_a_letter_too_large_has_no_bytes_even_where_they_would_fit():
    assert letter(b"k", b"v", reason="too_large").outgoing(LIMIT)[:2] == (b"k", None)


@given(
    st.none() | st.binary(),
    st.none() | st.binary(),
    st.lists(st.tuples(st.text(), st.none() | st.binary())),
    st.integers(0, 900),
)
def test_a_letter_never_exceeds_the_limit(key, value, headers, room):
    each = letter(key, value, headers)
    limit = batch_bytes(None, None, each._replace(headers=()).out_headers()) + 200 + room
    assert batch_bytes(*each.outgoing(limit)) <= limit


def test_what_stands_for_records_that_cannot_be_read_becomes_an_unreadable_letter():
    record = SimpleNamespace(
        topic="clicks", partition=3, offset=17, key=None, value=None, headers=((UNREADABLE_HEADER, b"offsets 17 to 20: bomb"),)
    )
    made = DeadLetter.of(record, "empty_value", "$", "expected a JSON object, found an empty value")
    assert made == DeadLetter("unreadable", "offsets 17 to 20: bomb", "$", "clicks", 3, 17, None, None)
    record.key = b"k"  # somebody's own header
    assert DeadLetter.of(record, "empty_value", "$", "").reason == "empty_value"


def test_reasons_without_bytes_are_reasons():
    assert REASONS.keys() >= WITHOUT_BYTES


@pytest.mark.kafka
def test_trainer_and_scorer_write_what_the_topic_takes_and_a_replay_says_why_it_cannot_feed_it(topics):
    """A record of 5 MB, which only a compressing producer can send; `dead-letters` takes 1 MiB."""
    names = TopicNames.of(topics.topics)
    large = DeadLetter("bad_utf8", "e", "$", names.examples, 0, 5, b"k", b"\xff" * 5_000_000)

    def fatal(what: str, error: BaseException) -> None:
        raise AssertionError(what) from error

    async def check() -> None:
        box = LetterBox(topics.kafka, names.dead_letters, 2, TrainerMetrics(CollectorRegistry()), fatal)
        await box.start()
        box.put([large])
        async with asyncio.timeout(20):
            await box.written_up_to(1)
        await box.close()
        outbox = Outbox(
            topics.kafka, {names.scores: 2, names.dead_letters: 2}, scores=names.scores, dead_letters=names.dead_letters
        )
        await outbox.start()
        for sent in await outbox.send(Answers(dead=[large._replace(topic=names.score_requests)])):
            await sent
        await outbox.close()
        async with LetterLog(topics.kafka, names) as log:
            letters = [each async for each in log.letters(Wanted())]
        assert {each.origin.topic for each in letters} == {names.examples, names.score_requests}
        assert [(each.reason, each.source_size) for each in letters] == [("too_large", 5_000_001)] * 2
        for replay in (
            await plan_replay(topics.kafka, names, Wanted()),
            await replay_letters(topics.kafka, names, Wanted(), who="t"),
        ):
            assert (replay.fed.total(), len(replay.without_bytes)) == (0, 2)
        async with AIOKafkaConsumer(**aiokafka_options(topics.kafka)) as consumer:
            places = [TopicPartition(topic, number) for topic in (names.examples, names.score_requests) for number in (0, 1)]
            assert set((await consumer.end_offsets(places)).values()) == {0}

    asyncio.run(check())


@pytest.mark.kafka
def test_limits_are_read_from_the_topics(topics):
    names = TopicNames.of(topics.topics)

    async def check() -> None:
        limit = topics.topics.max_message_bytes + OUTPUT_MARGIN_BYTES
        assert (
            await letter_limit(topics.kafka, names.dead_letters)
            == await max_message_bytes(topics.kafka, names.examples)
            == limit
        )

    asyncio.run(check())
