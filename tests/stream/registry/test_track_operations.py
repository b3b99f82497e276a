"""Operations on tracks with Kafka: what they refuse, whom they wait for, and that registries of tracks are apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from deploy.settings import Settings
from state.comparison import Comparison
from state.errors import SnapshotError
from state.store import SnapshotStore
from state.tracks import MAIN, NUMBERS
from stream.errors import RegistryError
from stream.records.heartbeat import ShadowBeat
from stream.registry.heartbeat import HeartbeatReader, HeartbeatSender
from stream.registry.log import read_registry
from stream.registry.track_operations import TrackOperations
from stream.registry.tracks import registered_track
from stream.registry.writer import RegistryWriter
from stream.topics.admin import create_topics
from stream.topics.names import TopicNames
from tests.stream.registry.versions import GATE, announced, operations, write

pytestmark = pytest.mark.kafka


class Here:
    """A system with version 1 on `main`, and the topics of a challenger."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.names = TopicNames.of(settings.topics)
        self.wide = self.names.of_track("wide")
        self.on_wide = settings.model_copy(update={"snapshots": settings.snapshots.on_track("wide")})
        self.it = TrackOperations(settings.kafka, self.names, "me", snapshots=settings.snapshots)

    async def announce(self, *numbers: int) -> None:
        """Versions of the challenger, by its first trainer."""
        track = await registered_track(self.settings.kafka, self.wide, "trainer")
        writer = RegistryWriter(self.settings.kafka, self.wide, who="trainer")
        epoch = await writer.take_trainer_epoch(above=track.first_number)
        for number in numbers:
            await writer.announce(write(self.on_wide, number, epoch=epoch), gate=GATE)
        await writer.note_comparison(Comparison(of="x/", against=MAIN, impressions=3.0, clicks=1.0))
        await writer.close()


@asynccontextmanager
async def a_scorer(here: Here) -> AsyncIterator[HeartbeatSender]:
    sender = HeartbeatSender(here.settings.kafka, here.names, worker="s1")
    await sender.start()
    try:
        yield sender
    finally:
        await sender.close()


def test_a_challenger_is_promoted_once_it_can_be_and_confirmed_by_every_scorer(topics: Settings) -> None:
    create_topics(topics.kafka, topics.topics, track="wide")

    async def run() -> None:
        here = Here(topics)
        await announced(topics, [1])
        with pytest.raises(RegistryError, match="expected one of main, found none"):
            await here.it.promote("wide", "why", timeout_ms=100)
        await here.announce()
        with pytest.raises(RegistryError, match="expected a version that its gate has let through, found none"):
            await here.it.promote("wide", "why", timeout_ms=100)
        await here.announce(NUMBERS + 1, NUMBERS + 2)
        seen = await here.it.look()
        assert [track.name for track in seen.tracks] == [MAIN, "wide"] and set(seen.states) == {MAIN, "wide"}
        assert seen.states["wide"].champion.version == NUMBERS + 2 and seen.states[MAIN].champion.version == 1
        assert seen.states["wide"].comparison.clicks == 1 and not seen.states["wide"].tracks
        assert seen.states["wide"].trainer.epoch == NUMBERS + 2 and seen.states[MAIN].trainer.epoch == 1
        assert SnapshotStore(topics.snapshots).versions() == [1], "the stores are apart"

        store = SnapshotStore(here.on_wide.snapshots)
        store.delete(NUMBERS + 2)
        with pytest.raises(SnapshotError):
            await here.it.plan_promotion("wide", "why")
        write(here.on_wide, NUMBERS + 2, epoch=NUMBERS + 2)
        plan = await here.it.plan_promotion("wide", "why")
        assert (plan.version, plan.promoted.previous, plan.live) == (NUMBERS + 2, MAIN, [])
        assert (await read_registry(topics.kafka, here.names)).serving.track == MAIN

        async with a_scorer(here) as scorer:
            await scorer.send(1, 0, 10, main_offset=10)
            done = await here.it.promote("wide", "why", timeout_ms=200)
            assert done.confirmed == [] and [beat.worker for beat in done.unconfirmed] == ["s1"]
            state = await read_registry(topics.kafka, here.names)
            assert state.serving.track == "wide" and state.champion.version == 1, "main's own champion stays"
            back = asyncio.ensure_future(here.it.promote(MAIN, "back", timeout_ms=30_000))
            while (await read_registry(topics.kafka, here.names)).serving.track != MAIN:
                await asyncio.sleep(0.01)
            await scorer.send(NUMBERS + 2, 0, 10, track="wide", main_offset=1_000)
            await scorer.send(1, 0, 10, track=MAIN)  # its offset is of before
            await scorer.send(1, 0, 10, track=MAIN, main_offset=1_000)
            assert (await back).confirmed == ["s1"]
            assert (await operations(topics).look()).live[0].worker == "s1"
            async with HeartbeatReader(topics.kafka, here.wide) as beats:
                assert await beats.live() == [], "who answers with main is no scorer of wide"

    asyncio.run(run())


def test_the_end_of_a_share_waits_for_the_scorers(topics: Settings) -> None:
    create_topics(topics.kafka, topics.topics, track="wide")

    async def run() -> None:
        here = Here(topics)
        await here.announce()
        begun = await here.it.share("wide", 0.1, "why", timeout_ms=100)
        assert begun.shared.track.share == 0.1 and begun.unconfirmed == []
        async with a_scorer(here) as scorer:
            await scorer.send(1, 0, 10, shadows=(ShadowBeat("wide", NUMBERS + 1),))
            ended = await here.it.share("wide", 0.0, "enough", timeout_ms=200)
            assert [beat.worker for beat in ended.unconfirmed] == ["s1"]
            assert (await here.it.share("wide", 0.0, "enough", timeout_ms=200)).shared.undo is None
            await here.it.share("wide", 0.2, "again", timeout_ms=100)
            await scorer.send(1, 0, 10)
            ended = await here.it.share("wide", 0.0, "enough", timeout_ms=30_000)
            assert ended.confirmed == ["s1"] and ended.shared.track.share_reason == "enough"

    asyncio.run(run())
