"""The scorers of a run: the product's follower, swapper and scrub, wired as `stream.scorer.run` does, asked all the time."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from model.hashing import EMPTY_KEY
from state.chain_versions import point_of
from state.registry import RegistryState
from state.store import SnapshotStore
from stream.registry.follower import RegistryFollower
from stream.scorer.answers import answer_requests
from stream.scorer.chain_follower import ChainFollower
from stream.scorer.delta_log import open_deltas
from stream.scorer.following_metrics import FollowingMetrics
from stream.scorer.freshness import Freshness
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.replica import DeltaLog, LogItem
from stream.scorer.scrub import scrub_regularly
from stream.scorer.serving import Served, load_version
from stream.scorer.swap import Swapper
from tests.faults.snapshots.weights import Point, Weights
from tests.faults.snapshots.where import Where, requests

__all__ = ["ASK_S", "SCRUB_S", "Asked", "Scorer", "answers_of", "memory_of", "until"]

SCRUB_S = 0.25
ASK_S = 0.03
SPARE_BYTES = 10_000_000


@dataclass(frozen=True)
class Asked:
    """Requests, and what was answered: the answers by request, and what the scorer said of its weights."""

    seed: str
    answers: dict[str, dict[str, Any]]
    point: Point | None
    digest: str
    hurt: bool
    """Whether memory was changed on purpose, and no other weights have been read since."""


@dataclass
class Hooks:
    """What a kind can put between a scorer and what it reads.

    load   called before a version is read, in the thread that reads it
    items  changes what the log of deltas brings
    """

    load: Callable[[int], None] = field(default=lambda version: None)
    items: Callable[[LogItem], LogItem] = field(default=lambda item: item)


class Scorer:
    """A scorer without the topics of requests and answers: it is asked in memory."""

    def __init__(self, where: Where, name: str) -> None:
        self.where, self.name = where, name
        self.hooks = Hooks()
        self.asked: list[Asked] = []
        self.hurt: list[Served] = []
        """Weights whose memory was changed on purpose. They answer until others are read."""
        self.prometheus = CollectorRegistry()
        metrics = FollowingMetrics(self.prometheus)
        store = SnapshotStore(where.snapshots)
        self.scoring = ThreadPoolExecutor(1, f"scoring-{name}")

        def load(version: int) -> Served:
            self.hooks.load(version)
            return load_version(store, version, device="cpu", announced=self.reader.state.versions.get(version))

        self.swapper = Swapper(
            load, ScorerMetrics(self.prometheus), keep=3, spare_bytes=SPARE_BYTES, on_swap=lambda: self._want(self.reader.state)
        )
        self.follower = ChainFollower(
            lambda record: load(record.version),
            self._open,
            self._alone,
            self.swapper,
            metrics,
            Freshness(metrics.click_to_answer.observe),
            jitter_s=0.02,
        )
        self.reader = RegistryFollower(where.kafka, where.names, on_change=self._changed)
        self._scrub = lambda: scrub_regularly(self._in_memory, self._damaged, metrics, scrub_s=SCRUB_S)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> Scorer:
        await self.reader.start()
        self._tasks = [asyncio.ensure_future(each) for each in (self.follower.run(), self._scrub(), self._ask_always())]
        return self

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.swapper.close()
        await self.reader.close()
        self.scoring.shutdown()
        for task in self._tasks:
            if not task.cancelled():
                task.result()

    @property
    def served(self) -> Served | None:
        return self.swapper.current

    @property
    def point(self) -> Point | None:
        """The point of the weights that answer."""
        point = None if self.served is None else self.served.state.point
        return None if point is None else Point(str(point.chain), point.sequence)

    def count(self, name: str, **labels: str) -> float:
        """A metric of this scorer, without its prefix."""
        return self.prometheus.get_sample_value(f"headrace_scorer_{name}", labels) or 0.0

    def outcomes(self) -> dict[str, float]:
        """What became of deltas, by outcome."""
        found = {}
        for metric in self.prometheus.collect():
            for sample in metric.samples:
                if sample.name == "headrace_scorer_deltas_total":
                    found[sample.labels["outcome"]] = sample.value
        return found

    async def in_scoring_thread(self, work: Callable[[], Any]) -> Any:
        """Run something between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self.scoring, work)

    async def weights(self) -> Weights | None:
        """What is in memory now."""
        served = self.served
        return None if served is None else await self.in_scoring_thread(lambda: memory_of(served))

    # What stream.scorer.run does

    def _follows(self, state: RegistryState) -> bool:
        return state.champion.follows and _has_chain(state)

    def _want(self, state: RegistryState) -> None:
        weights = self.swapper.current if self.follower.replica is None else self.follower.replica.served
        room = weights is not None and weights.size <= SPARE_BYTES
        aside = room and (_has_chain(state) or self.follower.replica is not None)
        self.follower.want(state, self._follows(state) or aside)

    def _changed(self, state: RegistryState) -> None:
        self.swapper.want(state, self.reader.position, follow=self._follows(state))
        self._want(state)

    def _in_memory(self) -> list[Served]:
        kept = [*self.swapper.in_memory, None if self.follower.replica is None else self.follower.replica.served]
        return list({id(each): each for each in kept if each is not None}.values())

    def _damaged(self, served: Served) -> None:
        if served.is_replica:
            self.follower.damaged()
        else:
            self.swapper.reload(served)

    async def _alone(self, work: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self.scoring, work)

    @asynccontextmanager
    async def _open(self, offset: int) -> AsyncIterator[DeltaLog]:
        async with open_deltas(self.where.kafka, self.where.names, offset) as deltas:
            yield _Hooked(deltas, self.hooks)

    # Asking

    async def _ask_always(self) -> None:
        number = 0
        while True:
            await asyncio.sleep(ASK_S)
            number += 1
            await self.in_scoring_thread(lambda: self._ask(number))  # noqa: B023

    def _ask(self, number: int) -> None:
        served = self.swapper.current
        if served is None:
            return
        seed = f"{self.where.seed} {self.name} {number}"
        hurt, point = any(each is served for each in self.hurt), served.state.point
        found = answers_of(served, seed)
        self.asked.append(
            Asked(
                seed,
                found,
                None if point is None else Point(str(point.chain), point.sequence),
                f"{served.state.digest:016x}",
                hurt,
            )
        )


