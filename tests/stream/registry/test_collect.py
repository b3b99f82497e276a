"""Deleting versions over a real Kafka and a folder: what goes, what stays, and what is left by those who die in between."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deploy.settings import Settings
from state import upkeep
from state.errors import SnapshotError
from state.store import SnapshotStore
from stream.errors import RegistryError
from stream.registry.collect import collect_by_itself
from stream.registry.heartbeat import HeartbeatSender
from stream.registry.operations import PromoteRequest, RollbackRequest
from stream.registry.writer import RegistryWriter
from stream.topics.names import TopicNames
from tests.stream.registry.versions import agree, announced, keep, operations, registry, run_until_killed, write

pytestmark = pytest.mark.kafka


def test_what_nothing_needs_goes_with_record_and_files(topics: Settings) -> None:
    async def run() -> None:
        await announced(topics, range(1, 13))
        mine = operations(topics)
        await mine.set_alias("candidate", 2, "better")
        await mine.tag(3, {"ticket": "A-1"}, "look at it")
        await mine.tag(4, {"old": ""}, "")
        await mine.tag(4, {}, "", remove=["old"])
        scorer = HeartbeatSender(topics.kafka, TopicNames.of(topics.topics), worker="s1")
        await scorer.start()
        await scorer.send(5, 0, 1, fallback_of=6)

        plan = await mine.plan_gc(keep(topics))
        assert plan.versions == (1, 4, 7, 8, 9, 10) and plan.size > 0 and plan.pending == plan.rests == ()
        assert plan.kept[2] == "alias candidate" and plan.kept[3] == "tagged: ticket"
        assert plan.kept[5] == "scorer s1 answers with it" and plan.kept[6] == "scorer s1 tries to read it"
        await agree(topics, range(1, 13))  # a plan writes nothing

        done = await mine.gc(keep(topics), "disk is full")
        assert (done.versions, done.size, done.foreign) == (list(plan.versions), plan.size, [])
        await agree(topics, (2, 3, 5, 6, 11, 12))
        state = await registry(topics)
        assert (state.deletion.who, state.deletion.reason) == ("me", "disk is full")
        assert sorted(state.tags) == [3]
        assert (await mine.gc(keep(topics), "again")).versions == []
        assert (await registry(topics)).deletion.reason == "disk is full", "nothing to do writes nothing"
        with pytest.raises(RegistryError, match=r"version 4: expected an announced version, found none of that number"):
            await operations(topics).rollback(RollbackRequest("back", to=4))
        await announced(topics, [13])
        await scorer.close()

    asyncio.run(run())


def test_the_trainer_deletes_with_its_own_writer(topics: Settings) -> None:
    async def run() -> None:
        names = TopicNames.of(topics.topics)
        await announced(topics, range(1, 6))
        writer = RegistryWriter(topics.kafka, names, who="trainer")
        done = await collect_by_itself(topics.kafka, names, writer, SnapshotStore(topics.snapshots), keep(topics))
        assert done.versions == [1, 2, 3]
        await writer.close()
        await agree(topics, (4, 5))

    asyncio.run(run())


def test_what_killed_writers_left_goes_too(topics: Settings) -> None:
    """A folder without a manifest below the newest version, and a whole version between announced ones that never was."""

    async def run() -> None:
        await announced(topics, (2, 3))
        for version in (1, 4, 5):
            write(topics, version)
        (Path(topics.snapshots.url) / "v0000000004" / "manifest.json").unlink()
        await announced(topics, (6,))
        write(topics, 7)  # its trainer is about to announce it
        plan = await operations(topics).plan_gc(keep(topics, keep_versions=5))
        assert (plan.versions, plan.rests) == ((), (4, 5))
        done = await operations(topics).gc(keep(topics, keep_versions=5), "rests")
        assert done.versions == [4, 5]
        assert SnapshotStore(topics.snapshots).numbers() == [1, 2, 3, 6, 7], "1 may be one that a lost registry knew"

    asyncio.run(run())


@pytest.mark.parametrize("step", ["after:commit:1", "before:delete:1", "after:delete:1", "after:delete:2", "before:commit:2"])
def test_killed_in_the_middle_the_next_one_ends_it(topics: Settings, step: str) -> None:
    """kill -9 after the records are gone, between two files, before the note is cleared."""

    async def run() -> None:
        await announced(topics, range(1, 6))
        await asyncio.to_thread(run_until_killed, topics, "gc", step)
        state = await registry(topics)
        assert sorted(state.versions) == [4, 5]
        assert [doomed.version for doomed in state.deletion.versions] == [1, 2, 3]
        plan = await operations(topics).plan_gc(keep(topics))
        assert (plan.versions, plan.pending, plan.rests) == ((), (1, 2, 3), ())
        with pytest.raises(RegistryError, match="version 2: expected an announced version, found one that is being deleted"):
            await _alias_unchecked(topics, 2)
        done = await operations(topics).gc(keep(topics), "the next one")
        assert done.versions == [1, 2, 3]
        await agree(topics, (4, 5))

    asyncio.run(run())


async def _alias_unchecked(settings: Settings, version: int) -> None:
    writer = RegistryWriter(settings.kafka, TopicNames.of(settings.topics), who="me")
    try:
        await writer.set_alias("b", version, "x")
    finally:
        await writer.close()


def test_killed_before_anything_is_written_nothing_is_gone(topics: Settings) -> None:
    async def run() -> None:
        await announced(topics, range(1, 4))
        await asyncio.to_thread(run_until_killed, topics, "gc", "before:commit:1")
        await agree(topics, range(1, 4))

    asyncio.run(run())


def test_a_store_that_fails_in_the_middle(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        await announced(topics, range(1, 8))
        delete, calls = SnapshotStore.delete, []

        def fails(self: SnapshotStore, version: int) -> None:
            calls.append(version)
            if len(calls) == 3:
                raise SnapshotError("snapshot store: can't delete it: no answer.")
            delete(self, version)

        monkeypatch.setattr(SnapshotStore, "delete", fails)
        says = r"no answer\. 2 versions were deleted\. Version 3 and others of its batch have left the registry; the next"
        with pytest.raises(SnapshotError, match=says):
            await operations(topics).gc(keep(topics), "x")
        assert sorted((await registry(topics)).versions) == [6, 7]
        assert SnapshotStore(topics.snapshots).versions() == [3, 4, 5, 6, 7]
        assert (await operations(topics).gc(keep(topics), "y")).versions == [1, 2, 3, 4, 5]
        await agree(topics, (6, 7))

    asyncio.run(run())


def test_a_store_that_is_not_the_registrys_loses_nothing(topics: Settings) -> None:
    """Another folder, an empty one, or one whose versions only have the same numbers."""

    async def run() -> None:
        await announced(topics, range(1, 6))
        for name in ("empty", "other"):
            url = f"{topics.snapshots.url}-{name}"
            elsewhere = topics.model_copy(update={"snapshots": topics.snapshots.model_copy(update={"url": url})})
            if name == "other":
                for version in range(1, 6):
                    write(elsewhere, version, epoch=7)
            for attempt in (operations(elsewhere).gc(keep(elsewhere), "x"), operations(elsewhere).plan_gc(keep(elsewhere))):
                with pytest.raises(
                    RegistryError, match=r"expected one of the newest versions .* \(5, 4, 3, 2, 1\), found none"
                ):
                    await attempt
        await agree(topics, range(1, 6))

    asyncio.run(run())


def test_a_version_of_another_system_is_left_alone(topics: Settings) -> None:
    """A number whose files in the store are of another version than the one announced."""

    async def run() -> None:
        await announced(topics, range(1, 5))
        SnapshotStore(topics.snapshots).delete(2)
        write(topics, 2, epoch=9)
        done = await operations(topics).gc(keep(topics), "x")
        assert (done.versions, done.foreign) == ([1], [2])
        assert SnapshotStore(topics.snapshots).versions() == [2, 3, 4]
        assert sorted((await registry(topics)).versions) == [3, 4]

    asyncio.run(run())


def test_operators_at_once_lose_nothing_that_is_used(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two delete, one promotes old versions, one names them: whatever the order, what is used is whole."""
    monkeypatch.setattr(upkeep, "BATCH", 3)

    async def run() -> None:
        await announced(topics, range(1, 25))
        refused: list[str] = []

        async def attempt(change: Any) -> bool:
            try:
                await change
            except (RegistryError, SnapshotError) as error:
                refused.append(str(error))
                return False
            return True

        async def promote() -> None:
            for version in (3, 8, 12):
                await attempt(operations(topics, "ann").promote(PromoteRequest(version, "back")))

        async def name() -> list[int]:
            return [
                version
                for version in (5, 9, 14, 20)
                if await attempt(operations(topics, "bob").set_alias(f"at.{version}", version, "compare"))
            ]

        one, two = operations(topics, "one").gc(keep(topics), "x"), operations(topics, "two").gc(keep(topics), "y")
        _, named, first, second = await asyncio.gather(promote(), name(), one, two)
        state, store = await registry(topics), SnapshotStore(topics.snapshots)
        assert sorted(state.versions) == store.versions() == store.numbers() and state.deletion.versions == ()
        assert set(named) <= state.versions.keys() and {state.aliases[f"at.{each}"].version for each in named} == set(named)
        assert state.champion.version in state.versions
        gone = set(range(1, 25)) - state.versions.keys()
        assert {*first.versions, *second.versions} == gone and len(gone) >= 10
        assert all("expected an announced version, found" in each or "expected a whole version" in each for each in refused)

    asyncio.run(run())
