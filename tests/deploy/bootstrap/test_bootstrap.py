"""`headrace bootstrap` on the real Kafka: killed, given again, and a trainer that goes on from its version."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from deploy.settings import Settings
from model.learner import Learner
from state.store import SnapshotStore
from stream.registry.log import read_registry
from stream.topics.names import TopicNames
from stream.trainer.start import Start, restore
from tests.deploy.conftest import Run
from tests.forked import forked
from tests.stream.trainer.factory import FIRST_MS, MODEL, SCHEMA, headers, value
from tests.stream.trainer.process import PATIENCE_S, Process, own_environment, send, until

pytestmark = pytest.mark.kafka

HISTORY, STREAM = 12_000, 1_500


def history(folder: Path) -> Path:
    """The examples 0 to HISTORY, as a file of impressions."""
    file = folder / "log.jsonl"
    with file.open("wb") as out:
        for index in range(HISTORY):
            clicked = dict(headers(index))["label"].decode()
            out.write(b'%b,"clicked":%b}\n' % (value(index)[:-1], clicked.encode()))
    return file


def test_it_survives_kill_9_and_none_of_its_examples_counts_twice(
    run: Run, topics: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = own_environment(topics)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    command = f"bootstrap jsonl --path {history(tmp_path)} --checkpoints {tmp_path / 'kept'} --checkpoint-every 0 --format json"

    killed = forked(command.split(), {**os.environ, **environment}, tmp_path, tmp_path / "killed.log")
    ends = time.monotonic() + PATIENCE_S
    while not list(tmp_path.glob("kept/*/v*/manifest.json")):
        assert killed.poll() is None and time.monotonic() < ends, (tmp_path / "killed.log").read_text()
        time.sleep(0.002)
    killed.kill()
    killed.wait()

    found = run(command)
    assert found.code == 0, found.err
    assert 0 < found.json["resumed_at"] < HISTORY
    assert (found.json["version"], found.json["promoted"]) == (1, True)
    assert found.json["examples"] == HISTORY
    assert found.json["until_ms"] == FIRST_MS + HISTORY - 1
    assert found.json["clicks"] == sum(index % 7 < 2 for index in range(HISTORY))
    assert found.json["auc"] > 0.9 and found.json["set_aside"] == 0
    assert not list(tmp_path.glob("kept/*"))

    store = SnapshotStore(topics.snapshots)
    first = store.manifest(1)
    assert (first.offsets, first.chain, first.sequence) == ({}, "deepfm/1/0", 0)
    learner = Learner(SCHEMA, MODEL, device="cpu")
    restore(learner, store, Start(first, 1))
    assert f"{learner.digest:016x}" == first.digest

    assert run(command).json == {
        "dataset": "jsonl",
        "version": 1,
        "promoted": True,
        "reason": found.json["reason"],
        "published_before": True,
    }
    other = run(f"{command} --limit 100")
    assert other.code == 1 and "the registry: expected no version, found 1, the newest 1." in other.err

    asyncio.run(goes_on(topics, tmp_path, store))
    assert "12,000 examples of log.jsonl (jsonl) up to " in run("snapshot show 1").out


async def goes_on(topics: Settings, tmp_path: Path, store: SnapshotStore) -> None:
    """A trainer that reads history again and more learns only what is newer."""
    await send(topics, range(HISTORY + STREAM), partitions=2)
    trainer = Process(topics, tmp_path)
    try:
        await until(lambda: trainer.metric("past_examples_total") == HISTORY, trainer)
        await until(lambda: store.manifest(store.versions()[-1]).examples_seen == HISTORY + STREAM, trainer)
        trainer.stop()
    finally:
        trainer.process.kill()
        trainer.process.wait()
    registry = await read_registry(topics.kafka, TopicNames.of(topics.topics))
    newest = store.manifest(registry.newest)
    assert newest.examples_seen == HISTORY + STREAM
    assert newest.history == store.manifest(1).history
    assert (newest.epoch, newest.chain) == (2, "deepfm/2/0")
    assert newest.verdict is not None and newest.verdict.line == 1
    assert registry.champion.version is not None and registry.champion.version > 1
