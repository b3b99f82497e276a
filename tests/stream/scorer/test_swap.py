"""Which version answers: always one, whole, and soon the one wanted."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from state.registry import Champion, RegistryState, VersionRange, VersionRecord
from stream.scorer import swap
from stream.scorer.answers import answer_requests
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.serving import Served
from stream.scorer.swap import Swapper
from tests.stream.scorer.factory import MAX_BYTES, records, served


def registry(version: int | None, *, rolled_back: Iterable[tuple[int, int]] = (), good: Iterable[int] = ()) -> RegistryState:
    return RegistryState(
        versions={number: VersionRecord(version=number, good_at_ms=1) for number in good},
        champion=Champion(version=version, rolled_back=tuple(VersionRange(*each) for each in rolled_back)),
    )


class Store:
    """Loads versions when it is told to."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.held: dict[int, threading.Event] = {}
        self.broken: set[int] = set()

    def hold(self, version: int) -> threading.Event:
        self.held[version] = threading.Event()
        return self.held[version]

    def load(self, version: int) -> Served:
        self.asked.append(version)
        if version in self.held:
            assert self.held[version].wait(10)
        if version in self.broken:
            raise RuntimeError(f"version {version} is broken")
        return served(version)


class Serving:
    """A swapper over such a store, and what it has served."""

    def __init__(self, keep: int = 3) -> None:
        self.store = Store()
        self.prometheus = CollectorRegistry()
        self.swapper = Swapper(self.store.load, ScorerMetrics(self.prometheus), keep=keep)
        self.position = 0

    @property
    def version(self) -> int | None:
        return None if self.swapper.current is None else self.swapper.current.version

    def want(self, version: int | None, **more: Any) -> None:
        self.position += 10
        self.swapper.want(registry(version, **more), self.position)

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0.002)

    async def serve(self, version: int, **more: Any) -> None:
        self.want(version, **more)
        await self.until(lambda: self.version == version)

    def gauge(self, name: str) -> float | None:
        return self.prometheus.get_sample_value(f"headrace_scorer_{name}")

    def count(self, name: str) -> float:
        return self.prometheus.get_sample_value(f"headrace_scorer_{name}_total") or 0.0


def test_the_version_wanted_is_loaded_and_served() -> None:
    async def run() -> None:
        it = Serving()
        it.want(None)
        assert it.version is None and it.swapper.applied == 10
        release = it.store.hold(1)
        it.want(1)
        await asyncio.sleep(0.05)
        assert it.version is None and it.swapper.applied == 10, "not in effect until the swap"
        release.set()
        await it.until(lambda: it.version == 1)
        assert it.swapper.applied == 20 and it.swapper.changed.is_set() and it.swapper.since_ms > 0
        it.swapper.changed.clear()
        it.want(1)  # a hold, or a candidate: other news
        assert it.swapper.applied == 30 and it.swapper.changed.is_set()
        assert it.store.asked == [1] and it.count("swaps") == 1
        assert it.prometheus.get_sample_value("headrace_scorer_model_version") == 1

    asyncio.run(run())


def test_a_start_waits_for_the_first_version_or_its_failure() -> None:
    async def run() -> None:
        it = Serving()
        it.want(None)
        await it.swapper.first_load_ended()  # nothing to wait for
        it.want(1)
        await it.swapper.first_load_ended()
        assert it.version == 1
        it.store.broken.add(2)
        it.want(2)
        await it.swapper.first_load_ended()
        assert it.version == 1 and it.count("swap_failures") == 1

    asyncio.run(run())


def test_a_registry_without_a_champion_leaves_the_version_alone() -> None:
    async def run() -> None:
        it = Serving()
        await it.serve(1)
        it.want(None)
        assert it.version == 1 and it.swapper.applied == 20

    asyncio.run(run())


def test_going_back_costs_no_download_and_waits_for_none() -> None:
    async def run() -> None:
        it = Serving()
        for version in (1, 2):
            await it.serve(version)
        release = it.store.hold(3)
        it.want(3)
        await it.until(lambda: 3 in it.store.asked)
        it.want(1, rolled_back=[(1, 3)])  # while version 3 is loading
        assert it.version == 1 and it.swapper.applied == it.position, "at once"
        release.set()
        await asyncio.sleep(0.05)
        assert it.version == 1, "what was loading is no longer wanted"
        assert it.store.asked == [1, 2, 3]

    asyncio.run(run())


