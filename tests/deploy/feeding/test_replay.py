"""A replay: events in the order in which they happened, each in its partition, scores first, a watermark at the end."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.structs import TopicPartition
from hypothesis import given
from hypothesis import strategies as st
from kafka.partitioner import murmur2

from deploy.errors import DataSetError, FeedError
from deploy.feeding.replay import Replayer, merge
from deploy.settings import Settings
from stream.settings import KafkaSettings
from tests.deploy.made_up import MadeUp, Row, chunk_of, read_topic

rows_strategy = st.lists(st.tuples(st.integers(0, 50), st.integers(-1, 60)), max_size=25)


@given(st.lists(rows_strategy, max_size=4))
def test_merge_keeps_every_event_once_and_in_order(parts: list[list[Row]]) -> None:
    times = sorted(time for part in parts for time, _ in part)
    chunks, first, expected_clicks = [], 0, {}
    for part in parts:
        rows = [(times[first + index], delay) for index, (_, delay) in enumerate(part)]
        chunks.append(chunk_of(rows, first))
        expected_clicks |= {str(first + i): when + delay for i, (when, delay) in enumerate(rows) if delay >= 0}
        first += len(part)
    events: list[tuple[int, bool, str]] = []
    for block in merge(iter(chunks)):
        for when, is_click, row in zip(block.times_ms.tolist(), block.is_click.tolist(), block.rows.tolist(), strict=True):
            events.append((when, is_click, block.click_ids[row] if is_click else block.chunk.ids[row]))
    assert [when for when, _, _ in events] == sorted(when for when, _, _ in events)
    shown = [name for _, is_click, name in events if not is_click]
    assert shown == [str(number) for number in range(len(times))]
    clicked = [(name, when) for when, is_click, name in events if is_click]
    assert dict(clicked) == expected_clicks
    assert len(clicked) == len(expected_clicks)
    for (when, is_click, _), (later, next_is_click, _) in pairwise(events):
        assert not (when == later and is_click and not next_is_click)  # an impression first, within a millisecond
    positions = {(is_click, name): position for position, (_, is_click, name) in enumerate(events)}
    assert all(positions[True, name] > positions[False, name] for name in expected_clicks)


def test_times_that_fall_are_refused() -> None:
    with pytest.raises(DataSetError, match="expected event times that never fall"):
        list(merge(iter([chunk_of([(5, -1), (4, -1)])])))
    with pytest.raises(DataSetError, match="expected event times that never fall"):
        list(merge(iter([chunk_of([(5, -1)]), chunk_of([(4, -1)], 1)])))


@pytest.mark.kafka
def test_every_event_arrives_once_in_order_with_a_watermark_behind(topics: Settings) -> None:
    rows = [(1_000_000 + 10 * i, 35 if i % 3 == 0 else -1) for i in range(3_000)]
    stats = Replayer(MadeUp(rows[:2_000], rows[2_000:]), topics).run()
    assert (stats.impressions, stats.clicks, stats.events) == (3_000, 1_000, 4_000)
    last_ms = max(when + delay for when, delay in rows)
    assert stats.event_time_ms == max(last_ms, rows[-1][0])
    assert stats.watermark_ms > stats.event_time_ms + topics.join.window_ms + topics.join.lateness_ms
    for name, wanted in (("impressions", 3_000), ("clicks", 1_000)):
        found = read_topic(topics, name)
        ids = []
        for partition in (0, 1):
            mine = [record for record in found if record.partition == partition]
            assert (mine[-1].key, mine[-1].value) == (None, b"")
            assert list(mine[-1].headers) == [("headrace-watermark", str(stats.watermark_ms).encode())]
            events = [json.loads(record.value) for record in mine[:-1]]
            assert [event["timestamp"] for event in events] == sorted(event["timestamp"] for event in events)
            for record, event in zip(mine[:-1], events, strict=True):
                assert record.key.decode() == event["impression_id"]
                assert (murmur2(record.key) & 0x7FFFFFFF) % 2 == partition
                assert set(event) == {"impression_id", "timestamp"} | ({"features"} if name == "impressions" else set())
            ids += [event["impression_id"] for event in events]
        assert len(ids) == len(set(ids)) == wanted


@pytest.mark.kafka
def test_the_same_seed_sends_the_same_bytes(topics: Settings) -> None:
    data_set = MadeUp([(1_000 + i, i % 9) for i in range(500)])
    for _ in range(2):
        Replayer(data_set, topics, seed=3, end_watermark=False).run()
    found = read_topic(topics, "impressions")
    assert len(found) == 1_000
    for partition in (0, 1):
        values = [record.value for record in found if record.partition == partition]
        assert values[: len(values) // 2] == values[len(values) // 2 :]


@pytest.mark.kafka
def test_limit_sends_the_clicks_of_what_it_sent(topics: Settings) -> None:
    stats = Replayer(MadeUp([(i, 50_000) for i in range(100)]), topics, limit=30).run()
    assert (stats.impressions, stats.clicks) == (30, 30)


@pytest.mark.kafka
def test_loops_go_on_in_event_time_with_new_ids(topics: Settings) -> None:
    stats = Replayer(MadeUp([(i, 5) for i in range(100)]), topics, loop=True, limit=250).run()
    assert (stats.impressions, stats.clicks) == (250, 250)
    events = [json.loads(record.value) for record in read_topic(topics, "impressions") if record.key is not None]
    assert len({event["impression_id"] for event in events}) == 250
    assert max(event["timestamp"] for event in events) == 2 * 105 + 49


@pytest.mark.kafka
def test_pace_by_event_time_and_by_count(topics: Settings) -> None:
    rows = [(1_000 * i, -1) for i in range(50)]  # 49 s
    began = time.monotonic()
    Replayer(MadeUp(rows), topics, speed=49).run()
    assert 0.9 < time.monotonic() - began < 10
    stats = Replayer(MadeUp(rows), topics, rate=40).run()
    assert stats.elapsed_s > 1.1  # 50 events at 40 a second, the first at once


@pytest.mark.kafka
def test_stop_ends_early_with_its_watermark(topics: Settings) -> None:
    sent = threading.Event()
    replayer = Replayer(MadeUp([(1_000 * i, -1) for i in range(10_000)]), topics, speed=1, on_progress=lambda _: sent.set())

    def stop_soon() -> None:
        assert sent.wait(60)
        replayer.stop()

    stopper = threading.Thread(target=stop_soon)
    stopper.start()
    stats = replayer.run()
    stopper.join()
    assert 0 < stats.impressions < 100
    assert stats.watermark_ms == stats.event_time_ms + topics.join.window_ms + topics.join.lateness_ms + 1_000


@contextmanager
def scorer(settings: Settings, *, answer_every: int = 1) -> Iterator[list[dict[str, Any]]]:
    """Answers requests in a thread: a candidate's score is its position over 100. Yields the requests it saw."""
    seen: list[dict[str, Any]] = []
    ready, stop = threading.Event(), threading.Event()

    async def work() -> None:
        prefix, servers = settings.topics.prefix, settings.kafka.bootstrap_servers
        consumer = AIOKafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest", fetch_max_wait_ms=50)
        producer = AIOKafkaProducer(bootstrap_servers=servers)
        await consumer.start()
        await producer.start()
        partitions = [TopicPartition(f"{prefix}score-requests", number) for number in (0, 1)]
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        ready.set()
        try:
            while not stop.is_set():
                for records in (await consumer.getmany(timeout_ms=50)).values():
                    for record in records:
                        request = json.loads(record.value)
                        seen.append(request)
                        if len(seen) % answer_every:
                            continue
                        scores = [{"id": c["id"], "score": index / 100} for index, c in enumerate(request["candidates"])]
                        answer = {"request_id": request["request_id"], "scores": scores, "model_version": 7}
                        if len(seen) % 2:  # else `delta` is 0, which an answer leaves out
                            answer["delta"] = 1 + len(scores)
                        await producer.send(f"{prefix}scores", key=record.key, value=json.dumps(answer).encode())
        finally:
            await consumer.stop()
            await producer.stop()

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    assert ready.wait(30)
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