class _Hooked:
    def __init__(self, deltas: DeltaLog, hooks: Hooks) -> None:
        self._deltas, self._hooks = deltas, hooks

    @property
    def position(self) -> int:
        return self._deltas.position

    @property
    def at_end(self) -> bool:
        return self._deltas.at_end

    async def __aiter__(self) -> AsyncIterator[LogItem]:
        async for item in self._deltas:
            yield self._hooks.items(item)


def answers_of(served: Served, seed: str) -> dict[str, dict[str, Any]]:
    """What weights answer to the requests of a seed, by request."""
    asked = requests(random.Random(seed))
    found = answer_requests(asked, served, worker="w", max_candidates=100, max_bytes=1_000_000)
    return {answer["request_id"]: answer for answer in (json.loads(value) for _, value, _ in found.records)}


def memory_of(served: Served) -> Weights:
    """The weights as they are in memory, by the key of each row."""
    predictor = served.predictor
    rows = predictor._rows
    keys = rows.keys._keys[1 : rows.keys.last_row + 1].numpy()
    used = np.flatnonzero(keys != EMPTY_KEY)
    where = used + rows._fields
    tensors = {
        "keys": keys[used],
        "embedding": rows.embedding[where].numpy(),
        "first_order": rows.first_order[where].numpy(),
        **{name: tensor.detach().numpy() for name, tensor in predictor._dense.model.serving_state().items()},
        "typical.embedding": rows.averages().embedding.numpy(),
        "typical.first_order": rows.averages().first_order.numpy(),
    }
    return Weights.of(tensors, predictor.negative_rate)


def _has_chain(state: RegistryState) -> bool:
    record = state.champion_record
    return record is not None and point_of(record) is not None


async def until(done: Callable[[], bool] | Callable[[], Awaitable[bool]], within_s: float, what: str) -> None:
    """Wait for something, or raise a TimeoutError that says what it was."""
    deadline = time.monotonic() + within_s
    while True:
        answer = done()
        if answer if isinstance(answer, bool) else await answer:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"within {within_s:g} s: {what}")
        await asyncio.sleep(0.01)
