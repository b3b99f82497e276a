"""Whatever compression a topic of answers has, the client reads it, or says which package it lacks."""

from __future__ import annotations

import asyncio
import itertools

import kafka.codec
import kafka.record.default_records
import msgspec
import pytest
from kafka import KafkaProducer

from deploy.settings import Settings
from headrace import Client, DeliveryError, HeadraceError
from headrace.scores import ScoreStream
from tests.deploy.conftest import Run
from tests.deploy.conftest import run as run  # the fixture
from tests.raw_batches import CODECS, Codec, raw_batch, raw_records, send_raw_batch

pytestmark = pytest.mark.kafka


def answer(name: str) -> bytes:
    return msgspec.json.encode({"request_id": name, "scores": [{"id": "a", "score": 0.5}], "model_version": 1})


def send(topics: Settings, names: list[str], codec: Codec) -> None:
    """One batch as Java's clients write it, large enough for several blocks of a codec."""
    records = raw_records([(name.encode(), answer(name), [(b"pad", b"x" * 40_000)]) for name in names])
    asyncio.run(send_raw_batch(topics, f"{topics.topics.prefix}scores", 0, raw_batch(records, len(names), codec)))


def test_answers_in_every_codec_are_read(topics: Settings, run: Run) -> None:
    scores = f"{topics.topics.prefix}scores"
    names = []
    for codec in CODECS:
        names += [f"{codec}-{number}" for number in range(3)]
        send(topics, names[-3:], codec)
        producer = KafkaProducer(
            bootstrap_servers=topics.kafka.bootstrap_servers, compression_type=None if codec == "none" else codec
        )
        producer.send(scores, key=b"k", value=answer(f"python-{codec}"), partition=0)
        producer.close()
        names.append(f"python-{codec}")
    with (
        Client(topics.kafka.bootstrap_servers, topic_prefix=topics.topics.prefix) as client,
        client.subscribe_scores(from_beginning=True) as stream,
    ):
        assert [found.request_id for found in itertools.islice(stream, len(names))] == names
        futures = {codec: client.ask_later({}, [("a", {})], request_id=f"asked-{codec}") for codec in CODECS}
        for codec, future in futures.items():
            send(topics, [f"asked-{codec}"], codec)
            assert future.result(20).best().id == "a"
    ran = run(f"scores tail --from-beginning --limit {len(names)} --format json")
    assert ran.code == 0 and [msgspec.json.decode(line)["request_id"] for line in ran.out.splitlines()] == names


def test_a_codec_without_its_package_is_named(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka.codec, "zstd", None)
    scores = f"{topics.topics.prefix}scores"
    with Client(topics.kafka.bootstrap_servers, topic_prefix=topics.topics.prefix) as client:
        future = client.ask_later({}, [("a", {})], request_id="r")
        stream = client.subscribe_scores()
        send(topics, ["r"], "zstd")
        said = (
            f"topic '{scores}': expected records that this Python can decompress, found a codec without its package "
            "(UnsupportedCodecError: Libraries for zstd compression codec not found). Install it: pip install "
            "'kafka-python[lz4,snappy,zstd]'."
        )
        for _ in range(2):  # it is said again: nothing is passed over
            with pytest.raises(HeadraceError) as caught:
                stream.poll(10_000)
            assert str(caught.value) == said
        stream.close()
        with pytest.raises(HeadraceError) as caught:  # who waits
            future.result(10)
        assert str(caught.value) == said
        with pytest.raises(DeliveryError) as later:  # and who asks later
            client.ask({}, [("a", {})])
        assert str(later.value) == f"answers: expected a thread that reads them, found it ended. {said} Then make a new Client."


def test_what_a_decompressor_raises_becomes_an_error_of_ours(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(payload: bytes) -> bytes:  # a broker lets no damaged batch in, so damage means a failing disk or a bug
        raise RuntimeError("LZ4F_decompress failed with code: ERROR_decompressionFailed")

    monkeypatch.setattr(kafka.record.default_records, "lz4_decode", broken)
    send(topics, ["good"], "zstd")
    send(topics, ["bad"], "lz4")
    options = {"bootstrap_servers": [topics.kafka.bootstrap_servers]}
    with ScoreStream(f"{topics.topics.prefix}scores", options, from_beginning=True) as stream:
        assert [found.request_id for found in stream.poll(10_000)] == ["good"]
        with pytest.raises(HeadraceError, match=r"^topic '.*': expected to read it, found: RuntimeError: LZ4F_decompress"):
            stream.poll(10_000)


def test_a_record_that_is_no_answer_is_passed_over_and_costs_no_other(topics: Settings) -> None:
    batch = raw_records([(b"k", value, []) for value in (answer("before"), b"garbage", answer("r"))])
    with (
        Client(topics.kafka.bootstrap_servers, topic_prefix=topics.topics.prefix) as client,
        client.subscribe_scores() as stream,
    ):
        future = client.ask_later({}, [("a", {})], request_id="r")
        asyncio.run(send_raw_batch(topics, f"{topics.topics.prefix}scores", 0, raw_batch(batch, 3)))
        assert future.result(20).request_id == "r"
        assert [found.request_id for found in stream.poll(10_000)] == ["before"]
        with pytest.raises(HeadraceError, match=r"scores/0 offset 1: expected the answer of a scorer"):
            stream.poll(10_000)
        assert [found.request_id for found in stream.poll(10_000)] == ["r"]
