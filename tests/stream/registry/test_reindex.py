"""A registry that is lost is made again from the store, over a real Kafka: topics deleted, processes killed, two at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deploy.settings import Settings
from state.registry import RegistryState
from state.store import SnapshotStore
from stream.errors import RegistryError
from stream.kafka.cluster import admin_client
from stream.registry import reindex as reindexing
from stream.registry.heartbeat import HeartbeatSender
from stream.registry.writer import RegistryWriter
from stream.topics.admin import create_topics
from stream.topics.names import TopicNames
from tests.stream.registry.versions import GATE, announced, operations, registry, run_until_killed, write

pytestmark = pytest.mark.kafka

CHAIN = {"chain": "deepfm/1/0", "sequence": 7, "digest": "0" * 16, "deltas_offset": 9}


async def lose_the_topic(settings: Settings) -> None:
    topic = TopicNames.of(settings.topics).snapshots
    async with admin_client(settings.kafka) as admin:
        await admin.delete_topics([topic])
        while topic in await admin.list_topics():
            await asyncio.sleep(0.1)
    await asyncio.to_thread(create_topics, settings.kafka, settings.topics)


class Scorer:
    """A live scorer that answers with a version."""

    def __init__(self, settings: Settings, worker: str, version: int) -> None:
        self.sender = HeartbeatSender(settings.kafka, TopicNames.of(settings.topics), worker=worker)
        self.version = version

    async def __aenter__(self) -> None:
        await self.sender.start()
        await self.sender.send(self.version, 0, 1)

    async def __aexit__(self, *exception: object) -> None:
        await self.sender.close()


def facts(state: RegistryState) -> dict[int, Any]:
    """What the registry says of versions and can know from manifests."""
    return {
        version: (each.epoch, each.created_at_ms, each.metrics, each.verdict, each.size, each.chain, each.sequence)
        for version, each in sorted(state.versions.items())
    }


def test_a_deleted_topic_is_made_again(topics: Settings) -> None:
    async def run() -> None:
        await announced(topics, range(1, 6))
        before = facts(await registry(topics))
        await lose_the_topic(topics)
        assert (await registry(topics)).versions == {}
        async with Scorer(topics, "s1", 4), Scorer(topics, "s2", 4), Scorer(topics, "starting", -1):
            mine = operations(topics)
            plan = await mine.reindex("topic lost", dry_run=True)
            assert (await registry(topics)) == RegistryState(), "a dry run writes nothing"
            done = await mine.reindex("topic lost")
        assert done == plan and (done.lost, done.added, done.champion, done.broken) == (True, (1, 2, 3, 4, 5), 4, {})
        state = await registry(topics)
        assert facts(state) == before
        champion = state.champion
        assert (champion.version, champion.hold, champion.hold_reason, champion.who) == (4, True, "topic lost", "me")
        assert state.trainer.epoch == 1
        again = await mine.reindex("again")
        assert (again.lost, again.added, again.repaired, again.champion) == (False, (), (), None)
        await mine.resume()
        trainer = RegistryWriter(topics.kafka, TopicNames.of(topics.topics), who="trainer")
        assert await trainer.take_trainer_epoch() == 2
        assert (await trainer.announce(write(topics, 6, epoch=2), gate=GATE)).promoted
        await trainer.close()

    asyncio.run(run())


def test_who_is_champion_must_be_known(topics: Settings) -> None:
    async def run() -> None:
        for version in (1, 2, 3):
            write(topics, version)
        mine = operations(topics)
        with pytest.raises(RegistryError, match=r"found no live scorer with a version\. Name the champion: .* newest .* is 3"):
            await mine.reindex("x")
        async with Scorer(topics, "s1", 2), Scorer(topics, "s2", 3):
            with pytest.raises(RegistryError, match=r"found scorers that answer with different versions \(2, 3\)"):
                await mine.reindex("x")
        async with Scorer(topics, "s1", 9):
            with pytest.raises(RegistryError, match=r"found that they answer with version 9, which isn't in .*snapshots\."):
                await mine.reindex("x")
        with pytest.raises(RegistryError, match=r"--champion 9: expected a whole version in .*snapshots, found none"):
            await mine.reindex("x", champion=9)
        assert (await registry(topics)) == RegistryState()
        assert (await mine.reindex("x", champion=reindexing.NO_CHAMPION)).champion is None
        state = await registry(topics)
        assert sorted(state.versions) == [1, 2, 3] and state.champion.version is None
        with pytest.raises(RegistryError, match=r"--champion: expected a registry that knows no version, found one that does"):
            await mine.reindex("x", champion=2)

    asyncio.run(run())


def test_killed_in_the_middle_it_is_run_again(topics: Settings) -> None:
    """Seven versions in batches of two: the process dies after the second batch, before the third."""

    async def run() -> None:
        for version in range(1, 8):
            write(topics, version)
        await asyncio.to_thread(run_until_killed, topics, "reindex", "after:commit:2")
        state = await registry(topics)
        assert sorted(state.versions) == [3, 5, 6, 7] and state.champion.version == 3, (
            "the champion comes first, then the newest"
        )
        done = await operations(topics).reindex("again")
        assert (done.lost, done.added, done.champion) == (False, (1, 2, 4), None)
        state = await registry(topics)
        assert sorted(state.versions) == list(range(1, 8)) and state.champion.version == 3
        assert len(state.champion.moves) == 1

    asyncio.run(run())


def test_two_at_once_make_one_registry(topics: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reindexing, "BATCH", 3)

    async def run() -> None:
        for version in range(1, 11):
            write(topics, version)
        one, two = operations(topics, "one").reindex("x", champion=4), operations(topics, "two").reindex("y", champion=5)
        first, second = await asyncio.gather(one, two)
        state = await registry(topics)
        assert sorted(state.versions) == list(range(1, 11))
        assert sorted((*first.added, *second.added)) == list(range(1, 11)), "each version was entered once"
        champions = [done.champion for done in (first, second) if done.champion is not None]
        assert champions == [state.champion.version] and len(state.champion.moves) == 1

    asyncio.run(run())


def test_what_cannot_be_read_is_named_and_the_rest_entered(topics: Settings) -> None:
    async def run() -> None:
        for version in (1, 2, 3):
            write(topics, version)
        (Path(topics.snapshots.url) / "v0000000002" / "manifest.json").write_bytes(b"{")
        done = await operations(topics).reindex("x", champion=3)
        assert done.added == (1, 3) and list(done.broken) == [2] and "expected a manifest, found 1 bytes" in done.broken[2]
        assert sorted((await registry(topics)).versions) == [1, 3]

    asyncio.run(run())


def test_a_registry_that_is_not_lost_is_only_completed(topics: Settings) -> None:
    """Records that went missing, and points of a chain that an older release dropped; never a version above the newest."""

    async def run() -> None:
        await announced(topics, (1,))
        for version in (2, 3):
            write(topics, version, **CHAIN)
        await announced(topics, (4,))
        write(topics, 5)
        writer = RegistryWriter(topics.kafka, TopicNames.of(topics.topics), who="older release")
        done = await operations(topics).reindex("x")
        assert (done.lost, done.added, done.repaired, done.champion) == (False, (2, 3), (), None)
        state = await registry(topics)
        assert sorted(state.versions) == [1, 2, 3, 4] and state.champion.version == 4 and not state.champion.hold
        assert (state.versions[3].chain, state.versions[3].deltas_offset) == ("deepfm/1/0", 9)
        await writer.close()

    asyncio.run(run())


def test_another_systems_store_is_refused(topics: Settings) -> None:
    async def run() -> None:
        await announced(topics, (1, 2))
        url = f"{topics.snapshots.url}-other"
        other = topics.model_copy(update={"snapshots": topics.snapshots.model_copy(update={"url": url})})
        with pytest.raises(RegistryError, match=r"expected versions to enter, found none\. Is snapshots\.url right\?"):
            await operations(other).reindex("x")
        for version in (1, 2, 3):
            write(other, version, epoch=5)
        with pytest.raises(RegistryError, match=r"found none of them\. .* Nothing was entered\."):
            await operations(other).reindex("x")
        assert sorted((await registry(topics)).versions) == [1, 2]
        assert SnapshotStore(other.snapshots).versions() == [1, 2, 3]

    asyncio.run(run())
