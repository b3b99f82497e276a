"""Which moments are kept, how a candidate becomes the anchor, and what is read from the store."""

from __future__ import annotations

import numpy as np
import pytest

from model.anchor import EarlierModel
from model.learner import Learner
from model.predictor import Predictor
from state.gate import GateState
from state.manifest import Manifest
from state.registry import Champion, RegistryState, VersionRange, VersionRecord
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.trainer import anchors as module
from stream.trainer.anchors import Anchors
from stream.trainer.captured import Position
from stream.trainer.judge import Judge
from tests.judged import judged
from tests.stream.trainer.factory import MODEL, SCHEMA, columns

MINUTE = 60_000
ASKED = columns(range(60)).batch


class World:
    """A trainer with its store and registry, in minutes of event time."""

    def __init__(self, folder) -> None:
        self.settings = SnapshotSettings(url=str(folder / "snapshots"))
        self.store = SnapshotStore(self.settings)
        self.registry = RegistryState(champion=Champion(version=1))
        self.predictors: dict[int, Predictor] = {}
        self.newest = 0
        self.start(Learner(SCHEMA, MODEL, device="cpu"), GateState(line=1))

    def start(self, learner: Learner, gate: GateState) -> None:
        self.learner, self.judge = learner, Judge(self.settings, gate)
        self.anchors = Anchors(self.judge, self.store, self.settings, learner.schema, MODEL, learner, "cpu")

    def learn(self, seed: int) -> None:
        offsets = np.sort(np.random.default_rng(seed).integers(0, 80, 64))
        self.learner.learn(columns(offsets.tolist()).batch, (offsets % 3 == 0).astype(np.float32))

    def version(self, minute: int, *, good: bool = True, announced: bool = True, **report) -> int:
        """Learn, and write a version; 300 clicks come in a minute."""
        self.learn(minute)
        self.newest += 1
        number, clicks = self.newest, 300 * minute
        serving = self.learner.serving_state()
        self.predictors[number] = Predictor.of(SCHEMA, MODEL, serving, device="cpu")
        verdict = judged(**{"line": 1, "clicks": clicks, **report})
        self.anchors.captured(Position({}, minute * MINUTE, self.learner.examples_seen, 1.0, 0, at_ms=minute), verdict)
        described = {"features": SCHEMA.model_dump(mode="json"), "model": MODEL.model_dump(mode="json")}
        manifest = Manifest(version=number, schema_hash=SCHEMA.fingerprint(), **described)
        self.store.write(manifest, serving, self.learner.trainer_state())
        if announced:
            self.registry.versions[number] = VersionRecord(
                version=number,
                created_at_ms=minute,
                watermark_ms=minute * MINUTE,
                verdict=verdict,
                champion_at_ms=(minute,) if good else (),
                good_at_ms=minute if good else None,
            )
            self.registry.champion = Champion(version=number, rolled_back=self.registry.champion.rolled_back)
        return number

    async def follow(self, minute: int) -> int | None:
        self.judge._gate.state.clicks = 300.0 * minute
        await self.anchors.follow(self.registry, minute * MINUTE)
        return None if self.judge.anchor is None else self.judge.anchor.version

    def agrees(self, version: int) -> bool:
        """Whether the anchor scores as a predictor of that version, also after more was learned."""
        self.learn(10_000 + version)
        anchor = self.judge.anchor
        assert anchor is not None
        assert isinstance(anchor.predictor, EarlierModel)
        return anchor.predictor.predict(ASKED).tobytes() == self.predictors[version].predict(ASKED).tobytes()


def restarted(learner: Learner) -> Learner:
    again = Learner(SCHEMA, MODEL, device="cpu")
    again.restore(learner.serving_state(), learner.trainer_state())
    return again


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


