"""A scorer without Kafka: a follower and a swapper over a made-up log and store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from state.registry import RegistryState
from stream.scorer import chain_follower, swap
from stream.scorer.chain_follower import ChainFollower
from stream.scorer.following_metrics import FollowingMetrics
from stream.scorer.freshness import Freshness
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.serving import Served
from stream.scorer.swap import Swapper
from tests.stream.scorer.made_up_chain import Log, Store, Trainer

__all__ = ["Scorer", "quick", "scene"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_follower, "LOOK_S", 0.01)
    monkeypatch.setattr(chain_follower, "OVERDUE_S", 0.1)
    monkeypatch.setattr(chain_follower, "REREAD_S", 0.0)
    for module in (chain_follower, swap):
        monkeypatch.setattr(module, "RETRY_S", 0.01)
        monkeypatch.setattr(module, "MAX_RETRY_S", 0.02)
    monkeypatch.setattr(swap, "PRELOAD_JITTER_S", 0.0)


class Scorer:
    """A follower and a swapper, wired as `stream.scorer.run` does, over a made-up log and store."""

    def __init__(self, trainer: Trainer, store: Store | None = None, *, jitter_s: float = 0.0, spare: int = 100) -> None:
        self.trainer, self.log = trainer, trainer.log
        self.store = store or Store(trainer)
        self.read: list[int] = []
        """Versions read to follow their chain."""
        self.cached: set[int] = set()
        """Versions that this machine has."""
        self.prometheus = CollectorRegistry()
        metrics = FollowingMetrics(self.prometheus)
        self.freshness = Freshness(metrics.click_to_answer.observe)
        self.scoring = ThreadPoolExecutor(1, "scoring")
        self.spare, self.position = spare, 0
        self.swapper = Swapper(
            self.store.load, ScorerMetrics(self.prometheus), keep=3, spare_bytes=spare, on_swap=self._want_replica
        )
        self.registry = RegistryState()
        self.follower = ChainFollower(
            lambda record: self.load(record.version),
            self.log.open,
            self._alone,
            self.swapper,
            metrics,
            self.freshness,
            jitter_s=jitter_s,
            cached=lambda record: record.version in self.cached,
        )
        self.task = asyncio.ensure_future(self.follower.run())

    def load(self, version: int) -> Served:
        self.read.append(version)
        return self.store.load(version)

    async def _alone(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self.scoring, work)

    def want(self, champion: int, *, hold: bool = False, **changed: Any) -> None:
        self.position += 10
        self.registry = self.trainer.registry(champion, hold=hold, **changed)
        self.swapper.want(self.registry, self.position, follow=not hold)
        self._want_replica()

    def _want_replica(self) -> None:
        aside = self.swapper.current is not None and self.swapper.current.size <= self.spare
        self.follower.want(self.registry, self.registry.champion.follows or aside)

    @property
    def at(self) -> tuple[str, int] | None:
        """Chain and sequence of the weights that answer, after a check that they are whole."""
        current = self.swapper.current
        if current is None or current.state.point is None:
            return None
        return str(current.state.point.chain), current.state.point.sequence

    @property
    def named(self) -> tuple[int, int] | None:
        current = self.swapper.current
        return None if current is None else (current.state.version, current.state.delta)

    @property
    def rows(self) -> Any:
        current: Any = self.swapper.current
        return current.predictor.rows

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                await asyncio.sleep(0.002)

    async def until_caught_up(self) -> None:
        """Until the trainer's weights answer."""
        await self.until(lambda: self.at == (self.trainer.chain, self.trainer.sequence))
        assert self.rows == self.trainer.rows

    def count(self, name: str, **labels: str) -> float:
        return self.prometheus.get_sample_value(f"headrace_scorer_{name}", labels) or 0.0

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        await self.swapper.close()
        self.scoring.shutdown()
        if not self.task.cancelled():
            self.task.result()


def scene(steps: Callable[[Scorer, Trainer, Log], Awaitable[None]], **options: Any) -> None:
    """Run steps on a scorer that follows version 1, which is at sequence 2 of a chain."""

    async def run() -> None:
        trainer = Trainer(Log())
        trainer.delta(2)
        trainer.version(1)
        it = Scorer(trainer, **options)
        try:
            it.want(1)
            await it.until_caught_up()
            await steps(it, trainer, trainer.log)
        finally:
            await it.close()

    asyncio.run(run())