def test_what_is_kept_ready_is_checked_too() -> None:
    """A bit that flips in a version that a rollback goes to is found before it answers."""

    async def run() -> None:
        it = Serving(keep=2)
        await it.serve(1)
        kept = it.swapper.current
        await it.serve(2)
        assert kept is not None and kept is not it.swapper.current
        assert it.swapper.in_memory == [kept, it.swapper.current]
        it.swapper.reload(kept)
        assert it.swapper.in_memory == [it.swapper.current]
        await it.serve(1)
        assert it.swapper.current is not kept and it.swapper.current is not None and it.swapper.current.version == 1

    asyncio.run(run())


def test_going_back_to_a_version_that_is_not_ready_does_not_wait_for_another_download() -> None:
    async def run() -> None:
        it = Serving(keep=1)
        for version in (1, 2):
            await it.serve(version)
        release = it.store.hold(3)
        it.want(3)
        await it.until(lambda: 3 in it.store.asked)
        await it.serve(1, rolled_back=[(1, 3)])
        assert it.store.asked == [1, 2, 3, 1]
        release.set()
        await it.swapper.close()

    asyncio.run(run())


def test_when_versions_come_faster_than_they_load_it_still_moves_on() -> None:
    async def run() -> None:
        it = Serving()
        await it.serve(1)
        release = it.store.hold(2)
        it.want(2)
        for version in (3, 4, 5):
            it.want(version)
        await asyncio.sleep(0.05)
        assert it.store.asked == [1, 2], "one at a time"
        last = it.store.hold(5)
        release.set()
        await it.until(lambda: it.version == 2)
        assert it.swapper.applied < it.position, "on the way, not there"
        last.set()
        await it.until(lambda: it.version == 5)
        assert it.store.asked == [1, 2, 5] and it.swapper.applied == it.position

    asyncio.run(run())


def test_a_version_rolled_back_from_is_not_served_on_the_way() -> None:
    async def run() -> None:
        it = Serving()
        await it.serve(1)
        release = it.store.hold(2)
        it.want(2)
        await it.until(lambda: 2 in it.store.asked)
        it.want(1, rolled_back=[(1, 2)])
        it.want(3, rolled_back=[(1, 2)])
        release.set()
        await it.until(lambda: it.version == 3)
        assert it.count("swaps") == 2, "1, then 3"

    asyncio.run(run())


def test_a_broken_version_leaves_the_old_one_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(swap, "RETRY_S", 0.01)
    monkeypatch.setattr(swap, "MAX_RETRY_S", 0.02)

    async def run() -> None:
        it = Serving()
        await it.serve(1)
        it.store.broken.add(2)
        it.want(2)
        await it.until(lambda: it.store.asked.count(2) >= 3)
        assert it.version == 1 and it.swapper.applied == 10 and it.count("swap_failures") >= 2
        it.store.broken.clear()
        await it.until(lambda: it.version == 2)
        assert it.swapper.applied == 20

    asyncio.run(run())
    assert (
        caplog.messages[0] == "version 2 can't be served, going on with version 1, trying again in 0.01 s: version 2 is broken"
    )


