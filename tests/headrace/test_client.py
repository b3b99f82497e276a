"""The client against a real Kafka: what arrives where, what fails and how it says so, answers to whoever asked."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.partitioner import murmur2

import headrace.client
import headrace.delivery
from deploy.settings import Settings
from headrace import Client, DeliveryError, InvalidAnswer, InvalidEvent, NoAnswer
from stream.topics.admin import create_topics

pytestmark = pytest.mark.kafka


def records(settings: Settings, name: str) -> list[Any]:
    """Everything in a topic, partition by partition."""
    consumer = KafkaConsumer(
        bootstrap_servers=settings.kafka.bootstrap_servers, auto_offset_reset="earliest", enable_auto_commit=False
    )
    try:
        partitions = [TopicPartition(settings.topics.prefix + name, number) for number in range(settings.topics.partitions)]
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        found: list[Any] = []
        while any(consumer.position(partition) < ends[partition] for partition in partitions):
            for batch in consumer.poll(timeout_ms=500).values():
                found += batch
        return sorted(found, key=lambda record: (record.partition, record.offset))
    finally:
        consumer.close()


@pytest.fixture
def client(topics: Settings) -> Iterator[Client]:
    with Client(topics.kafka.bootstrap_servers, topic_prefix=topics.topics.prefix) as opened:
        yield opened


def test_murmur2_gives_what_kafka_publishes() -> None:
    # Values of Apache Kafka's own unit test of its hash.
    expected = {
        b"21": -973932308,
        b"foobar": -790332482,
        b"a-little-bit-long-string": -985981536,
        b"a-little-bit-longer-string": -1486304829,
        b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
        b"abc": 479470107,
    }
    signed = {key: (value ^ 0x80000000) - 0x80000000 for key, value in ((key, murmur2(key)) for key in expected)}
    assert signed == expected


T = 1_700_000_000_000


def test_events_arrive_keyed_placed_and_in_order(client: Client, topics: Settings) -> None:
    for number in range(50):
        client.send_impression(f"imp-{number}", timestamp_ms=T + number, features={"n": number})
        client.send_click(f"imp-{number}", timestamp_ms=T + 1_000 + number)
    client.flush()
    for name in ("impressions", "clicks"):
        found = records(topics, name)
        assert {record.key for record in found} == {f"imp-{number}".encode() for number in range(50)}
        for record in found:
            assert record.partition == (murmur2(record.key) & 0x7FFFFFFF) % 2
            assert msgspec.json.decode(record.value)["impression_id"].encode() == record.key
        for partition in (0, 1):
            times = [msgspec.json.decode(record.value)["timestamp"] for record in found if record.partition == partition]
            assert times == sorted(times)


def test_a_client_may_name_itself_in_a_header(topics: Settings) -> None:
    with Client(topics.kafka.bootstrap_servers, topic_prefix=topics.topics.prefix, source="caf\u00e9") as client:
        client.send_impression("i", features={})
        client.send_click("i")
    for name in ("impressions", "clicks"):
        assert [list(record.headers) for record in records(topics, name)] == [[("source", "caf\u00e9".encode())]]


def test_times_are_now_when_not_given(client: Client, topics: Settings) -> None:
    before = headrace.client.now_ms()
    client.send_impression("i", features={})
    client.flush()
    (record,) = records(topics, "impressions")
    assert before <= msgspec.json.decode(record.value)["timestamp"] <= headrace.client.now_ms()


def test_an_impression_carries_what_the_answer_said(client: Client, topics: Settings) -> None:
    client.send_impression("i", features={}, score=0.25, model_version=7, delta=3)
    with pytest.raises(InvalidEvent, match=r"\$.delta: expected a number of deltas, 0 or more, found -3"):
        client.send_impression("j", features={}, score=0.25, model_version=7, delta=-3)
    client.flush()
    (record,) = records(topics, "impressions")
    event = msgspec.json.decode(record.value)
    assert (event["score"], event["model_version"], event["delta"]) == (0.25, 7, 3)


def test_a_watermark_goes_to_every_partition_of_both_topics_behind_the_rest(client: Client, topics: Settings) -> None:
    for number in range(20):
        client.send_impression(f"i{number}", timestamp_ms=T, features={})
        client.send_click(f"i{number}", timestamp_ms=T)
    client.send_watermark(1_700_000_000_000)
    client.flush()
    for name in ("impressions", "clicks"):
        found = records(topics, name)
        for partition in (0, 1):
            last = [record for record in found if record.partition == partition][-1]
            assert (last.key, last.value) == (None, b"")
            assert list(last.headers) == [("headrace-watermark", b"1700000000000")]


def test_a_watermark_without_a_time_is_now_less_the_lateness(client: Client, topics: Settings) -> None:
    before = headrace.client.now_ms()
    client.send_watermark(lateness_ms=60_000)
    client.flush()
    after = headrace.client.now_ms()
    told = [int(dict(record.headers)["headrace-watermark"]) for record in records(topics, "clicks")]
    assert len(told) == 2 and all(before - 60_000 <= each <= after - 60_000 for each in told)


def test_raw_records_pass_unchanged(client: Client, topics: Settings) -> None:
    client.send_raw(f"{topics.topics.prefix}clicks", b"k", b"not json", [("h", b"1")])
    client.flush()
    (record,) = records(topics, "clicks")
    assert (record.key, record.value, list(record.headers)) == (b"k", b"not json", [("h", b"1")])


def test_a_bad_event_sends_nothing(client: Client, topics: Settings) -> None:
    with pytest.raises(InvalidEvent):
        client.send_impression("i", features={"f": float("nan")})
    with pytest.raises(InvalidEvent, match=r"watermark_ms: expected milliseconds"):
        client.send_watermark(-1)
    with pytest.raises(InvalidEvent, match=r"lateness_ms: expected whole milliseconds, 0 or more, found -1\."):
        client.send_watermark(lateness_ms=-1)
    with pytest.raises(InvalidEvent, match=r"lateness_ms: expected milliseconds"):
        client.send_watermark(lateness_ms=1 << 62)  # before 1970
    with pytest.raises(InvalidEvent, match=r"lateness_ms: expected none beside watermark_ms"):
        client.send_watermark(5, lateness_ms=5)
    client.flush()
    assert records(topics, "impressions") == []


def test_a_record_above_the_limit_says_the_sizes(client: Client) -> None:
    with pytest.raises(InvalidEvent, match=r"\$: expected a record of at most 1048576 bytes, found 2000\d+ in the value"):
        client.send_impression("i", features={"f": "x" * 2_000_000})


def test_a_missing_topic_says_how_to_make_it(kafka: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headrace.delivery, "_MAX_BLOCK_MS", 1_000)
    with (
        Client(kafka.bootstrap_servers, topic_prefix="nobody-made-") as client,
        pytest.raises(DeliveryError, match=r"topic 'nobody-made-impressions': expected its partitions.*headrace topics create"),
    ):
        client.send_impression("i", features={})


def test_no_broker_says_how_to_start_one() -> None:
    with pytest.raises(DeliveryError, match=r"bootstrap_servers 127.0.0.1:1: expected a Kafka broker.*headrace kafka start"):
        Client("127.0.0.1:1", bootstrap_timeout_ms=500)


def test_flush_names_what_was_not_acknowledged(settings: Settings) -> None:
    # A record over the topic's limit and below the client's own: the broker refuses it.
    create_topics(settings.kafka, settings.topics.model_copy(update={"max_message_bytes": 2_000}))
    with Client(settings.kafka.bootstrap_servers, topic_prefix=settings.topics.prefix) as client:
        client.send_impression("too-large", timestamp_ms=T, features={"f": "x" * 5_000})
        with pytest.raises(
            DeliveryError,
            match=r"flush: expected every record acknowledged, found 1 that were not: .*-impressions, key 'too-large': Message",
        ) as caught:
            client.flush()
        assert "send them again" in str(caught.value)
        client.flush()  # said once


class Scorer(threading.Thread):
    """Answers every request: each candidate gets the length of its id over 10; ids that begin with `-` get no answer."""

    def __init__(self, settings: Settings, copies: int = 1) -> None:
        super().__init__(daemon=True)
        self._settings = settings
        self._copies = copies
        self._stop_it = threading.Event()
        self.asked: list[dict] = []  # requests, in the order of the log
        self.ready = threading.Event()

    def run(self) -> None:
        prefix, servers = self._settings.topics.prefix, self._settings.kafka.bootstrap_servers
        consumer = KafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest", enable_auto_commit=False)
        producer = KafkaProducer(bootstrap_servers=servers)
        consumer.assign([TopicPartition(f"{prefix}score-requests", number) for number in (0, 1)])
        consumer.seek_to_beginning()
        self.ready.set()
        while not self._stop_it.is_set():
            for batch in consumer.poll(timeout_ms=50).values():
                for record in batch:
                    request = msgspec.json.decode(record.value)
                    self.asked.append(request)
                    if request["request_id"].startswith("-"):
                        continue
                    answer = {
                        "request_id": request["request_id"],
                        "scores": [{"id": c["id"], "score": len(c["id"]) / 10} for c in request["candidates"]],
                        "model_version": 7,
                        "snapshot_age_ms": 40,
                        "delta": 3,
                    }
                    headers = [("ce_type", b"headrace.scores"), ("ce_id", record.key), ("other", b"x")]
                    for _ in range(self._copies):
                        producer.send(f"{prefix}scores", key=record.key, value=msgspec.json.encode(answer), headers=headers)
        consumer.close()
        producer.close()

    def __enter__(self) -> Scorer:
        self.start()
        assert self.ready.wait(30)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop_it.set()
        self.join()


def test_ask_gets_the_answer_to_its_own_request(client: Client, topics: Settings) -> None:
    with Scorer(topics) as scorer:
        candidates = [("a", {}), ("abc", {"x": 1})]
        answer = client.ask({"u": "1"}, candidates, timeout_ms=20_000, request_id="mine", timestamp_ms=T)
    (asked,) = (each for each in scorer.asked if each["request_id"] == "mine")
    assert asked["timestamp"] == T and asked["deadline_ms"] > T
    assert answer.request_id == "mine"
    assert [(score.id, score.score) for score in answer.scores] == [("a", 0.1), ("abc", 0.3)]
    assert answer.best().id == "abc"
    assert (answer.model_version, answer.delta, answer.snapshot_age_ms, answer.error) == (7, 3, 40, None)
    assert answer.event == {"type": "headrace.scores", "id": "mine"}


def test_many_threads_ask_at_once_and_nobody_gets_anothers_answer(client: Client, topics: Settings) -> None:
    def ask(number: int) -> bool:
        name = f"r{number}"
        answer = client.ask({}, [("x" * (1 + number % 9), {})], timeout_ms=30_000, request_id=name)
        return answer.request_id == name and answer.scores[0].score == (1 + number % 9) / 10

    with Scorer(topics, copies=2), ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(200)))


def test_many_outstanding_requests_from_one_thread(client: Client, topics: Settings) -> None:
    with Scorer(topics):
        futures = [client.ask_later({}, [("a", {})], request_id=f"r{number}") for number in range(300)]
        assert [future.result(30).request_id for future in futures] == [f"r{number}" for number in range(300)]


def test_no_answer_says_what_to_check(client: Client) -> None:
    with pytest.raises(NoAnswer, match=r"request '-1' on .*score-requests.*within 300 ms.*headrace run scorer"):
        client.ask({}, [("a", {})], timeout_ms=300, request_id="-1")
    with pytest.raises(NoAnswer):  # and the id can be used again
        client.ask({}, [("a", {})], timeout_ms=100, request_id="-1")


def test_closing_ends_outstanding_requests(topics: Settings) -> None:
    with Client(topics.kafka.bootstrap_servers, topic_prefix=topics.topics.prefix) as client:
        future = client.ask_later({}, [("a", {})])
    with pytest.raises(DeliveryError, match="closed while a request was outstanding"):
        future.result(5)


def test_subscribers_each_see_every_answer(client: Client, topics: Settings) -> None:
    with client.subscribe_scores() as live, Scorer(topics):
        names = {client.request_scores({}, [("a", {})]) for _ in range(20)}
        seen: set[str] = set()
        for answer in live:
            seen.add(answer.request_id)
            if seen == names:
                break
    with client.subscribe_scores(from_beginning=True) as again:
        kept: set[str] = set()
        while kept != names:
            kept |= {answer.request_id for answer in again.poll(timeout_ms=1_000)}


def test_an_answer_without_scores_says_why_and_garbage_is_named(client: Client, topics: Settings) -> None:
    from headrace import HeadraceError

    scores = f"{topics.topics.prefix}scores"
    error = b'{"request_id":"r","error":{"reason":"deadline_passed","path":"$.deadline_ms","message":"too late"}}'
    with client.subscribe_scores(from_beginning=True) as stream:
        client.send_raw(scores, b"r", error)
        client.flush()
        (answer,) = stream.poll(timeout_ms=10_000)
        assert answer.error is not None
        assert (answer.scores, answer.error.reason, answer.error.path) == ([], "deadline_passed", "$.deadline_ms")
        with pytest.raises(HeadraceError, match=r"request 'r': expected scores, found none \(deadline_passed: too late\)"):
            answer.best()
        client.send_raw(scores, b"r", b"garbage")
        client.flush()
        with pytest.raises(HeadraceError, match=r"scores/\d offset \d+: expected the answer of a scorer"):
            stream.poll(timeout_ms=10_000)


def test_the_client_imports_neither_torch_nor_faust_nor_numpy() -> None:
    code = (
        "import sys, headrace, headrace.client\n"
        "print(sorted(set(sys.modules) & {'torch', 'faust', 'numpy', 'aiokafka', 'stream', 'model', 'deploy'}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_record_nested_too_deeply_is_passed_over(client: Client, topics: Settings) -> None:
    deep = b'{"request_id":"r","scores":[],"odd":' + b"[" * 1_500 + b"]" * 1_500 + b"}"
    with client.subscribe_scores(from_beginning=True) as answers:
        client.send_raw(f"{topics.topics.prefix}scores", b"r", deep)
        client.send_raw(f"{topics.topics.prefix}scores", b"s", b'{"request_id":"s","scores":[],"model_version":1}')
        client.flush()
        found: list[str] = []
        refused = 0
        while not found:
            try:
                found += [answer.request_id for answer in answers.poll()]
            except InvalidAnswer as error:
                refused += 1
                assert "expected the answer of a scorer" in str(error)
    assert (found, refused) == (["s"], 1)


def test_a_client_may_be_closed_by_the_callback_of_an_answer(topics: Settings) -> None:
    client = Client(topics.kafka.bootstrap_servers, topic_prefix=topics.topics.prefix)
    done = threading.Event()

    def close(future: Any) -> None:
        client.close()
        done.set()

    client.ask_later({}, [("a", {})], request_id="r").add_done_callback(close)
    with Client(topics.kafka.bootstrap_servers, topic_prefix=topics.topics.prefix) as scorer:
        scorer.send_raw(f"{topics.topics.prefix}scores", b"r", b'{"request_id":"r","scores":[],"model_version":1}')
    assert done.wait(30)