async def test_the_anchor_and_one_candidate_are_kept_and_the_store_is_not_read(world, monkeypatch):
    monkeypatch.setattr(world.store, "read", lambda version: pytest.fail(f"version {version} is read"))
    seen = []
    for minute in range(1, 60):
        world.version(minute)
        seen.append(await world.follow(minute))
        assert len(world.learner._moments._saved) <= 2
        if seen[-1] is not None:
            assert world.agrees(seen[-1])
    # Each anchor is at least ten minutes newer than the one before, and ten minutes old when it becomes the anchor.
    assert seen[:10] == [None] * 10
    assert sorted({each for each in seen if each}) == [1, 12, 23, 34, 45]
    assert [seen.index(version) + 1 for version in (1, 12, 23)] == [11, 22, 33]
    assert world.anchors.saved_rows > 0


async def test_a_candidate_that_does_not_become_good_gives_way(world):
    world.version(1, good=False)
    await world.follow(1)
    world.version(2, good=False, announced=False)
    world.version(3)
    world.version(4)
    found = [await world.follow(minute) for minute in (4, 12, 13)]
    assert found == [None, None, 3]
    assert world.agrees(3)


async def test_what_is_captured_while_withheld_is_no_candidate(world):
    world.version(1, flow="withheld")
    world.version(2, problems=("weights not finite: embedding",))
    assert world.learner._moments._saved == []


async def test_a_trainer_that_starts_again_reads_the_anchor_as_a_moment(world):
    for minute in range(1, 14):
        world.version(minute)
    assert await world.follow(13) in (1, 2, 3)
    before = world.judge.anchor.version
    learner = restarted(world.learner)
    world.start(learner, GateState(line=1, anchor=before))
    assert await world.follow(14) == before
    assert world.agrees(before)
    assert 0 < world.anchors.saved_rows <= learner.rows
    # The candidate was forgotten with the process. What took its place is read from the store, too.
    for minute in range(15, 26):
        world.version(minute)
    found = await world.follow(26)
    assert found > 10
    assert world.agrees(found)
    assert len(world.learner._moments._saved) <= 2


async def test_a_rollback_past_the_anchor_goes_back_to_an_older_one(world):
    for minute in range(1, 25):
        world.version(minute)
        newest = await world.follow(minute)
    assert newest == 12
    world.registry.champion = Champion(version=5, rolled_back=(VersionRange(5, 24),))
    assert await world.follow(25) == 5
    assert world.agrees(5)
    assert world.anchors._candidate is None or world.anchors._candidate.lost


async def test_a_version_that_is_not_from_the_past_of_the_weights_is_loaded_whole(world):
    for minute in range(1, 13):
        world.version(minute)
    stranger = Learner(SCHEMA, MODEL, device="cpu")
    stranger.learn(columns(range(500, 900)).batch, np.ones(400, np.float32))
    world.start(stranger, GateState(line=1, anchor=1))
    assert await world.follow(13) == 1
    predictor = world.judge.anchor.predictor
    assert isinstance(predictor, Predictor)
    assert predictor.predict(ASKED).tobytes() == world.predictors[1].predict(ASKED).tobytes()
    assert stranger._moments._saved == []


async def test_an_anchor_that_can_not_be_read_is_passed_over(world, caplog):
    for minute in range(1, 14):
        world.version(minute)
    world.start(restarted(world.learner), GateState(line=1, anchor=1))
    world.store.delete(1)
    assert await world.follow(13) is None
    assert "version 1 can't be compared with" in caplog.text
    assert await world.follow(13) in (2, 3)


async def test_a_late_tag_is_waited_for(world, monkeypatch):
    world.version(1, good=False)
    record = world.registry.versions[1]
    now_ms = 10_000_000
    monkeypatch.setattr(module, "_now_ms", lambda: now_ms)
    world.registry.versions[1] = VersionRecord(
        version=1, created_at_ms=1, watermark_ms=MINUTE, verdict=record.verdict, champion_at_ms=(now_ms - 30_000,)
    )
    await world.follow(1)
    world.version(2)
    assert world.anchors._candidate.created_at_ms == 1
    now_ms += 60_000
    await world.follow(2)
    world.version(3)
    assert world.anchors._candidate.created_at_ms == 3
