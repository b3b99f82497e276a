"""The trainer as a process, on the real Kafka: killed, restarted, replaced, fed records it can't use."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
import torch

from deploy.settings import Settings
from model.errors import SnapshotMismatch
from model.learner import Learner
from state.manifest import Manifest
from state.store import SnapshotStore
from stream.kafka.clients import aiokafka_options
from stream.registry.log import read_registry
from stream.registry.writer import RegistryWriter
from stream.scorer.serving import load_version
from stream.topics.names import TopicNames
from stream.trainer.run import run_trainer
from tests.stream.trainer.factory import FIRST_MS, MODEL, SCHEMA
from tests.stream.trainer.process import PATIENCE_S, kept, newest, one_partition, send, until, until_version

pytestmark = pytest.mark.kafka


async def test_kill_9_and_restart_equal_an_uninterrupted_run_bit_for_bit(settings, tmp_path, start):
    # Rows are refused and evicted all the time, which a restart must do again.
    table = {"HEADRACE_TABLE__ADMIT_AFTER": "2", "HEADRACE_TABLE__MAX_ROWS": "24"}
    by_count = {"HEADRACE_TRAINER__MAX_BATCH_AGE_MS": "100000000", **table}
    whole, killed = (one_partition(settings, name, tmp_path) for name in ("whole", "killed"))
    trained = 3_000 // MODEL.batch_rows * MODEL.batch_rows

    await send(whole, range(3_000))
    process = start(whole, **by_count)
    await until(lambda: process.metric("batches_total") * MODEL.batch_rows == trained, process)
    process.stop()

    await send(killed, range(1_300))
    process = start(killed, **by_count)
    await until(lambda: process.metric("snapshot_version") >= 1, process)
    # Between versions from here on: what is trained now is lost with the process.
    await send(killed, range(1_300, 2_100))
    await until(lambda: process.metric("batches_total") * MODEL.batch_rows > 1_500, process)
    process.kill()
    version = await newest(killed)
    seen = SnapshotStore(killed.snapshots).manifest(version).examples_seen

    await send(killed, range(2_100, 3_000))
    process = start(killed, **by_count)
    await until(lambda: seen + process.metric("batches_total") * MODEL.batch_rows == trained, process)
    process.stop()

    stores = [SnapshotStore(each.snapshots) for each in (whole, killed)]
    ends = [await newest(each) for each in (whole, killed)]
    expected, found = (store.manifest(end) for store, end in zip(stores, ends, strict=True))
    assert found.examples_seen == expected.examples_seen == trained
    assert found.offsets == expected.offsets == {"0": trained}
    assert found.watermark_ms == FIRST_MS + trained - 1
    assert found.epoch == 2
    assert expected.metrics["table_evicted"] > 100 and expected.metrics["table_refused"] > 100
    for read in (SnapshotStore.serving, SnapshotStore.trainer):
        theirs, ours = (read(store, end) for store, end in zip(stores, ends, strict=True))
        assert theirs.keys() - kept(theirs) == ours.keys() - kept(ours)
        for name in theirs:
            if name.startswith("kept.scores."):  # sums, added up in other portions after a restart
                assert torch.allclose(theirs[name].double(), ours[name].double(), rtol=1e-6), name
            elif not name.startswith("kept."):  # others say when and by whom
                assert torch.equal(theirs[name], ours[name]), name


async def test_killed_and_replaced_each_example_counts_once_and_each_bad_one_is_set_aside(topics, start):
    def bad(index: int) -> bool:
        return index % 97 == 3

    total = 6_000
    good = sum(not bad(index) for index in range(total))
    await send(topics, range(2_000), partitions=2, bad=bad)
    first = start(topics)
    await until_version(first, 1)
    first.kill()

    await send(topics, range(2_000, 4_000), partitions=2, bad=bad)
    second = start(topics)
    await until_version(second, await newest(topics) + 1)
    assert second.answer("/readyz") == "ok\n"
    third = start(topics, "--take-over")  # nobody told the second one to stop: it is put out
    await until(lambda: third.answer("/readyz") == "ok\n", third)
    # Shown with scores that no version ever gave.
    await send(topics, range(4_000, total), partitions=2, bad=bad, score=0.999, model_version=1, delta=0)
    assert await asyncio.to_thread(second.process.wait, PATIENCE_S) == 1
    store = SnapshotStore(topics.snapshots)
    await until(lambda: store.manifest(store.versions()[-1]).examples_seen >= good, third)
    await until(lambda: third.metric("skew_examples") > 100 and third.metric("skew_ratio") > 0.5, third)
    third.stop()

    manifest = store.manifest(await newest(topics))
    assert manifest.examples_seen == good
    assert manifest.offsets == {"0": total // 2, "1": total // 2}
    assert manifest.epoch == 3
    assert manifest.metrics["window_auc"] > 0.9
    letters = await dead_letters(topics)
    # Some were written again after a kill; each names its record.
    assert {place for place, _ in letters} == {(index % 2, index // 2) for index in range(total) if bad(index)}
    assert {reason for _, reason in letters} == {"malformed_json"}


async def dead_letters(settings: Settings) -> list[tuple[tuple[int, int], str]]:
    from aiokafka import AIOKafkaConsumer, TopicPartition

    topic = TopicNames.of(settings.topics).dead_letters
    consumer = AIOKafkaConsumer(**aiokafka_options(settings.kafka), enable_auto_commit=False, auto_offset_reset="earliest")
    await consumer.start()
    places = [TopicPartition(topic, partition) for partition in (0, 1)]
    consumer.assign(places)
    await consumer.seek_to_beginning()
    ends = await consumer.end_offsets(places)
    found = []
    while any([await consumer.position(place) < end for place, end in ends.items()]):
        for records in (await consumer.getmany(timeout_ms=500)).values():
            for record in records:
                each = dict(record.headers)
                assert record.value == b"{"
                assert each["source_topic"] == TopicNames.of(settings.topics).examples.encode()
                found.append(((int(each["source_partition"]), int(each["source_offset"])), each["reason"].decode()))
    await consumer.stop()
    return found


async def test_a_trainer_in_another_folder_is_rejected_and_a_new_model_never_replaces_a_champion_unseen(
    topics, start, tmp_path
):
    await send(topics, range(2_000), partitions=2)
    first = start(topics)
    await until_version(first, 1)
    elsewhere = {"HEADRACE_SNAPSHOTS__URL": str(tmp_path / "elsewhere")}
    lost = start(topics, **elsewhere)
    assert await asyncio.to_thread(lost.process.wait, PATIENCE_S) == 1
    assert "versions that the registry knows" in lost.log.read_text()
    assert "found an empty store" in lost.log.read_text()
    assert first.process.poll() is None, first.log.read_text()  # it could not start, and ended nobody
    first.stop()
    names = TopicNames.of(topics.topics)
    before = await read_registry(topics.kafka, names)
    assert before.champion.version is not None

    new = start(topics, "--new-model", **elsewhere)
    await until_version(new, before.newest + 1)
    new.stop()
    after = await read_registry(topics.kafka, names)
    assert after.champion.version == before.champion.version
    record = after.versions[after.newest]
    assert record.line != before.versions[before.newest].line
    assert record.gate.startswith("candidate: of another line than the champion")
    assert record.verdict is not None and record.verdict.flow == "withheld"


async def test_a_snapshot_of_another_schema_is_refused_in_words(topics):
    names = TopicNames.of(topics.topics)
    store = SnapshotStore(topics.snapshots)
    writer = RegistryWriter(topics.kafka, names, who="test")
    learner = Learner(SCHEMA, MODEL, device="cpu")
    manifest = Manifest(
        version=1,
        epoch=await writer.take_trainer_epoch(),
        schema_hash=SCHEMA.fingerprint(),
        features=SCHEMA.model_dump(mode="json"),
        model=MODEL.model_dump(mode="json"),
    )
    whole = store.write(manifest, learner.serving_state(), learner.trainer_state())
    await writer.announce(whole, gate=topics.snapshots)
    await writer.close()
    with pytest.raises(SnapshotMismatch, match=r"features\.embedding_dim: expected 8, found 4"):
        await run_trainer(
            kafka=topics.kafka,
            settings=topics.trainer,
            names=names,
            http=topics.http,
            schema=SCHEMA.model_copy(update={"embedding_dim": 8}),
            model=MODEL,
            snapshots=topics.snapshots,
        )
    assert (await read_registry(topics.kafka, names)).trainer.epoch == 1  # a trainer that ran would run on


async def test_with_more_fields_training_goes_on_and_scorers_get_them_by_the_next_version(topics, start):
    await send(topics, range(2_000), partitions=2)
    first = start(topics)
    await until_version(first, 1)
    first.stop()
    before = await newest(topics)

    hour = {"name": "hour", "kind": "hour"}
    fields = [
        hour,
        *({"name": field.name} for field in SCHEMA.fields),
        {"name": "both", "kind": "cross", "of": ["user", "item"]},
    ]
    await send(topics, range(2_000, 3_000), partitions=2)
    second = start(topics, HEADRACE_FEATURES__FIELDS=json.dumps(fields))
    store = SnapshotStore(topics.snapshots)
    await until(lambda: store.manifest(store.versions()[-1]).examples_seen == 3_000, second)
    second.stop()
    assert "hour is new: it begins without effect on scores" in second.log.read_text()
    registry = await read_registry(topics.kafka, TopicNames.of(topics.topics))
    old, new = registry.versions[before], registry.champion_record
    assert new is not None and new.version > old.version
    assert (new.line, new.examples_seen) == (old.line, 3_000)
    assert new.chain != old.chain and new.sequence is not None
    manifest = store.manifest(new.version)
    assert manifest.rows is not None and manifest.rows > (store.manifest(before).rows or 0)
    served = load_version(store, new.version, device="cpu", announced=new)
    assert [field.name for field in served.decoder.schema.fields] == ["hour", "user", "item", "both"]
    request = b'{"request_id":"r","context":{"user":"u1"},"candidates":[{"id":"a","features":{"item":"i3"}},{"id":"b"}]}'
    batch = served.decoder.requests([request], np.array([FIRST_MS])).batch
    assert np.isfinite(served.predictor.predict(batch)).all()
