"""Operations over a real Kafka: plans, promotions, rollbacks and what undoes them; who confirms and who doesn't."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.settings import Settings
from state.errors import SnapshotCorrupt, SnapshotNotFound
from state.manifest import Manifest
from state.registry import RegistryState
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.errors import RegistryError
from stream.registry.follower import RegistryFollower
from stream.registry.heartbeat import HeartbeatSender
from stream.registry.log import read_registry
from stream.registry.operations import Operations, PromoteRequest, RollbackRequest
from stream.registry.writer import RegistryWriter
from stream.topics.names import TopicNames
from tests.judged import JUDGED

pytestmark = pytest.mark.kafka

GATE = SnapshotSettings(first_examples=0, good_after_ms=0)


class Scorer:
    """As a scorer does it: follows the registry, swaps, says so."""

    def __init__(self, settings: Settings, worker: str, *, deaf: bool = False) -> None:
        names = TopicNames.of(settings.topics)
        self.reader = RegistryFollower(settings.kafka, names, on_change=self.swap)
        self.sender = HeartbeatSender(settings.kafka, names, worker=worker, host=f"host-of-{worker}")
        self.deaf = deaf
        self.swaps: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Scorer:
        await self.sender.start()
        await self.reader.start()
        await asyncio.gather(*self.swaps)
        self.deaf_from_now = self.deaf
        return self

    deaf_from_now = False

    def swap(self, state: RegistryState) -> None:
        if not self.deaf_from_now:
            version = state.champion.version or -1
            self.swaps.append(asyncio.create_task(self.sender.send(version, 0, self.reader.position)))

    async def __aexit__(self, *exception: object) -> None:
        await self.reader.close()
        await asyncio.gather(*self.swaps)
        await self.sender.close()


async def three_versions(settings: Settings) -> None:
    writer = RegistryWriter(settings.kafka, TopicNames.of(settings.topics), who="trainer")
    await writer.take_trainer_epoch()
    for version in (1, 2, 3):
        await writer.announce(manifest(version), gate=GATE)
    await writer.tag_good(1, 2)
    await writer.close()


def manifest(version: int) -> Manifest:
    metrics = {"window_examples": 1_000.0, "window_log_loss": 0.5, "window_calibration": 1.0}
    return Manifest(version=version, epoch=1, created_at_ms=version, metrics=metrics, verdict=JUDGED)


def operations(settings: Settings, store: SnapshotStore | None = None) -> Operations:
    return Operations(settings.kafka, TopicNames.of(settings.topics), "me", store=store)


async def registry(settings: Settings) -> RegistryState:
    return await read_registry(settings.kafka, TopicNames.of(settings.topics))


def test_every_live_scorer_confirms(topics: Settings) -> None:
    async def run() -> None:
        await three_versions(topics)
        async with Scorer(topics, "s1") as first, Scorer(topics, "s2"):
            plan = await operations(topics).plan(RollbackRequest("bad"))
            assert (plan.previous, plan.version, plan.held_already, plan.held) == (3, 2, False, True)
            assert [beat.worker for beat in plan.live] == ["s1", "s2"]
            assert all(beat.version == 3 for beat in plan.live)
            assert first.reader.state.champion.version == 3  # looking changed nothing
            done = await operations(topics).rollback(plan)
            assert (done.previous, done.version, done.held) == (3, 2, True)
            assert sorted(each.worker for each in done.confirmed) == ["s1", "s2"] and done.unconfirmed == []
            assert done.took_ms < 5_000
            assert done.undo is not None and done.undo.command == "headrace snapshot promote 3 --reason 'undo of 2' --resume"
            assert first.reader.state.champion.version == 2

    asyncio.run(run())


def test_who_does_not_confirm_is_named(topics: Settings) -> None:
    """It serves the old version; or the right one by chance, without having read of the rollback."""

    async def run() -> None:
        await three_versions(topics)
        async with Scorer(topics, "s1"), Scorer(topics, "deaf", deaf=True):
            began = time.monotonic()
            done = await operations(topics).rollback(RollbackRequest("bad", timeout_ms=700))
            assert 0.7 <= time.monotonic() - began < 5
            assert [each.worker for each in done.confirmed] == ["s1"]
            assert [(beat.worker, beat.host, beat.version) for beat in done.unconfirmed] == [("deaf", "host-of-deaf", 3)]

    asyncio.run(run())


def test_no_scorer_is_live(topics: Settings) -> None:
    async def run() -> None:
        await three_versions(topics)
        done = await operations(topics).rollback(RollbackRequest("bad", to=1))
        assert (done.version, done.confirmed, done.unconfirmed) == (1, [], [])

    asyncio.run(run())


def test_a_version_that_is_not_whole_moves_nobody(topics: Settings) -> None:
    async def run() -> None:
        await three_versions(topics)
        store = SnapshotStore(topics.snapshots)
        checked = operations(topics, store)
        attempts: list[Any] = [
            lambda: checked.plan(RollbackRequest("bad")),
            lambda: checked.rollback(RollbackRequest("bad")),
            lambda: checked.promote(PromoteRequest(2, "better")),
        ]
        for attempt in attempts:
            with pytest.raises(SnapshotNotFound, match=r"version 2: .*Nothing was changed; --unchecked goes there"):
                await attempt()
        store.write(manifest(2), {"rows": torch.ones(3)}, {"adam": torch.ones(3)})
        plan = await checked.plan(RollbackRequest("bad"))
        (Path(topics.snapshots.url) / "v0000000002" / "dense.safetensors").unlink()
        with pytest.raises(SnapshotCorrupt, match=r"dense\.safetensors: expected .* found no file"):
            await checked.rollback(plan)  # checked again, since time has passed
        assert (await registry(topics)).champion.version == 3
        done = await operations(topics).rollback(RollbackRequest("bad"))
        assert (done.previous, done.version) == (3, 2)
        with pytest.raises(RegistryError, match="version 9: expected an announced version"):
            await operations(topics).rollback(RollbackRequest("bad", to=9))

    asyncio.run(run())


def test_a_promotion_meanwhile_does_not_move_the_target(topics: Settings) -> None:
    """Version 3 becomes good and version 4 champion: a target computed now would be 3."""

    async def run() -> None:
        await three_versions(topics)
        plan = await operations(topics).plan(RollbackRequest("bad"))
        trainer = RegistryWriter(topics.kafka, TopicNames.of(topics.topics), who="trainer")
        assert (await trainer.announce(manifest(4), gate=GATE)).promoted
        await trainer.tag_good(3)
        assert (await operations(topics).plan(RollbackRequest("bad"))).version == 3
        done = await operations(topics).rollback(plan)
        assert (plan.version, done.version, done.previous) == (2, 2, 4)
        assert done.undo is not None and done.undo.version == 4
        await trainer.close()

    asyncio.run(run())


def test_a_target_is_computed_once(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same when the target is found and put back in one call: the promotion comes in between."""

    async def run() -> None:
        await three_versions(topics)
        trainer = RegistryWriter(topics.kafka, TopicNames.of(topics.topics), who="trainer")
        rollback = RegistryWriter.rollback

        async def late(self: RegistryWriter, target: int, reason: str, *more: Any) -> Any:
            assert (await trainer.announce(manifest(4), gate=GATE)).promoted
            await trainer.tag_good(3)
            return await rollback(self, target, reason, *more)

        monkeypatch.setattr(RegistryWriter, "rollback", late)
        done = await operations(topics).rollback(RollbackRequest("bad", timeout_ms=100))
        assert (done.previous, done.version) == (4, 2)
        await trainer.close()

    asyncio.run(run())


