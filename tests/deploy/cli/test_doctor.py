"""`headrace doctor` and `headrace dead-letters` against a real Kafka: output, exit codes, and what is read."""

from __future__ import annotations

import asyncio
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError as AdminError

from deploy.doctor import kafka_readings
from deploy.doctor.examination import CHECKS, examine
from deploy.doctor.kafka_readings import read_everything
from deploy.settings import Settings
from headrace.events import encode_click, encode_impression
from state.manifest import Manifest
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.join.commit_metadata import Progress, encode_progress
from stream.kafka.clients import aiokafka_options
from stream.records.dead_letter import DeadLetter
from stream.registry.writer import RegistryWriter
from stream.topics.names import TopicNames
from tests.deploy.conftest import Run
from tests.judged import JUDGED


def write(settings: Settings, records: list[tuple[str, int, bytes | None, bytes | None, Any]]) -> None:
    """Records of topic, partition, key, value and headers."""

    async def send() -> None:
        producer = AIOKafkaProducer(**aiokafka_options(settings.kafka))
        await producer.start()
        for topic, partition, key, value, headers in records:
            await producer.send(topic, value, key, partition=partition, headers=list(headers))
        await producer.stop()

    asyncio.run(send())


def test_nothing_wrong_and_no_topics(run: Run, settings: Settings, request: pytest.FixtureRequest) -> None:
    missing = run("doctor --format json")
    assert missing.code == 1
    assert [finding["cure"] for finding in missing.json["findings"]] == ["headrace topics create"] * 9
    request.getfixturevalue("topics")
    well = run("doctor")
    assert well.code == 0, well.out
    assert well.out == f"Nothing found: {len(CHECKS)} checks.\n"
    assert well.err == "Sampled the newest of each topic: 0 impressions, 0 clicks, 0 dead-letters.\n"


def test_a_producer_with_librdkafkas_default(run: Run, topics: Settings) -> None:
    names, now_ms = TopicNames.of(topics.topics), time.time_ns() // 1_000_000
    records: list[Any] = []
    for index in range(40):
        key, value = encode_impression(f"i{index}", now_ms, {})
        records.append((names.impressions, zlib.crc32(key) % 2, key, value, ()))
    write(topics, records)
    ran = run("doctor --format json")
    assert ran.code == 1
    [finding] = [each for each in ran.json["findings"] if each["check"] == "partitioner"]
    assert finding["what"] == names.impressions and "(CRC32, librdkafka's default), such as 'i" in finding["found"]
    assert "murmur2_random" in finding["cure"]
    assert ran.json["sampled"]["impressions"] == 40
    text = run("doctor --sample 10").out
    assert f"partitioner: {names.impressions}\n  expected every key in the partition that murmur2 gives it\n" in text


