"""The way of requests through a scorer, from the runs that Kafka delivers to the positions whose answers are acknowledged.

    runs ─▶ intake ── batches ──▶ scoring (a thread) ── answers ──▶ outbox ──▶ acknowledged ──▶ `answered`

Requests that wait are scored together in one forward pass. While answers are on their way to the brokers the next requests are
scored.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from stream.kafka.transport import Run
from stream.records.record import Record
from stream.scorer.answers import Answers, answer_requests
from stream.scorer.candidate import CandidateKeeper
from stream.scorer.challenger import Challengers
from stream.scorer.freshness import Freshness
from stream.scorer.intake import MAX_REQUESTS, Batch, Intake
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.outbox import Outbox
from stream.scorer.standstill import Standstill
from stream.scorer.swap import Swapper

__all__ = ["Answering"]

# Most scored batches whose answers are not sent yet: enough that scoring never waits for a round trip.
SCORED_WAITING = 4


class _Scored(NamedTuple):
    """A batch on its way to the brokers, and the arrivals (ms) of the clicks that its answers are the first to know.

    standstills  of this process before it was scored
    """

    batch: Batch
    answers: Answers
    arrivals_ms: Sequence[int]
    standstills: int


class Answering:
    """The way of requests through a scorer. Run `score_all` and `send_all` as tasks.

    Args:
        scoring: one thread. What else is submitted to it runs between two batches.
        stale: whether the registry couldn't be read to its end within the lease.
        max_candidates: most candidates in one request; a request with more gets an error as its answer.
        max_bytes: largest batch that the topic `scores` takes.
    """

    def __init__(
        self,
        swapper: Swapper,
        candidate: CandidateKeeper,
        challengers: Challengers,
        outbox: Outbox,
        metrics: ScorerMetrics,
        freshness: Freshness,
        standstill: Standstill,
        *,
        scoring: ThreadPoolExecutor,
        worker_id: str,
        stale: Callable[[], bool],
        max_candidates: int,
        max_bytes: int,
    ) -> None:
        self._swapper, self._outbox, self._metrics, self._freshness = swapper, outbox, metrics, freshness
        self._candidate, self._challengers, self._standstill = candidate, challengers, standstill
        self._worker_id, self._stale = worker_id, stale
        self._max_candidates, self._max_bytes = max_candidates, max_bytes
        self.answered: dict[int, int] = {}
        """Next offset by partition: the answers to everything before it are acknowledged."""
        self.news = asyncio.Event()
        """Set when `answered` moves; whoever waits for it clears it."""
        self._intake = Intake()
        self._arrived, self._room, self._done = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._scored: asyncio.Queue[_Scored] = asyncio.Queue(SCORED_WAITING)
        self._thread = scoring
        self._under_way = 0  # batches taken from the intake whose answers are not acknowledged
        self._batches = 0  # batches whose answers are acknowledged

    def expected(self, partition: int) -> int | None:
        """The next offset to take of a partition; None for one that isn't ours."""
        return self._intake.expected.get(partition)

    def assign(self, positions: Mapping[int, int]) -> None:
        """Go on with these partitions from these positions."""
        self._intake.assign(positions)
        self.answered = dict(positions)

    def drop_waiting(self) -> None:
        """Take nothing more and drop what waits, until the next `assign`. The next owner answers it."""
        self._intake.drop()

    def close_intake(self) -> None:
        """Take nothing more. What waits is still answered."""
        self._intake.expected = {}

    async def put(self, run: Run) -> int | None:
        """Take a run; waits while the intake is full. Returns the offset to seek to if records before the run are missing."""
        while self._intake.full:
            self._room.clear()
            await self._room.wait()
        missing_from = self._intake.put(run)
        self._arrived.set()
        return missing_from

    async def all_answered(self, timeout_s: float) -> None:
        """Wait until nothing waits or is under way, at most this long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._under_way or not self._intake.empty:
                    self._done.clear()
                    await self._done.wait()

    async def begun_answered(self, timeout_s: float) -> bool:
        """Wait until the batches that are under way now are acknowledged, at most this long. Returns whether they are."""
        until = self._batches + self._under_way
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._batches < until:
                    self._done.clear()
                    await self._done.wait()
        return self._batches >= until

    async def answer(self, records: list[Record]) -> None:
        """Answer requests that didn't come through `put`. Returns when the brokers have the answers."""
        for start in range(0, len(records), MAX_REQUESTS):
            part = records[start : start + MAX_REQUESTS]
            for future in await self._outbox.send(await self._score(part)):
                await future
            self._metrics.acknowledged(part)

    async def score_all(self) -> None:
        """Score what waits, until cancelled."""
        while True:
            batch = self._intake.take()
            if batch is None:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            self._under_way += 1
            self._room.set()
            await self._standstill.over()
            standstills = self._standstill.count
            # Deltas are applied in the scoring thread, one after another with batches: what is learned now is in this batch.
            current, arrivals_ms = self._swapper.current, self._freshness.take()
            answers = await self._score(batch.records)
            if not answers.by_champion:
                self._freshness.learned(arrivals_ms)
            known = answers.by_champion > 0 and current is not None and current.is_replica
            await self._scored.put(_Scored(batch, answers, arrivals_ms if known else (), standstills))

    async def send_all(self) -> None:
        """Send what is scored, until cancelled."""
        while True:
            scored = [await self._scored.get()]
            while not self._scored.empty():
                scored.append(self._scored.get_nowait())
            futures = [future for each in scored for future in await self._outbox.send(await self._up_to_date(each))]
            for future in futures:
                await future
            for each in scored:
                self._freshness.answered(each.arrivals_ms)
                self._acknowledged(each.batch)

    async def _up_to_date(self, scored: _Scored) -> Answers:
        """The answers, computed again if this process has stood still since."""
        answers, standstills = scored.answers, scored.standstills
        await self._standstill.over()
        while standstills != self._standstill.count:
            standstills = self._standstill.count
            answers = await self._score(scored.batch.records)
            await self._standstill.over()
        return answers

    async def _score(self, records: list[Record]) -> Answers:
        if not records:
            return Answers()
        began = time.perf_counter()
        trial = self._candidate.trial
        answer = partial(
            answer_requests,
            records,
            self._swapper.current,  # the same weights for the whole batch, whatever is swapped meanwhile
            trial=trial,
            shadows=self._challengers.shadows,
            worker=self._worker_id,
            max_candidates=self._max_candidates,
            max_bytes=self._max_bytes,
            stale=self._stale(),
        )
        answers = await asyncio.get_running_loop().run_in_executor(self._thread, answer)
        self._metrics.scored(answers, time.perf_counter() - began)
        if trial is not None:
            self._candidate.scored(trial, answers.by_candidate, answers.not_by_candidate)
        for track, count in answers.by_shadow.items():
            self._challengers.scored(track, *count)
        return answers

    def _acknowledged(self, batch: Batch) -> None:
        self._metrics.acknowledged(batch.records)
        if batch.generation == self._intake.generation:
            self.answered.update(batch.positions)
            self.news.set()
        self._under_way -= 1
        self._batches += 1
        self._done.set()
