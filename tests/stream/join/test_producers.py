"""Real producers, broker and join worker: librdkafka, Java, kafka-python, and formats that others write. All counts exact."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from kafka import KafkaProducer

from deploy.demo.audit import Audit
from deploy.errors import LocalKafkaError
from deploy.local_kafka.jars import jars
from deploy.local_kafka.java import find_java
from deploy.processes.workers import Worker
from deploy.settings import Settings
from stream.settings import SchemaRegistrySettings
from stream.topics.names import TopicNames
from tests.stream.formats.real_registry import JAR, WITHOUT, real_registry, register
from tests.stream.formats.stand_in import StandIn, avro_frame, framed, message_of, proto_file
from tests.stream.join.made_up import FIRST_MS, PATIENCE_S, Events, end, join_settings, join_worker, until
from tests.stream.join.one_partition import read

pytestmark = pytest.mark.kafka

COUNT = 60
Encode = Callable[[dict[str, Any]], bytes]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Settings], Worker]]:
    """Starts a join worker; what a test leaves running is killed."""
    started: list[Worker] = []

    def one(settings: Settings) -> Worker:
        started.append(join_worker(settings, tmp_path))
        started[-1].start()
        return started[-1]

    yield one
    for worker in started:
        if worker.returncode is None:
            worker.kill()
        worker.wait_stopped()


def plain(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode()


def impression(key: str, index: int) -> dict[str, Any]:
    return {"impression_id": key, "timestamp": FIRST_MS + index, "features": {"user": f"u{index % 7}", "price": 0.5 * index}}


def click(key: str, index: int) -> dict[str, Any]:
    return {"impression_id": key, "timestamp": FIRST_MS + index}


class Librdkafka:
    """confluent-kafka with murmur2, as docs/producers.md says."""

    def __init__(self, settings: Settings, **more: Any) -> None:
        names = TopicNames.of(settings.topics)
        self.topics = names.impressions, names.clicks
        chosen = {"bootstrap.servers": settings.kafka.bootstrap_servers, "partitioner": "murmur2_random", "linger.ms": 5}
        self.producer = Producer(chosen | {name.replace("_", "."): value for name, value in more.items()})

    def send(self, topic: int, key: bytes | None, value: bytes | None, **more: Any) -> None:
        self.producer.produce(self.topics[topic], key=key, value=value, **more)

    def pairs(
        self,
        name: str,
        shown: Encode = plain,
        clicked: Encode = plain,
        *,
        count: int = COUNT,
        key: Callable[[str], bytes] = str.encode,
    ) -> list[bytes]:
        """So many impressions and every third one's click; the ids."""
        ids = [f"{name}-{index}" for index in range(count)]
        for index, each in enumerate(ids):
            self.send(0, key(each), shown(impression(each, index)))
            if index % 3 == 0:
                self.send(1, key(each), clicked(click(each, index)))
        assert self.producer.flush(30) == 0
        return [each.encode() for each in ids]


def expected(*groups: list[bytes]) -> Events:
    """What a join must make of such pairs."""
    events = Events(last_ms=FIRST_MS + 1_000)
    for ids in groups:
        events.positives |= set(ids[::3])
        events.negatives |= set(ids) - set(ids[::3])
    return events


async def came_out(settings: Settings, events: Events, worker: Worker) -> None:
    """End the stream, and hold what came out against what had to: each label once, each dead letter, and no other."""
    await end(settings, events)
    async with Audit(settings) as audit:
        ends = time.monotonic() + PATIENCE_S
        while (ledger := await audit.read()).labels.keys() != events.ids or ledger.dead_letters != events.dead:
            worker.check()
            if time.monotonic() > ends:
                break
            await asyncio.sleep(0.1)
    assert ledger.labels == Counter(dict.fromkeys(events.ids, 1))
    assert set(ledger.positives) == events.positives
    assert ledger.dead_letters == events.dead


