"""Clicks are counted once, when the first answer by weights that know them is acknowledged, and not before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from stream.kafka.transport import Run
from stream.scorer.answering import Answering
from stream.scorer.following_metrics import FollowingMetrics
from stream.scorer.freshness import MAX_WAITING, Freshness
from stream.scorer.metrics import ScorerMetrics
from tests.stream.scorer.factory import MAX_BYTES, never_stood_still, record, records, served


class Bench:
    """`Answering` over brokers that acknowledge when they are allowed to."""

    def __init__(self) -> None:
        self.prometheus = CollectorRegistry()
        self.freshness = Freshness(FollowingMetrics(self.prometheus).click_to_answer.observe)
        self.weights = served(7)
        self.weights.is_replica = True
        self.swapper: Any = SimpleNamespace(current=self.weights)
        self.acknowledged = asyncio.Event()
        self.sent = 0
        outbox: Any = SimpleNamespace(send=self._send)
        self.scoring = ThreadPoolExecutor(1)
        no_candidate: Any = SimpleNamespace(trial=None)
        no_challengers: Any = SimpleNamespace(shadows=())
        self.answering = Answering(
            self.swapper,
            no_candidate,
            no_challengers,
            outbox,
            ScorerMetrics(self.prometheus),
            self.freshness,
            never_stood_still(),
            scoring=self.scoring,
            worker_id="w",
            stale=lambda: False,
            max_candidates=10,
            max_bytes=MAX_BYTES,
        )
        self.answering.assign({0: 0})
        self._offset = 0
        self._tasks = [asyncio.ensure_future(work) for work in (self.answering.score_all(), self.answering.send_all())]

    async def _send(self, answers: Any) -> list[Any]:
        self.sent += 1
        return [asyncio.ensure_future(self.acknowledged.wait())]

    async def ask(self, *found: Any) -> None:
        before, self._offset = self._offset, self._offset + len(found)
        for offset, each in enumerate(found, before):
            each.offset = offset
        await self.answering.put(Run("score-requests", 0, before, self._offset, list(found)))

    @property
    def counted(self) -> tuple[float, float]:
        """Clicks counted, and the sum of their times in seconds."""
        name = "headrace_scorer_click_to_answer_seconds"
        count, total = (self.prometheus.get_sample_value(f"{name}_{each}") for each in ("count", "sum"))
        assert count is not None and total is not None
        return count, total

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0.002)

    async def answered(self, *found: Any) -> None:
        self.acknowledged.set()
        await self.ask(*found)
        await self.until(lambda: self.answering.answered[0] == self._offset)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self.scoring.shutdown()


def test_clicks_are_counted_once_and_with_the_time_since_their_arrival():
    async def play() -> None:
        bench = Bench()
        arrived_ms = time.time_ns() // 1_000_000 - 5_000
        bench.freshness.learned([arrived_ms, arrived_ms + 1_000])
        assert bench.counted == (0, 0)
        await bench.answered(*records(["a", "b"]))
        count, total = bench.counted
        assert count == 2
        latest_s = (time.time_ns() // 1_000_000 - arrived_ms) / 1_000
        assert 9 <= total <= 2 * latest_s - 1
        await bench.answered(*records(["c"]))
        assert bench.counted == (2, total)
        await bench.close()

    asyncio.run(play())


def test_a_batch_that_was_scored_before_does_not_count_for_a_later_delta():
    async def play() -> None:
        bench = Bench()
        await bench.ask(*records(["before"]))
        await bench.until(lambda: bench.sent == 1)  # scored, and on its way to the brokers
        bench.freshness.learned([1])
        bench.acknowledged.set()
        await bench.until(lambda: bench.answering.answered[0] == 1)
        assert bench.counted[0] == 0
        await bench.answered(*records(["after"]))
        assert bench.counted[0] == 1
        await bench.close()

    asyncio.run(play())


def test_only_answers_with_scores_count():
    async def play() -> None:
        bench = Bench()
        bench.freshness.learned([1])
        await bench.answered(record(b"{", b"broken"))
        assert bench.counted[0] == 0
        await bench.answered(*records(["a"]))
        assert bench.counted[0] == 1
        await bench.close()

    asyncio.run(play())


def test_what_a_pinned_version_keeps_from_answers_is_left_out():
    async def play() -> None:
        bench = Bench()
        bench.freshness.learned([1])
        bench.swapper.current = served(3)
        await bench.answered(*records(["a"]))
        bench.swapper.current = bench.weights
        bench.freshness.learned([2])
        await bench.answered(*records(["b"]))
        assert bench.counted[0] == 1
        await bench.close()

    asyncio.run(play())


def test_without_requests_only_the_newest_wait():
    freshness = Freshness(lambda seconds: None)
    freshness.learned(range(MAX_WAITING + 10))
    assert list(freshness.take()) == list(range(10, MAX_WAITING + 10))
    assert list(freshness.take()) == []