def test_each_operation_is_undone(topics: Settings) -> None:
    async def run() -> None:
        await three_versions(topics)
        mine = operations(topics)
        before = (await registry(topics)).champion

        async def is_as_before() -> None:
            champion = (await registry(topics)).champion
            assert (champion.version, champion.hold, champion.hold_reason) == (before.version, before.hold, before.hold_reason)

        async with Scorer(topics, "s1"):
            rolled = await mine.rollback(RollbackRequest("bad"))
            undone = await mine.undo(rolled, timeout_ms=10_000)
            assert [each.worker for each in undone.confirmed] == ["s1"] and (undone.previous, undone.version) == (2, 3)
            await is_as_before()
            promoted = await mine.promote(PromoteRequest(1, "pin", hold=True, hold_reason="until Monday"))
            assert (promoted.confirmed, promoted.unconfirmed) == ([], []), "nobody was waited for"
            assert (await registry(topics)).champion.hold_reason == "until Monday"
            await mine.undo(promoted)
            await is_as_before()
        held = await mine.hold("sale")
        assert held.changed and (await registry(topics)).champion.hold
        resumed = await mine.undo(held)
        assert resumed.changed and not resumed.held
        await is_as_before()
        again = await mine.undo(resumed)
        assert again.held and again.reason == "sale"
        with pytest.raises(RegistryError, match="undo: expected an operation that changed something"):
            await mine.undo(await mine.hold("other"))

    asyncio.run(run())


def test_a_plan_of_a_promotion_writes_nothing(topics: Settings) -> None:
    async def run() -> None:
        await three_versions(topics)
        plan = await operations(topics).plan(PromoteRequest(1, "pin", hold=True, hold_reason="sale"))
        assert (plan.previous, plan.version, plan.held_already, plan.held) == (3, 1, False, True)
        assert plan.undo is not None and plan.undo.command == "headrace snapshot promote 3 --reason 'undo of 1' --resume"
        assert (await registry(topics)).champion.version == 3
        with pytest.raises(RegistryError, match="version 3: it is champion already"):
            await operations(topics).plan(PromoteRequest(3, "again"))
        with pytest.raises(TypeError, match="expected a plan of a RollbackRequest"):
            await operations(topics).rollback(plan)

    asyncio.run(run())