def send_by_java(settings: Settings, name: str) -> list[bytes]:
    """By Java's own client with its defaults; compiled from its source by the `java` that runs it."""
    try:
        java, classpath = find_java(settings.local_kafka.java), jars(settings.local_kafka)
    except LocalKafkaError as error:
        pytest.skip(f"no Java: {error}")
    modules = subprocess.run([java, "--list-modules"], capture_output=True, text=True, check=False).stdout
    if "jdk.compiler" not in modules:
        pytest.skip(f"{java} has no compiler: expected a JDK, found a runtime alone")
    source = Path(__file__).with_name("SendByDefault.java")
    told = [settings.kafka.bootstrap_servers, settings.topics.prefix, name, str(COUNT), str(FIRST_MS)]
    command = [str(java), "-Xmx256m", "-cp", ":".join(map(str, classpath)), str(source), *told]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return [f"{name}-{index}".encode() for index in range(COUNT)]


def send_by_kafka_python(settings: Settings, name: str) -> list[bytes]:
    names = TopicNames.of(settings.topics)
    producer = KafkaProducer(bootstrap_servers=settings.kafka.bootstrap_servers, compression_type="gzip")
    ids = [f"{name}-{index}" for index in range(COUNT)]
    for index, each in enumerate(ids):
        producer.send(names.impressions, key=each.encode(), value=plain(impression(each, index)))
        if index % 3 == 0:
            producer.send(names.clicks, key=each.encode(), value=plain(click(each, index)))
    producer.close()
    return [each.encode() for each in ids]


def test_librdkafka_java_and_kafka_python(topics, start):
    """Every codec, idempotent, transactional: what was committed counts once, and what was aborted not at all."""
    settings = join_settings(topics)
    worker = start(settings)
    groups = [send_by_java(topics, "java"), send_by_kafka_python(topics, "kafka-python")]
    codecs = ("none", "gzip", "snappy", "lz4", "zstd")
    groups += [Librdkafka(topics, compression_type=codec).pairs(f"rd-{codec}") for codec in codecs]
    groups.append(Librdkafka(topics, enable_idempotence=True, acks="all").pairs("idempotent"))
    transactional = Librdkafka(topics, transactional_id=f"{topics.topics.prefix}rd", compression_type="zstd")
    transactional.producer.init_transactions(30)
    for name in ("committed", "aborted", "committed-too"):
        transactional.producer.begin_transaction()
        ids = transactional.pairs(f"tx-{name}")
        if name == "aborted":
            transactional.producer.abort_transaction(30)
        else:
            transactional.producer.commit_transaction(30)
            groups.append(ids)
    asyncio.run(came_out(settings, expected(*groups), worker))


CLICK = {
    "type": "record",
    "name": "Click",
    "fields": [{"name": "impression_id", "type": "string"}, {"name": "timestamp", "type": "long"}],
}
FLAT = {
    "type": "record",
    "name": "Shown",
    "fields": [*CLICK["fields"], {"name": "user", "type": "string"}, {"name": "price", "type": "double"}],
}
FILE = proto_file(
    "events.proto",
    ("Click", [("impression_id", 1, 9), ("timestamp", 2, 3)]),
    ("Shown", [("impression_id", 1, 9), ("timestamp", 2, 3), ("user", 3, 9), ("price", 4, 1)]),
)


def flattened(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != "features"} | event["features"]


