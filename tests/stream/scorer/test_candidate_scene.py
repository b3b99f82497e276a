"""A scorer without Kafka: requests flow while a candidate comes, is damaged, goes and is rolled back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from state.canary import Canary, Mode
from state.registry import Champion, Move, RegistryState, VersionRange, VersionRecord
from stream.kafka.transport import Run
from stream.scorer import candidate as module
from stream.scorer.answering import Answering
from stream.scorer.answers import Answers
from stream.scorer.candidate import CandidateKeeper
from stream.scorer.candidate_metrics import CandidateMetrics
from stream.scorer.freshness import Freshness
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.serving import Served
from stream.scorer.trial import in_share
from tests.stream.scorer.factory import MAX_BYTES, never_stood_still, record, request, served

CHAMPION, CANDIDATE = 7, 9
SHARE = 0.5


class Broken:
    """A predictor whose weights were damaged."""

    def predict(self, batch: object) -> None:
        raise RuntimeError("damaged")


class Scorer:
    """Answering and a keeper, wired as `stream.scorer.run` does."""

    def __init__(self) -> None:
        self.broken = False
        self.answers: list[dict[str, Any]] = []
        self.known_ms: list[float] = []
        metrics = CollectorRegistry()
        champion = served(CHAMPION)
        champion.is_replica = True
        self.keeper = CandidateKeeper(self._load, CandidateMetrics(metrics), on_change=lambda: None)
        self.freshness = Freshness(self.known_ms.append)
        swapper: Any = SimpleNamespace(current=champion)
        outbox: Any = self
        no_challengers: Any = SimpleNamespace(shadows=())
        self.answering = Answering(
            swapper,
            self.keeper,
            no_challengers,
            outbox,
            ScorerMetrics(metrics),
            self.freshness,
            never_stood_still(),
            scoring=ThreadPoolExecutor(1),
            worker_id="w",
            stale=lambda: False,
            max_candidates=10,
            max_bytes=MAX_BYTES,
        )
        self.answering.assign({0: 0})
        self.sent = 0
        self.tasks = [asyncio.ensure_future(each()) for each in (self.answering.score_all, self.answering.send_all)]

    def _load(self, found: VersionRecord) -> Served:
        made = served(found.version)
        if self.broken:
            damaged: Any = Broken()
            made.predictor = damaged
        return made

    async def send(self, answers: Answers) -> list[asyncio.Future[Any]]:
        """As the outbox."""
        self.answers += [json.loads(value or b"") for _, value, _ in answers.records]
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return [done]

    async def ask(self, count: int = 40) -> list[int]:
        """The versions that have answered this many requests, once all are answered."""
        first = self.sent
        self.sent += count
        names = [f"r{number}" for number in range(first, self.sent)]
        records = [record(request(name), name.encode(), first + index) for index, name in enumerate(names)]
        await self.answering.put(Run("score-requests", 0, first, self.sent, records))
        await self.answering.all_answered(10)
        found = {each["request_id"]: each for each in self.answers[first:]}
        assert list(found) == names and self.answering.answered == {0: self.sent}
        assert all("error" not in each for each in found.values())
        return [found[name]["model_version"] for name in names]

    def expected(self, count: int = 40) -> list[int]:
        """The versions, by the share of the last requests."""
        names = [f"r{number}" for number in range(self.sent - count, self.sent)]
        return [CANDIDATE if chosen else CHAMPION for chosen in in_share(names, SHARE).tolist()]

    async def until_ready(self) -> None:
        async with asyncio.timeout(10):
            while self.keeper.trial is None:
                await asyncio.sleep(0.001)

    async def close(self) -> None:
        await self.keeper.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)


def registry(mode: Mode = "canary", operation: str = "op") -> RegistryState:
    state = RegistryState(
        {number: VersionRecord(version=number) for number in (CHAMPION, CANDIDATE)}, Champion(version=CHAMPION)
    )
    state.canary = Canary(mode=mode, version=CANDIDATE, share=SHARE, at_ms=100, operation=operation)
    return state


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.001)


def scene(steps: Callable[[Scorer], Awaitable[None]]) -> None:
    async def run() -> None:
        scorer = Scorer()
        try:
            await steps(scorer)
        finally:
            await scorer.close()

    asyncio.run(run())


def test_from_no_candidate_to_a_rollback() -> None:
    async def steps(scorer: Scorer) -> None:
        assert await scorer.ask() == [CHAMPION] * 40
        scorer.keeper.want(registry())
        await scorer.until_ready()
        assert await scorer.ask() == scorer.expected()
        rolled_back = registry()
        move = Move(version=3, previous=CHAMPION, who="", at_ms=101, reason="", how="rollback", operation="")
        rolled_back.champion = Champion(version=3, moves=(move,), rolled_back=(VersionRange(3, CHAMPION),))
        scorer.keeper.want(rolled_back)
        assert await scorer.ask() == [CHAMPION] * 40, "not one more answer of the candidate"

    scene(steps)


def test_a_damaged_candidate_costs_no_answer() -> None:
    async def steps(scorer: Scorer) -> None:
        scorer.broken = True
        scorer.keeper.want(registry())
        await scorer.until_ready()
        assert await scorer.ask() == [CHAMPION] * 40
        scorer.broken = False
        scorer.keeper.damaged()
        assert await scorer.ask() == [CHAMPION] * 40 or scorer.keeper.trial is not None
        await scorer.until_ready()
        assert await scorer.ask() == scorer.expected()

    scene(steps)


def test_a_shadow_answers_nothing() -> None:
    async def steps(scorer: Scorer) -> None:
        scorer.keeper.want(registry("shadow"))
        await scorer.until_ready()
        assert await scorer.ask() == [CHAMPION] * 40
        beside = [each.get("shadow_version") == CANDIDATE for each in scorer.answers]
        assert beside == [version == CANDIDATE for version in scorer.expected()]

    scene(steps)


def test_what_the_candidate_answers_says_nothing_of_the_champions_freshness() -> None:
    async def steps(scorer: Scorer) -> None:
        scorer.keeper.want(registry())
        await scorer.until_ready()
        scorer.freshness.learned([1])
        while await scorer.ask(1) == [CANDIDATE]:
            assert not scorer.known_ms
        assert len(scorer.known_ms) == 1

    scene(steps)
