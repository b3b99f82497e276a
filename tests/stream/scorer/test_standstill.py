"""A process that stood still answers nothing by what it knew before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError
from prometheus_client import CollectorRegistry

from deploy.settings import Settings
from state.registry import RegistryState
from stream.kafka.transport import Run
from stream.records.heartbeat import live_limit
from stream.registry.follower import RegistryFollower
from stream.registry.writer import RegistryWriter
from stream.scorer.answering import Answering
from stream.scorer.freshness import Freshness
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.standstill import Standstill, limit_s
from stream.topics.names import TopicNames
from tests.stream.registry.test_operations import three_versions
from tests.stream.scorer.factory import MAX_BYTES, record, records, request, served

LIMIT_S = limit_s(live_limit(1_000), 1_000)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def standstill(read: Callable[[], Awaitable[None]], clock: Clock) -> Standstill:
    return Standstill(read, limit_s=LIMIT_S, patience_s=0.2, now_s=clock)


def test_the_registry_is_read_once_after_a_standstill_and_not_without_one() -> None:
    async def run() -> None:
        clock, reads, go_on = Clock(), list[float](), asyncio.Event()

        async def read() -> None:
            reads.append(clock.now_s)
            await go_on.wait()

        at = Standstill(read, limit_s=LIMIT_S, patience_s=30.0, now_s=clock)
        for _ in range(10):
            clock.now_s += 1.0
            at.reported(at.look())
            await at.over()
        assert (reads, at.count) == ([], 0)
        assert live_limit(1_000) / 1_000 > LIMIT_S, "a rollback waits for longer than this is believed"
        clock.now_s += LIMIT_S + 0.1
        at.reported(at.look())  # a heartbeat after it doesn't hide it
        waiting = [asyncio.ensure_future(at.over()) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (len(reads), at.count, [each.done() for each in waiting]) == (1, 1, [False, False])
        go_on.set()
        await asyncio.gather(*waiting)
        await at.over()
        assert (len(reads), at.count) == (1, 1)

    asyncio.run(run())


def test_a_scorer_that_cannot_read_the_registry_answers_on(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        clock, tries = Clock(), list[int]()

        async def read() -> None:
            tries.append(1)
            if len(tries) == 1:
                raise KafkaConnectionError("away")
            await asyncio.Event().wait()

        at = standstill(read, clock)
        for count in (1, 2):
            clock.now_s += LIMIT_S + 1
            await at.over()
            await at.over()
            assert len(tries) == count, "requests don't wait for it again at once"
        assert "the registry can't be read, answering on as it was known" in caplog.text

    asyncio.run(run())


def test_what_was_computed_before_a_standstill_is_computed_again() -> None:
    """The process stops once a batch is scored, before it is sent. A rollback comes meanwhile."""

    async def run() -> None:
        clock, sent = Clock(), list[Any]()
        swapper: Any = SimpleNamespace(current=served(7))

        async def read() -> None:
            swapper.current = served(3)  # the version that was put back

        async def send(answers: Any) -> list[Any]:
            sent.append(answers)
            return []

        at = standstill(read, clock)
        metrics = ScorerMetrics(CollectorRegistry())
        scoring = ThreadPoolExecutor(1)
        outbox: Any = SimpleNamespace(send=send)
        no_candidate: Any = SimpleNamespace(trial=None)
        no_challengers: Any = SimpleNamespace(shadows=())
        answering = Answering(
            swapper,
            no_candidate,
            no_challengers,
            outbox,
            metrics,
            Freshness(lambda seconds: None),
            at,
            scoring=scoring,
            worker_id="w",
            stale=lambda: False,
            max_candidates=10,
            max_bytes=MAX_BYTES,
        )
        answering.assign({0: 0})
        scorer = asyncio.ensure_future(answering.score_all())
        await answering.put(Run("score-requests", 0, 0, 2, records(["a", "b"])))
        async with asyncio.timeout(20):
            while not answering._scored.qsize():
                await asyncio.sleep(0.01)
        clock.now_s += LIMIT_S + 1
        sender = asyncio.ensure_future(answering.send_all())
        async with asyncio.timeout(20):
            await answering.all_answered(20)
        assert [(each.outcomes["scored"], versions(each)) for each in sent] == [(2, {3})]
        await answering.put(Run("score-requests", 0, 2, 3, [record(request("c"), b"c", 2)]))
        await answering.all_answered(20)
        assert [versions(each) for each in sent] == [{3}, {3}] and at.count == 1
        for task in (scorer, sender):
            task.cancel()
        await asyncio.gather(scorer, sender, return_exceptions=True)
        scoring.shutdown()

    asyncio.run(run())


def versions(answers: Any) -> set[int]:
    """The versions that answers name."""
    import json

    return {json.loads(value)["model_version"] for _, value, _ in answers.records}


@pytest.mark.kafka
def test_the_registry_is_read_to_what_is_there_now(topics: Settings) -> None:
    """`on_change` has been called with a rollback that was written just before."""

    async def run() -> None:
        names = TopicNames.of(topics.topics)
        await three_versions(topics)
        seen: list[int | None] = []

        def on_change(state: RegistryState) -> None:
            seen.append(state.champion.version)

        follower = RegistryFollower(topics.kafka, names, on_change=on_change)
        await follower.start()
        writer = RegistryWriter(topics.kafka, names, who="operator")
        for version in (2, 1):
            await writer.rollback(version, "bad")
            await follower.read_to_end()
            assert seen[-1] == version
        count = len(seen)
        await follower.read_to_end()
        assert len(seen) == count, "nothing new, and no wait for it"
        await writer.close()
        await follower.close()

    asyncio.run(run())