def test_schema_registry_frames_through_an_outage_and_a_lost_disk(topics, start):
    """Three types of schema beside plain JSON: the registry is away at first, and the worker is killed on the way."""

    async def check() -> None:
        with StandIn() as registry:
            registry.status = 503
            registry.register(1, "AVRO", FLAT)
            registry.register(2, "AVRO", CLICK)
            registry.register(3, "JSON", {})
            registry.register(4, "PROTOBUF", FILE)
            chosen = topics.model_copy(update={"schema_registry": SchemaRegistrySettings(url=registry.url)})
            settings = join_settings(chosen)
            worker = start(settings)
            await asyncio.to_thread(worker.wait_ready)
            rd = Librdkafka(topics)
            shown, clicked = message_of("shop.Shown", FILE), message_of("shop.Click", FILE)
            groups = [
                rd.pairs(
                    "avro",
                    lambda event: avro_frame(1, FLAT, flattened(event)),
                    lambda event: avro_frame(2, CLICK, event),
                )
            ]
            await asyncio.sleep(1.5)
            assert worker.metrics()["headrace_join_schema_registry_failures_total", ()] >= 1
            assert sum(value for (name, _), value in worker.metrics().items() if name == "headrace_join_impressions_total") == 0
            registry.status = None
            groups.append(rd.pairs("json", lambda e: framed(3, plain(e)), lambda e: framed(3, plain(e))))
            rd.send(0, b"unknown", framed(99, b"{}"))
            rd.producer.flush(30)
            unknown = ("headrace_join_dead_letters_total", ("unknown_schema",))
            await until(lambda: worker.metrics().get(unknown) == 1, "a dead letter, which a rebuild must find", worker)
            pending = "headrace_join_pending_impressions"
            await until(lambda: sum(v for (n, _), v in worker.metrics().items() if n == pending) == 2 * COUNT, "both", worker)
            worker.kill()
            shutil.rmtree(settings.state_dir)
            worker.start()
            groups.append(
                rd.pairs(
                    "protobuf",
                    lambda event: framed(4, b"\x02\x02" + shown(**flattened(event)).SerializeToString()),
                    lambda event: framed(4, b"\x00" + clicked(**event).SerializeToString()),
                )
            )
            groups.append(rd.pairs("plain"))
            events = expected(*groups)
            rd.send(0, b"cut", avro_frame(2, CLICK, click("cut", 1))[:-2])
            rd.producer.flush(30)
            events.dead.update(["unknown_schema", "malformed_frame"])
            await came_out(settings, events, worker)
            names = TopicNames.of(settings.topics)
            examples = {each.key: each.value for each in await read(settings, names.examples) if each.key is not None}
            for key, value in examples.items():
                assert json.loads(value) == impression(key.decode(), int(key.rpartition(b"-")[2]))
            decoded = {labels: v for (n, labels), v in worker.metrics().items() if n == "headrace_join_frames_decoded_total"}
            assert decoded.keys() == {("avro",), ("json",), ("protobuf",)}

    asyncio.run(check())


@pytest.mark.skipif(not JAR, reason=WITHOUT)
def test_frames_by_a_real_registry(topics, start, tmp_path):
    """Apicurio's: each type of schema, with a Protobuf import."""
    with real_registry(tmp_path) as url:
        shown, clicked = register(url, "shown", "AVRO", json.dumps(FLAT)), register(url, "clicked", "AVRO", json.dumps(CLICK))
        draft = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"}
        plain_id = register(url, "plain", "JSON", json.dumps(draft))
        proto = register(url, "proto", "PROTOBUF", base64.b64encode(FILE.SerializeToString()).decode())
        chosen = topics.model_copy(update={"schema_registry": SchemaRegistrySettings(url=url)})
        settings = join_settings(chosen)
        worker = start(settings)
        rd, messages = Librdkafka(topics), (message_of("shop.Shown", FILE), message_of("shop.Click", FILE))
        groups = [
            rd.pairs(
                "avro", lambda e: avro_frame(shown, FLAT, flattened(e)), lambda e: avro_frame(clicked, CLICK, e), count=600
            ),
            rd.pairs("json", lambda e: framed(plain_id, plain(e)), lambda e: framed(plain_id, plain(e))),
            rd.pairs(
                "protobuf",
                lambda e: framed(proto, b"\x02\x02" + messages[0](**flattened(e)).SerializeToString()),
                lambda e: framed(proto, b"\x00" + messages[1](**e).SerializeToString()),
            ),
        ]
        events = expected(*groups)
        rd.send(0, b"unknown", framed(1_000_000, b"{}"))
        rd.producer.flush(30)
        events.dead["unknown_schema"] = 1
        asyncio.run(came_out(settings, events, worker))