def test_a_start_with_an_unreadable_champion_falls_back_to_the_newest_good_version(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(swap, "RETRY_S", 0.01)
    monkeypatch.setattr(swap, "MAX_RETRY_S", 0.02)

    async def run() -> None:
        it = Serving()
        it.store.broken |= {5, 9}
        it.want(9, good=[1, 2, 3, 5, 7], rolled_back=[(5, 7)])
        await it.until(lambda: it.version == 3)
        assert it.swapper.fallback == (9, "version 9 is broken") and it.gauge("fallback") == 1
        assert (it.gauge("champion_version"), it.gauge("model_version")) == (9, 3)
        assert it.swapper.applied == 0, "what the registry asks for is not in effect"
        assert not {1, 2, 7} & set(it.store.asked), "7 was rolled back from, and one that answers is enough"
        it.store.broken.clear()
        await it.until(lambda: it.version == 9)
        assert it.swapper.fallback is None and it.gauge("fallback") == 0 and it.swapper.applied == 10

    asyncio.run(run())
    assert "serving version 3 instead of the champion, version 9: version 9 is broken" in caplog.messages


def test_a_version_that_was_rolled_back_from_does_not_go_on_where_the_target_is_broken() -> None:
    async def run() -> None:
        it = Serving()
        await it.serve(4)
        it.store.broken.add(3)
        it.want(3, rolled_back=[(3, 4)], good=[1, 2, 3])
        await it.until(lambda: it.version == 2)
        assert it.swapper.fallback == (3, "version 3 is broken")
        await it.swapper.close()

    asyncio.run(run())


def test_a_store_out_of_reach_is_not_asked_for_every_good_version() -> None:
    async def run() -> None:
        it = Serving()
        it.store.broken |= set(range(101))
        it.want(100, good=range(100))
        await it.until(lambda: it.count("swap_failures") >= 1 + swap.MAX_FALLBACKS)
        await asyncio.sleep(0.05)
        assert it.version is None and it.swapper.fallback == (100, "version 100 is broken")
        assert set(it.store.asked) == {100, *range(95, 100)} and not it.swapper.has_version.is_set()
        it.store.broken.clear()
        await it.until(lambda: it.version == 100)
        assert it.swapper.has_version.is_set()

    asyncio.run(run())


def test_without_a_good_version_nothing_answers_in_the_champions_place() -> None:
    async def run() -> None:
        it = Serving()
        it.store.broken.add(2)
        it.want(2)
        await it.until(lambda: it.count("swap_failures") == 1)
        assert it.version is None and it.swapper.fallback == (2, "version 2 is broken")
        it.want(3)  # the next champion is tried at once
        await it.until(lambda: it.version == 3)
        assert it.swapper.fallback is None

    asyncio.run(run())


def test_news_need_not_wait_for_a_broken_version() -> None:
    async def run() -> None:
        it = Serving()
        await it.serve(1)
        it.store.broken.add(2)
        it.want(2)
        await it.until(lambda: it.count("swap_failures") == 1)
        it.want(2)  # no news of another version: the wait goes on
        await asyncio.sleep(0.05)
        assert it.store.asked == [1, 2]
        await it.serve(3)
        await it.swapper.close()

    asyncio.run(run())


def test_kept_are_the_last_champions_and_the_target_of_a_rollback() -> None:
    async def run() -> None:
        it = Serving(keep=2)
        for version in (1, 2, 3, 4, 5):
            await it.serve(version, good=[1])
        it.store.asked.clear()
        await it.serve(1, good=[1])
        await it.serve(4, good=[1])
        assert it.store.asked == [4], "1 was kept as the target; 4 fell out when 5 and 1 were the last two"
        await it.serve(2)
        await it.serve(4)
        assert it.store.asked == [4, 2]

    asyncio.run(run())


def test_no_answer_mixes_versions() -> None:
    """Batches are scored in threads while versions are swapped as fast as they can be."""
    batch = records([f"r{index}" for index in range(8)], candidates=6)

    def score(version: Served | None) -> list[dict[str, Any]]:
        answers = answer_requests(batch, version, worker="w", max_candidates=10, max_bytes=MAX_BYTES)
        assert len(answers.records) == len(batch)
        return [json.loads(value or b"") for _, value, _ in answers.records]

    async def run() -> None:
        it = Serving(keep=2)
        await it.serve(1)
        stop = asyncio.Event()

        async def swapping() -> None:
            version = 1
            while not stop.is_set():
                version = version % 900 + 1
                await it.serve(version)

        swaps = asyncio.ensure_future(swapping())
        seen: set[int] = set()
        for _ in range(300):
            answers = await asyncio.to_thread(score, it.swapper.current)
            versions = {answer["model_version"] for answer in answers}
            assert len(versions) == 1
            (version,) = versions
            scores = [score["score"] for answer in answers for score in answer["scores"]]
            assert scores == pytest.approx([version / 1000] * 48, abs=1e-6)
            seen.add(version)
        stop.set()
        await swaps
        assert len(seen) > 20, "the test must swap in between"

    asyncio.run(run())
