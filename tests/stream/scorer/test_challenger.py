"""The tracks beside: they follow their own chains, need room, end with their share, and hand over their replica."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from state.registry import RegistryState, VersionRecord
from state.tracks import NUMBERS, Track
from stream.scorer import challenger as module
from stream.scorer.candidate import NoRoom
from stream.scorer.challenger import Challengers
from stream.scorer.challenger_metrics import ChallengerMetrics
from stream.scorer.serving import Served
from stream.scorer.tracks import Challenging
from tests.stream.scorer.following_scene import quick
from tests.stream.scorer.made_up_chain import Log, Store, Trainer

__all__ = ["quick"]

SIZE = 10  # bytes that made-up weights say they have


class Beside:
    """`Challengers` over made-up chains, one for each track."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spare, self.changes = 100, 0
        self.trainers = {
            name: Trainer(Log(), chain=f"{name}/{number * NUMBERS + 1}/0", line=number * NUMBERS + 1)
            for number, name in enumerate(("wide", "deep"), 1)
        }
        self.scoring = ThreadPoolExecutor(1, "scoring")
        self.prometheus = CollectorRegistry()
        monkeypatch.setattr(module, "load_candidate", self._load)
        monkeypatch.setattr(module, "JITTER_S", 0.0)
        store_of: Any = lambda name: SimpleNamespace(name=name, has=lambda record: False)  # noqa: E731
        self.it = Challengers(
            store_of,
            lambda name, offset: self.trainers[name].log.open(offset),
            self._alone,
            ChallengerMetrics(self.prometheus),
            device="cpu",
            room=lambda: self.spare - self.it.size,
            on_change=self._changed,
        )
        for number, trainer in enumerate(self.trainers.values(), 1):
            trainer.delta(2)
            trainer.version(number * NUMBERS + 1)

    def _load(self, store: Any, record: VersionRecord, *, device: str, spare_bytes: int, taken_bytes: int) -> Served:
        if spare_bytes - taken_bytes < SIZE:
            raise NoRoom(f"version {record.version}: expected room, found {spare_bytes - taken_bytes}.")
        served = Store(self.trainers[store.name]).load(record.version)
        served.size = SIZE
        return served

    async def _alone(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self.scoring, work)

    def _changed(self) -> None:
        self.changes += 1

    def want(self, *names: str, hold: bool = False) -> None:
        found = []
        for number, (name, trainer) in enumerate(self.trainers.items(), 1):
            track = Track(name=name, number=number, share=0.1, share_from=0.1 * number)
            found.append(Challenging(track, trainer.registry(number * NUMBERS + 1, hold=hold), 10))
        self.it.want([each for each in found if each.track.name in names])

    def at(self, name: str) -> Any:
        """Sequence and rows of a track whose chain is followed."""
        found: list[Any] = [each.served for each in self.it.shadows if each.track == name]
        return (found[0].state.point.sequence, found[0].predictor.rows) if found and found[0].state.point else None

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0.002)


def scene(monkeypatch: pytest.MonkeyPatch, steps: Callable[[Beside], Awaitable[None]]) -> None:
    async def run() -> None:
        here = Beside(monkeypatch)
        try:
            await steps(here)
        finally:
            await here.it.close()
            here.scoring.shutdown()

    asyncio.run(run())


def test_two_challengers_follow_their_own_chains_until_their_shares_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(here: Beside) -> None:
        wide, deep = here.trainers.values()
        here.want("wide", "deep")
        assert [each.problem for each in here.it.beats(0)] == ["it has no champion yet, or reads it"] * 2
        await here.until(lambda: here.at("wide") is not None and here.at("deep") is not None)
        wide.delta(3)
        await here.until(lambda: here.at("wide") == (5, wide.rows))
        assert here.at("deep") == (2, deep.rows) and here.it.size == 2 * SIZE
        assert [each.interval for each in here.it.shadows] == [(0.1, 0.2), (0.2, pytest.approx(0.3))]
        beats = {each.track: each for each in here.it.beats(9_000)}
        assert (beats["wide"].version, beats["wide"].delta, beats["wide"].weights_age_ms) == (NUMBERS + 1, 3, 4_000)
        assert beats["wide"].problem == "" and here.changes
        assert here.prometheus.get_sample_value("headrace_scorer_challenger_ready", {"track": "deep"}) == 1
        here.want("wide")
        assert [each.track for each in here.it.shadows] == ["wide"] and here.it.size == SIZE
        assert here.prometheus.get_sample_value("headrace_scorer_challenger_ready", {"track": "deep"}) is None

    scene(monkeypatch, steps)


def test_without_room_it_takes_no_part_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(here: Beside) -> None:
        here.spare = SIZE
        here.want("wide")
        await here.until(lambda: here.at("wide") is not None)
        here.want("wide", "deep")
        await here.until(lambda: "expected room, found 0" in here.it.beats(0)[1].problem)
        assert [each.track for each in here.it.shadows] == ["wide"]
        here.spare = 2 * SIZE
        await here.until(lambda: here.at("deep") is not None)
        assert [each.problem for each in here.it.beats(0)] == ["", ""]

    scene(monkeypatch, steps)


def test_a_pinned_champion_is_scored_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(here: Beside) -> None:
        trainer = here.trainers["wide"]
        trainer.delta()
        here.want("wide", hold=True)
        await here.until(lambda: bool(here.it.shadows))
        (shadow,) = here.it.shadows
        assert shadow.served.version == NUMBERS + 1 and not shadow.served.is_replica

    scene(monkeypatch, steps)


def test_damaged_memory_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(here: Beside) -> None:
        here.want("wide")
        await here.until(lambda: here.at("wide") is not None)
        broken = here.it.shadows[0].served
        assert here.it.damaged(broken) and not here.it.damaged(Store(here.trainers["wide"]).load(NUMBERS + 1))
        await here.until(lambda: here.at("wide") is not None and here.it.shadows[0].served is not broken)

    scene(monkeypatch, steps)


def test_a_track_that_serves_takes_its_replica_along(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(here: Beside) -> None:
        here.want("wide", "deep")
        assert here.it.take("wide") is None, "it isn't ready"
        assert here.it.take("nobody") is None
        await here.until(lambda: here.at("deep") is not None)
        replica = here.it.take("deep")
        assert replica is not None and replica.progress.point.sequence == 2
        assert here.it.shadows == [] and here.it.size == 0
        here.trainers["deep"].delta()
        here.want()
        assert replica.progress.point.sequence == 2, "nobody applies deltas to it any more"

    scene(monkeypatch, steps)


def test_without_a_champion_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(here: Beside) -> None:
        here.it.want([Challenging(Track(name="wide", number=1, share=0.1), RegistryState(), 0)])
        assert here.it.shadows == [] and "no champion yet" in here.it.beats(0)[0].problem

    scene(monkeypatch, steps)
