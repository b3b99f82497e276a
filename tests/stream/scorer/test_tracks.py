"""Which registries a scorer follows, when another track serves, and how a replica goes on when its track does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from state.registry import Champion, RegistryState
from state.tracks import MAIN, NUMBERS, Serving, Track
from stream.errors import NoAnswer
from stream.scorer import tracks as module
from stream.scorer.chain_follower import ChainFollower
from stream.scorer.following_metrics import FollowingMetrics
from stream.scorer.freshness import Freshness
from stream.scorer.tracks import Challenging, ServingView, TrackRegistries
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.names import TopicNames
from tests.stream.scorer.following_scene import Scorer, quick, scene
from tests.stream.scorer.made_up_chain import Log, Store, Trainer

__all__ = ["quick"]

NAMES = TopicNames.of(TopicSettings())


class Follower:
    """Stands in for `RegistryFollower`: reads what the test says, when the test says so."""

    every: dict[str, Follower]
    missing: set[str]

    def __init__(
        self, kafka: KafkaSettings, names: TopicNames, *, on_change: Callable[[RegistryState], None], look_ms: int
    ) -> None:
        self.state, self.position, self.caught_up_at, self.closed = RegistryState(), 0, 1.0, False
        self._on_change, self._topic = on_change, names.snapshots
        self.every[names.track] = self

    async def start(self) -> None:
        if self._topic in self.missing:
            raise NoAnswer("expected a topic, found none.")
        self._on_change(self.state)

    async def close(self) -> None:
        self.closed = True

    def tell(self, **changed: Any) -> None:
        self.position += 10
        for name, value in changed.items():
            setattr(self.state, name, value)
        self._on_change(self.state)


class Registries:
    """`TrackRegistries`, and what it has said."""

    def __init__(self) -> None:
        self.views: list[ServingView] = []
        self.shares: list[Challenging] = []
        self.it = TrackRegistries(KafkaSettings(), NAMES, on_change=self.views.append, on_shares=self._shares)

    def _shares(self, found: list[Challenging]) -> None:
        self.shares = found

    @property
    def main(self) -> Follower:
        return Follower.every[MAIN]

    def give(self, serving: str = MAIN, **shares: float) -> None:
        tracks = {
            name: Track(name=name, number=number, share=share)
            for number, (name, share) in enumerate(({MAIN: 0.0, "wide": 0.0, "deep": 0.0} | shares).items())
        }
        self.main.tell(tracks=tracks, serving=Serving(track=serving))

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def followers(monkeypatch: pytest.MonkeyPatch) -> None:
    Follower.every, Follower.missing = {}, set()
    monkeypatch.setattr(module, "RegistryFollower", Follower)
    monkeypatch.setattr(module, "RETRY_S", 0.001)


def registries(steps: Callable[[Registries], Awaitable[None]]) -> None:
    async def run() -> None:
        here = Registries()
        try:
            await steps(here)
        finally:
            await here.it.close()
        assert all(each.closed for each in Follower.every.values())

    asyncio.run(run())


def test_main_alone_is_as_before() -> None:
    async def steps(here: Registries) -> None:
        assert here.it.caught_up_at is None
        await here.it.start()
        here.main.tell(champion=Champion(version=3))
        assert [(view.track, view.position, view.main_position) for view in here.views] == [(MAIN, 0, 0), (MAIN, 10, 10)]
        assert here.views[-1].state.champion.version == 3 and not here.shares and list(Follower.every) == [MAIN]
        assert here.it.caught_up_at == 1.0

    registries(steps)


def test_another_track_serves_once_its_registry_is_read() -> None:
    async def steps(here: Registries) -> None:
        await here.it.start()
        Follower.missing.add("snapshots-wide")
        here.give("wide")
        await here.until(lambda: "wide" in Follower.every)
        assert {view.track for view in here.views} == {MAIN}, "main answers while the other can't be read"
        Follower.missing.clear()
        await here.until(lambda: here.views[-1].track == "wide")
        wide = Follower.every["wide"]
        wide.tell(champion=Champion(version=NUMBERS + 1))
        assert here.views[-1] == ServingView("wide", wide.state, 10, 10)
        here.main.tell(champion=Champion(version=4))
        assert here.views[-1] == ServingView("wide", wide.state, 10, 20), "what main's trainer does changes nothing"
        assert [here.it.track_of(version) for version in (4, NUMBERS + 1, 2 * NUMBERS + 5)] == [MAIN, "wide", "deep"]
        here.give(MAIN)
        assert here.views[-1].track == MAIN
        await here.until(lambda: wide.closed)

    registries(steps)


def test_a_scorer_that_starts_waits_for_the_track_that_serves() -> None:
    async def steps(here: Registries) -> None:
        here.main.state.tracks["wide"] = Track(name="wide", number=1)
        here.main.state.serving = Serving(track="wide")
        Follower.missing.add("snapshots-wide")
        await here.it.start()
        await here.until(lambda: "wide" in Follower.every)
        assert not here.views and here.it.caught_up_at is None
        Follower.missing.clear()
        await here.until(lambda: bool(here.views))
        assert here.views[0].track == "wide"

    registries(steps)


def test_tracks_with_a_share_are_followed_until_it_ends() -> None:
    async def steps(here: Registries) -> None:
        await here.it.start()
        here.give(wide=0.1, deep=0.2)
        await here.until(lambda: len(here.shares) == 2)
        assert [each.track.name for each in here.shares] == ["wide", "deep"]
        wide, deep = Follower.every["wide"], Follower.every["deep"]
        wide.tell(champion=Champion(version=NUMBERS + 2))
        assert here.shares[0].state.champion.version == NUMBERS + 2 and here.shares[0].position == 10
        here.give("wide", main=0.1, deep=0.2)
        assert [each.track.name for each in here.shares] == [MAIN, "deep"], "the former champion is followed beside"
        assert here.views[-1].track == "wide" and not wide.closed
        here.give("wide")
        await here.until(lambda: deep.closed)
        assert not here.shares and not wide.closed

    registries(steps)


def test_a_promoted_track_goes_on_with_the_replica_that_was_followed_beside() -> None:
    """Nothing is read from the store, and each delta is applied once, also those that came meanwhile."""

    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        wide = Trainer(Log(), chain=f"wide/{NUMBERS + 1}/0", line=NUMBERS + 1)
        wide.delta(3)
        wide.version(NUMBERS + 1)
        wide_store, opened = Store(wide), it.log
        beside = Scorer(wide, wide_store)
        beside.want(NUMBERS + 1)
        await beside.until_caught_up()
        replica = beside.follower.replica
        assert replica is not None
        beside.task.cancel()
        await asyncio.wait([beside.task])
        wide.delta(2)
        trainer.delta()

        it.follower._open_log = wide.log.open  # as `stream.scorer.run`, which opens the log of the track that serves
        it.trainer = wide
        it.swapper.applied = 0
        it.follower.moved(replica)
        answering = it.swapper.current
        it.want(NUMBERS + 1)
        assert it.swapper.current is answering, "the old track's weights answer until the new ones are there"
        await it.until(lambda: it.at == (wide.chain, 5))
        assert it.rows == wide.rows and it.swapper.current is replica.served
        assert it.read == [1] and it.swapper.is_following and it.swapper.applied == it.position
        wide.delta()
        await it.until(lambda: it.at == (wide.chain, 6))

        # And back: main's chain is read anew, although its epochs are smaller.
        it.follower._open_log, it.trainer = opened.open, trainer
        it.store.trainer = trainer
        it.follower.moved(None)
        it.want(1)
        await it.until_caught_up()
        assert it.read == [1, 1] and it.count("replica_loads_total", why="track") == 1
        await beside.swapper.close()
        beside.scoring.shutdown()

    scene(steps)


def test_an_adopted_replica_that_cannot_be_followed_does_not_stop_answers() -> None:
    async def steps(it: Scorer, trainer: Trainer, log: Log) -> None:
        follower: ChainFollower = it.follower
        assert follower.replica is not None and isinstance(follower._metrics, FollowingMetrics)
        assert isinstance(follower._freshness, Freshness)
        log.broken = OSError("no broker")
        follower.moved(follower.replica)
        await it.until(lambda: bool(follower.problem))
        assert it.at == (trainer.chain, 2)
        log.broken = None
        trainer.delta()
        await it.until_caught_up()

    scene(steps)