@pytest.mark.kafka
def test_scored_impressions_carry_the_answer_to_their_own_request(topics: Settings) -> None:
    data_set = MadeUp([(1_000 + i, -1) for i in range(600)])
    with scorer(topics) as requests:
        replayer = Replayer(data_set, topics, scored_fraction=0.3, candidates=4, score_timeout_ms=20_000)
        stats = replayer.run()
    assert stats.requests == stats.answers == len(requests) == len(stats.answer_ms)
    assert 120 < stats.requests < 240
    events = {event["impression_id"]: event for event in _values(topics, "impressions")}
    assert len(events) == 600
    asked = {request["request_id"]: request for request in requests}
    for name, event in events.items():
        if name not in asked:
            assert "score" not in event
            continue
        request = asked[name]
        ids = [candidate["id"] for candidate in request["candidates"]]
        shown = event["features"]["item"]
        delta = 0 if requests.index(request) % 2 else 1 + len(ids)
        assert (event["score"], event["model_version"], event["delta"]) == (ids.index(shown) / 100, 7, delta)
        assert len(ids) == len(set(ids)) <= 4
        assert request["context"] == {"u": event["features"]["u"]}
        user = event["features"]["u"]
        wanted = {i: {"item": i, "both": f"{user}-{i}"} for i in ids}  # crossed with this user, whoever else was shown it
        assert {c["id"]: c["features"] for c in request["candidates"]} == wanted
        assert request["timestamp"] == event["timestamp"]
        assert request["deadline_ms"] > time.time() * 1_000 - 600_000
    positions = {[c["id"] for c in asked[name]["candidates"]].index(events[name]["features"]["item"]) for name in asked}
    assert positions == {0, 1, 2, 3}  # the position does not give away the item shown
    counts = [len(request["candidates"]) for request in requests[20:]]  # few items have been seen at the start
    assert sum(counts) / len(counts) > 3.9