def debezium(event: dict[str, Any], op: str = "c") -> dict[str, Any]:
    return {"before": None, "after": event, "source": {"table": "shown"}, "op": op, "ts_ms": FIRST_MS}


def connect(event: dict[str, Any]) -> dict[str, Any]:
    return {"schema": {"type": "struct", "fields": [], "optional": False}, "payload": event}


def test_connect_and_debezium_by_their_setting(topics, start):
    settings = join_settings(topics, envelope="debezium")
    worker = start(settings)
    rd = Librdkafka(topics)
    groups = [
        rd.pairs("debezium", lambda e: plain(debezium(e)), lambda e: plain(debezium(e))),
        rd.pairs("snapshot", lambda e: plain(debezium(e, "r")), lambda e: plain(debezium(e, "r"))),
        rd.pairs("inside", lambda e: plain(connect(debezium(e))), lambda e: plain(connect(debezium(e)))),
        rd.pairs("columns", lambda e: plain(debezium(flattened(e)))),
        rd.pairs("connect", lambda e: plain(connect(e)), lambda e: plain(connect(e))),
        rd.pairs("plain"),
    ]
    events = expected(*groups)
    deleted = {**debezium({}), "before": impression("plain-0", 0), "after": None, "op": "d"}
    rd.send(0, b"plain-0", plain(deleted))
    rd.send(0, b"plain-0", None)
    rd.producer.flush(30)
    events.dead["empty_value"] = 2
    asyncio.run(came_out(settings, events, worker))


def test_what_plain_producers_get_wrong_is_counted_by_its_reason(topics, start):
    """Each of these kinds, beside a good stream that it must not touch."""
    settings = join_settings(topics)
    worker = start(settings)
    rd = Librdkafka(topics)
    events = expected(rd.pairs("good"))
    few, of_both = 6, 6 + 2

    def wrong(name: str, reason: str, encode: Encode, key: Callable[[str], bytes] = str.encode) -> None:
        rd.pairs(name, encode, encode, count=few, key=key)
        events.dead[reason] += of_both

    def timed(change: Callable[[int], Any]) -> Encode:
        return lambda event: plain({**event, "timestamp": change(event["timestamp"])})

    wrong("quoted", "id_mismatch", plain, key=lambda each: json.dumps(each).encode())
    wrong("framed-key", "id_mismatch", plain, key=lambda each: b"\0" + struct.pack(">I", 3) + each.encode())
    wrong("framed", "framed", lambda event: framed(7, plain(event)))
    wrong("avro", "framed", lambda event: avro_frame(9, CLICK, event))
    wrong("connect", "enveloped", lambda event: plain(connect(event)))
    wrong("debezium", "enveloped", lambda event: plain(debezium(event)))
    wrong("twice", "wrong_type", lambda event: json.dumps(json.dumps(event)).encode())
    wrong("iso", "wrong_type", timed(lambda ms: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ms / 1_000))))
    wrong("fraction", "wrong_type", timed(lambda ms: ms + 0.5))
    wrong("string", "wrong_type", timed(str))
    wrong("seconds", "out_of_range", timed(lambda ms: ms // 1_000))
    for topic in (0, 1):
        rd.send(topic, b"tombstone", None)
    events.dead["empty_value"] += 2
    rd.send(0, None, plain(impression("no-key", 0)))
    rd.send(0, b"", plain(impression("empty-key", 0)))
    events.dead["id_mismatch"] += 2
    headers = [("reason", b"mine"), ("traceparent", b"00-ab"), ("null", None), ("label", b"1")]
    rd.send(0, b"headers", plain(impression("headers", 0)), headers=headers)
    events.negatives.add(b"headers")
    rd.producer.flush(30)
    asyncio.run(came_out(settings, events, worker))