def test_what_could_not_be_read_is_reported(
    run: Run, topics: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A store without the announced version, as one without credentials: no finding, but no clean bill either."""

    async def announce() -> None:
        writer = RegistryWriter(topics.kafka, TopicNames.of(topics.topics), who="trainer@test")
        epoch = await writer.take_trainer_epoch()
        manifest = Manifest(version=1, epoch=epoch, created_at_ms=1, examples_seen=0, offsets={"0": 7}, verdict=JUDGED)
        written = SnapshotStore(topics.snapshots).write(manifest, {}, {})
        await writer.announce(written, gate=SnapshotSettings(first_examples=0))
        await writer.close()

    asyncio.run(announce())
    readings = asyncio.run(read_everything(topics, sample=10))
    assert (readings.trainer, readings.unread, readings.unread_positions) == ({0: 7}, [], set())
    elsewhere = str(tmp_path / "elsewhere")
    monkeypatch.setenv("HEADRACE_SNAPSHOTS__URL", elsewhere)
    ran = run("doctor")
    assert (ran.code, ran.out) == (1, f"Nothing found, but not everything could be read: {len(CHECKS)} checks.\n")
    [reason] = run("doctor --format json").json["unread"]
    assert reason.startswith("the trainer's offsets: none of the announced versions is in ") and elsewhere in reason
    assert f"Could not read {reason}\n" in ran.err

    def refused(*_: object, **__: object) -> None:
        raise AdminError("not allowed")

    async def refused_too(*_: object, **__: object) -> None:
        raise KafkaError("not allowed")

    monkeypatch.setattr(KafkaAdminClient, "describe_groups", refused)
    monkeypatch.setattr(kafka_readings, "committed_offsets", refused_too)
    monkeypatch.setattr(kafka_readings, "COORDINATOR_S", 0)
    readings = asyncio.run(read_everything(topics, sample=10))
    assert (readings.members, readings.unread_positions) == ({}, {"join", "scorer"})
    assert len(readings.unread) == 3 and examine(readings) == []


def test_what_is_read_is_what_is_there(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number comes from where it should, markers and open transactions included; nobody waits where only markers are."""
    monkeypatch.setattr(kafka_readings, "FIRST_S", 60.0)  # beyond it, what was waited for is in `unread`
    names, now_ms = TopicNames.of(topics.topics), time.time_ns() // 1_000_000
    _, click = encode_click("c", 1_700_000_000_077)
    letter = DeadLetter("orphan_click", "e", "$", names.clicks, 1, 0, b"c", click)
    write(
        topics,
        [
            (names.clicks, 1, b"c", click, ()),
            (names.clicks, 1, None, b"", [("headrace-watermark", b"5")]),
            (names.clicks, 1, b"d", b"{", ()),
            (names.dead_letters, 1, letter.key, letter.value, letter.out_headers()),
        ],
    )
    progress = Progress(
        watermark_ms=1, impressions_seen_ms=2, clicks_seen_ms=3, impressions_low=0, clicks_low=0, examples_low=0
    )

    async def transactions_and_reading() -> Any:
        from aiokafka.structs import OffsetAndMetadata, TopicPartition

        join = AIOKafkaProducer(**aiokafka_options(topics.kafka), transactional_id=f"{names.prefix}t")
        await join.start()
        await join.begin_transaction()
        await join.send_and_wait(names.examples, b"{}", b"a", partition=0)
        metadata = encode_progress(progress)
        await join.send_offsets_to_transaction(
            {
                TopicPartition(names.impressions, 1): OffsetAndMetadata(0, metadata),
                TopicPartition(names.clicks, 1): OffsetAndMetadata(2, metadata),
            },
            f"{names.prefix}{topics.join.group}",
        )
        await join.commit_transaction()
        await join.begin_transaction()
        await join.send_and_wait(names.examples, b"{}", b"a", partition=1)
        await join.abort_transaction()
        await join.begin_transaction()
        await join.send_and_wait(names.examples, b"{}", b"a", partition=0)
        try:
            return await read_everything(topics, sample=1_000)
        finally:
            await join.abort_transaction()
            await join.stop()

    readings = asyncio.run(transactions_and_reading())
    assert readings.differences == [] and readings.unread == []
    of_two = ("impressions", "clicks", "examples", "score-requests", "dead-letters")
    assert readings.partitions == dict.fromkeys(of_two, 2) | {"deltas": 1}
    assert readings.configs["clicks"]["retention.ms"] == str(topics.topics.retention_ms)
    assert readings.offsets_retention_ms == 7 * 86_400_000
    assert (readings.members, readings.trainer, readings.scorer) == ({"join": 0, "trainer": 0, "scorer": 0}, {}, {})
    assert readings.committed.keys() == {1}
    assert (readings.committed[1].clicks, readings.committed[1].progress) == (2, progress)
    log = readings.logs["examples", 0]
    assert (log.start, log.stable_end, log.end) == (0, 2, 3)
    assert readings.open_since_ms["examples", 0] == pytest.approx(now_ms, abs=30_000)
    assert readings.logs["examples", 1].stable_end == 2  # nothing to read, and no arrival below
    tail = readings.tails["clicks", 1]
    assert (tail.offsets.tolist(), list(tail.keys), tail.event_ms.tolist()) == ([0, 2], [b"c", b"d"], [1_700_000_000_077, -1])
    assert readings.letters == [("orphan_click", ("clicks", 1), 0)]
    assert readings.arrivals.keys() == {("clicks", 1, 0), ("clicks", 1, 2), ("examples", 0, 0)}


def test_dead_letters(run: Run, topics: Settings) -> None:
    names = TopicNames.of(topics.topics)
    letters = [
        DeadLetter("malformed_json", "expected\nJSON", "$", names.clicks, 1, 3, b"k", b"\xff{", (("trace", b"7"),)),
        DeadLetter("late_impression", "late", "$.timestamp", names.impressions, 0, 9, b"i", b"{}"),
    ]
    write(topics, [(names.dead_letters, each.partition, each.key, each.value, each.out_headers()) for each in letters])
    listed = run("dead-letters list --format json").json
    assert listed["totals"] == [
        {"source": names.clicks, "reason": "malformed_json", "letters": 1, "replayed": 0},
        {"source": names.impressions, "reason": "late_impression", "letters": 1, "replayed": 0},
    ]
    assert {letter["place"] for letter in listed["letters"]} == {"1/0", "0/0"}
    assert run("dead-letters list --until 1h").out == "no dead letters\n"

    shown = run("dead-letters show 1/0 --format json").json
    assert (shown["value_base64"], shown["key"], shown["source"]["offset"]) == ("/3s=", "k", 3)
    assert shown["headers"] == [{"name": "trace", "value": "7"}]
    assert "error    expected\\nJSON" in run("dead-letters show 1/0").out
    assert run("dead-letters show 0/0 --raw").out == "{}"
    nowhere = run("dead-letters show 1/8")
    assert nowhere.code == 1 and "1/8: expected a dead letter, found none" in nowhere.err

    dry = run("dead-letters replay --reason late_impression --dry-run").out
    assert dry.splitlines()[-1] == "would send 1 records again (dry run)"
    done = run("dead-letters replay --source impressions --since 1h --format json").json
    assert done["fed"] == [{"source": names.impressions, "reason": "late_impression", "records": 1}] and not done["dry_run"]
    again = run("dead-letters replay --all").out
    assert "sent 1 records again\n1 letters were replayed before" in again
    text = run("dead-letters list").out
    assert text.count("(replayed)") == 2 and "1 of them replayed" in text


def test_the_newest_dead_letters_of_several_partitions(run: Run, topics: Settings) -> None:
    names = TopicNames.of(topics.topics)
    for offset in (0, 1):
        for partition in (0, 1):
            each = DeadLetter("malformed_json", "e", "$", names.clicks, partition, offset, b"k", b"{")
            write(topics, [(names.dead_letters, partition, each.key, each.value, each.out_headers())])
    last_letters = {
        last: [letter["place"] for letter in run(f"dead-letters list --last {last} --format json").json["letters"]]
        for last in (2, 3, 0)
    }
    assert last_letters == {2: ["0/1", "1/1"], 3: ["1/0", "0/1", "1/1"], 0: ["0/0", "1/0", "0/1", "1/1"]}


def test_usage(run: Run) -> None:
    for command, message in (
        ("replay", "expected PARTITION/OFFSET, --reason, --source, --since, --until or --all, found none of them."),
        ("replay --reason late", "--reason 'late': expected one of empty_value, bad_utf8"),
        ("replay 17", "'17': expected PARTITION/OFFSET such as 0/17"),
        ("list --since yesterday", "expected a time such as 2024-05-01T12:00:00Z"),
    ):
        ran = run(f"dead-letters {command}")
        assert ran.code == 2 and message in " ".join(ran.err.split()), ran.err