@pytest.mark.kafka
def test_without_a_scorer_the_stream_flows_on_unscored(topics: Settings) -> None:
    began = time.monotonic()
    stats = Replayer(MadeUp([(i, -1) for i in range(3_000)]), topics, scored_fraction=0.5, score_timeout_ms=500).run()
    assert time.monotonic() - began < 8  # 12 steps: only the first one waits
    assert (stats.impressions, stats.answers) == (3_000, 0)
    assert stats.requests > 1_000
    assert all("score" not in event for event in _values(topics, "impressions"))


@pytest.mark.kafka
def test_missing_answers_cost_one_timeout_a_step_and_late_ones_are_dropped(topics: Settings) -> None:
    with scorer(topics, answer_every=2):
        stats = Replayer(MadeUp([(i, -1) for i in range(600)]), topics, scored_fraction=0.2, score_timeout_ms=400).run()
    assert stats.impressions == 600
    assert 0 < stats.answers < stats.requests
    assert sum("score" in event for event in _values(topics, "impressions")) == stats.answers


def _values(settings: Settings, name: str) -> list[dict[str, Any]]:
    return [json.loads(record.value) for record in read_topic(settings, name) if record.key is not None]


@pytest.mark.kafka
def test_a_missing_topic_and_an_empty_data_set_say_so(settings: Settings, topics: Settings) -> None:
    with pytest.raises(DataSetError, match=r"made-up: expected at least one impression, found none"):
        Replayer(MadeUp([]), topics).run()
    elsewhere = settings.model_copy(update={"topics": settings.topics.model_copy(update={"prefix": "nobody-made-"})})
    with pytest.raises(FeedError, match=r"topic 'nobody-made-impressions': expected a topic.*headrace topics create"):
        Replayer(MadeUp([(1, 1)]), elsewhere).run()


def test_no_broker_says_how_to_start_one() -> None:
    nowhere = Settings(kafka=KafkaSettings(bootstrap_servers="127.0.0.1:1", connect_timeout_ms=300))
    with pytest.raises(FeedError, match=r"127.0.0.1:1 \(PLAINTEXT\): expected a broker that answers.*headrace kafka status"):
        Replayer(MadeUp([(1, 1)]), nowhere).run()


@pytest.mark.kafka
def test_a_replay_that_would_be_late_sends_nothing(topics: Settings) -> None:
    """Its events lie before the watermark at which another stream has ended."""
    made_up = MadeUp([(1_700_000_000_000 + 1_000 * n, 500) for n in range(20)])
    Replayer(made_up, topics).run()
    Replayer(made_up, topics).run()  # within the horizon: duplicates, which the join drops
    later = 1_700_000_000_000 + topics.join.window_ms + topics.join.dedupe_horizon_ms + 3_600_000
    Replayer(MadeUp([(later + n, -1) for n in range(20)]), topics).run()
    before = len(read_topic(topics, "impressions"))
    with pytest.raises(DataSetError, match=r"expected no stream that ended later than this one begins, found a watermark of"):
        Replayer(made_up, topics).run()
    assert len(read_topic(topics, "impressions")) == before
