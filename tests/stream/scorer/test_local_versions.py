"""Healing from what this machine has: from the log first, then from a version that was read before, and only then the store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from state.blobs import LocalBlobs
from state.manifest import Manifest
from state.registry import VersionRecord
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from state.version_cache import VersionCache
from stream.scorer import chain_follower
from stream.scorer.serving import load_version
from tests.stream.scorer.factory import MODEL, SCHEMA, request, weights
from tests.stream.scorer.following_scene import Scorer, quick, scene
from tests.stream.scorer.made_up_chain import Log, Trainer

__all__ = ["quick"]


def test_damaged_memory_is_healed_by_the_version_at_hand_and_the_deltas_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(3)
        trainer.version(2)
        trainer.delta(2)
        trainer.version(3)
        it.want(3)
        await it.until_caught_up()
        it.cached = {1}
        before = it.swapper.current
        it.follower.damaged()
        await it.until(lambda: it.swapper.current is not before)
        await it.until_caught_up()
        assert it.read == [1, 1]
        assert it.named == (3, 0)
        assert it.count("replica_loads_total", why="memory") == 1

        monkeypatch.setattr(chain_follower, "CACHED_DELTAS", 4)  # version 1 is five deltas older than version 3
        it.follower.damaged()
        await it.until(lambda: len(it.read) == 3)
        await it.until_caught_up()
        assert it.read == [1, 1, 3]

    scene(steps)


def test_a_log_that_does_not_lead_on_from_the_version_at_hand_takes_the_newest() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        trainer.delta(3)
        trainer.version(2)
        it.want(2)
        await it.until_caught_up()
        it.cached = {1}
        del log.items[2:4]  # retention has deleted deltas after version 1
        it.follower.damaged()
        await it.until(lambda: len(it.read) == 3)
        await it.until_caught_up()
        assert it.read == [1, 1, 2]

    scene(steps)


def test_a_start_from_an_older_version_answers_when_it_has_come_to_the_champion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_follower, "OVERDUE_S", 60.0)

    async def run() -> None:
        trainer = Trainer(Log())
        trainer.delta(2)
        trainer.version(1)
        trainer.delta(1)
        held = trainer.make()  # not in the log yet
        trainer.version(2, deltas_offset=trainer.log.end + 10)
        it = Scorer(trainer)
        it.cached = {1}
        try:
            it.want(2)
            await it.until(lambda: it.follower._growing is not None and it.follower._growing.progress.point.sequence == 3)
            assert it.at is None
            trainer.log.append(held)
            await it.until_caught_up()
            assert it.read == [1]
            assert it.named == (2, 0)
        finally:
            await it.close()

    asyncio.run(run())


def test_a_scorer_that_starts_again_does_not_read_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SnapshotStore(SnapshotSettings(url=str(tmp_path / "store")))
    features, model = SCHEMA.model_dump(mode="json"), MODEL.model_dump(mode="json")
    made = plain.write(Manifest(version=200, created_at_ms=5, features=features, model=model), weights(200), None)
    announced = VersionRecord.of(made, now_ms=9, who="t", gate="")
    reads, original = [], LocalBlobs.read

    def read(blobs: LocalBlobs, folder: str, name: str) -> bytearray:
        reads.append(name)
        return original(blobs, folder, name)

    monkeypatch.setattr(LocalBlobs, "read", read)
    scores = []
    for _ in range(3):
        cache = VersionCache(tmp_path / "cache", 1_000_000)
        store = SnapshotStore(SnapshotSettings(url=str(tmp_path / "store")), cache=cache)
        served = load_version(store, 200, device="cpu", announced=announced)
        scores.append(served.predictor.predict(served.decoder.requests([request("r", 1)]).batch).tolist())
    assert scores[0] == scores[1] == scores[2]
    assert sorted(reads) == ["dense.safetensors", "manifest.json", "serving-00000.safetensors"]
