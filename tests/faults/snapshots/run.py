"""One run: a trainer, some scorers, a fault, and the checks after it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import torch

from model.predictor import Predictor
from model.requests import RequestDecoder
from stream.kafka.clients import admin_client
from stream.registry.log import read_registry
from stream.scorer.serving import Served, WeightsState
from tests.faults.snapshots import replay as replaying
from tests.faults.snapshots.scorer import Asked, Scorer, answers_of, memory_of, until
from tests.faults.snapshots.trainer import Trainer
from tests.faults.snapshots.weights import Point, Weights, digest
from tests.faults.snapshots.where import MODEL, SCHEMA, Noted, Where

__all__ = ["HEAL_S", "TOPICS", "Checked", "Run", "memory_digest"]

# Bound of healing once the fault is over and a new version is announced. Waits of the product's own are shortened (`play.py`).
HEAL_S = 20.0
# Answers that are computed again for each run; the first and the last of each name are among them.
SAMPLE = 120
Done = Callable[[], bool] | Callable[[], Awaitable[bool]]
TOPICS = ("snapshots", "deltas", "scorers")


@dataclass
class Checked:
    """What the checks looked at."""

    points: int = 0
    answers: int = 0


class Run:
    """What a kind of fault works with.

    problems  what is wrong; a run without problems has held
    happened  what the fault did, to be told from a run in which nothing happened
    """

    def __init__(self, where: Where) -> None:
        self.where = where
        self.drawn = random.Random(where.seed)
        self.problems: list[str] = []
        self.happened: list[str] = []
        self.heal_s: float | None = None
        self.trainer = Trainer(where)
        self.scorers: list[Scorer] = []
        self._opened: list[Any] = []
        self.checked = Checked()
        self._announced: dict[int, Point] = {}
        """Points of versions, also of those that compaction has taken out of the registry since."""
        self.more_topics: list[str] = []
        """Topics besides `TOPICS` that the kind has created."""
        self.lost_log = False
        """Whether the log no longer has all of what scorers were at, so that only the trainer's notes show it."""

    # What kinds do

    async def begin(self, *, scorers: int = 2, versions: int = 1) -> None:
        """A trainer that has published some versions and deltas, and scorers that have caught up with it."""
        await self.start_trainer()
        for _ in range(versions):
            self.trainer.learn(2)
            await self.version()
            await self.trainer.delta(self.drawn.randrange(1, 4))
        for _ in range(scorers):
            await self.start_scorer()
        await self.caught_up()

    async def start_trainer(self, who: str = "trainer") -> Trainer:
        """Another life of the trainer, from now on `trainer`."""
        self.trainer = Trainer(self.where, who)
        self._opened.append(self.trainer)
        return await self.trainer.start()

    async def start_scorer(self, prepare: Callable[[Scorer], None] = lambda scorer: None) -> Scorer:
        scorer = Scorer(self.where, f"s{len(self.scorers)}")
        prepare(scorer)
        self.scorers.append(scorer)
        self._opened.append(scorer)
        return await scorer.start()

    async def version(self) -> int:
        """Publish a version; it must succeed."""
        announcement = await self.trainer.version()
        assert announcement is not None, "expected a version to be announced, found that it failed"
        if self.trainer.point is not None:
            self._announced[announcement.version] = self.trainer.point
        return announcement.version

    async def newest(self) -> int:
        """The newest version in the registry."""
        return (await read_registry(self.where.kafka, self.where.names)).newest

    def expect(self, true: bool, what: str) -> None:
        """Note a problem unless something holds."""
        if not true:
            self.problems.append(what)

    async def caught_up(self, within_s: float = HEAL_S) -> None:
        """Wait until all scorers answer with the trainer's newest point."""

        def there() -> bool:
            return all(scorer.point == self.trainer.point for scorer in self.scorers)

        try:
            await until(there, within_s, "")
        except TimeoutError:
            at = [(scorer.point, scorer.follower.problem, scorer.outcomes()) for scorer in self.scorers]
            raise TimeoutError(f"expected all scorers at {self.trainer.point} within {within_s:g} s, found {at}") from None

    async def until(self, done: Done, what: str, within_s: float = HEAL_S) -> None:
        await until(done, within_s, what)

    async def refused(self, *reasons: str, scorers: list[Scorer] | None = None) -> None:
        """Wait until scorers have refused something for one of these reasons; none: for any."""
        asked = self.scorers if scorers is None else scorers
        good = {"applied", "old_chain", "other_chain", "broken"}

        def all_have() -> bool:
            return all(any(name in reasons if reasons else name not in good for name in scorer.outcomes()) for scorer in asked)

        found = [scorer.outcomes() for scorer in asked]
        await until(all_have, 8.0, f"expected {reasons or 'a refusal'} of every scorer, found {found}")
        self.happened.append(f"refused for {reasons or 'some reason'}")

    # After the fault

    async def settle(self) -> None:
        """The trainer goes on and writes a version; every scorer must follow."""
        began = time.monotonic()
        await self.trainer.delta(2)
        await self.version()
        await self.trainer.delta(2)
        await self.caught_up()
        self.heal_s = time.monotonic() - began
        await asyncio.sleep(0.15)  # some answers of the last state

    async def check(self) -> None:
        """Compare everything with the replay and with the trainer's notes."""
        memories = [(scorer, scorer.point, await scorer.weights()) for scorer in self.scorers]
        found, notes = await asyncio.to_thread(self._replayed)
        self.problems += found.wrong
        known: dict[Point, Weights] = {}
        for each in notes:
            known[each.point] = each.weights
            if each.parent is not None:
                found.next[each.parent].add(each.point)
        for point, weights in found.points.items():
            noted = known.setdefault(point, weights)
            if digest(noted) != digest(weights):
                self.problems.append(f"{point}: the replay has {digest(weights)}, the trainer had {digest(noted)}")
        for scorer, point, weights in memories:
            if point is None or weights is None:
                self.problems.append(f"{scorer.name}: expected weights at a point, found none")
                continue
            wanted = found.points.get(point) if not self.lost_log else known.get(point)
            if wanted is None:
                self.problems.append(f"{scorer.name}: at {point}, to which neither a version nor the log leads")
            elif digest(wanted) != digest(weights):
                self.problems.append(f"{scorer.name}: at {point} {digest(weights)} in memory, {digest(wanted)} by the replay")
        for version, point in self._announced.items():
            found.versions.setdefault(version, replaying.Announced(version, point, "", 0))
        self.checked.points = len(found.points)
        self._check_asked(known, found)

    def _replayed(self) -> tuple[replaying.Replay, list[Noted]]:
        names, servers = self.where.names, self.where.servers
        announced = replaying.announced_in(replaying.read_topic(servers, names.snapshots))
        records = replaying.read_topic(servers, names.deltas)
        return replaying.replay(records, announced, self.where.store), list(self.where.noted())

    def _check_asked(self, known: dict[Point, Weights], found: replaying.Replay) -> None:
        digests = {point: digest(weights) for point, weights in known.items()}
        everything = [asked for scorer in self.scorers for asked in scorer.asked]
        for asked in everything:
            if asked.point is not None and digests.get(asked.point) != asked.digest:
                self.problems.append(f"answers at {asked.point} say {asked.digest}, published was {digests.get(asked.point)}")
                break
        sound = [asked for asked in everything if not asked.hurt]
        step = max(1, len(sound) // SAMPLE)
        sample = [asked for number, asked in enumerate(sound) if number % step == 0 or asked is sound[-1]]
        ready: dict[Point, Served] = {}
        wrong = 0
        for asked in sample:
            first = next(iter(asked.answers.values()))
            version, delta = first["model_version"], first.get("delta", 0)
            points = named(found, version, delta)
            if not points:
                wrong += 1
                if wrong <= 3:
                    self.problems.append(f"answers name version {version}, delta {delta}, which names no point")
            elif not any(self._same(asked, ready, known, point) for point in points):
                wrong += 1
                if wrong <= 3:
                    self.problems.append(
                        f"answers of version {version}, delta {delta} ({asked.point}) differ from those of {sorted(points)}"
                    )
        self.checked.answers = len(sample)

    def _same(self, asked: Asked, ready: dict[Point, Served], known: dict[Point, Weights], point: Point) -> bool:
        """Whether the weights of a point give these answers."""
        weights = known.get(point)
        if weights is None:
            return False
        if point not in ready:
            tensors = {name: torch.from_numpy(each) for name, each in weights.tensors().items()}
            predictor = Predictor.of(SCHEMA, MODEL, tensors, device="cpu", negative_rate=weights.rate)
            ready[point] = Served(WeightsState(0, 0), RequestDecoder(SCHEMA), predictor)
        again = answers_of(ready[point], asked.seed)
        return {name: each["scores"] for name, each in again.items()} == {
            name: each["scores"] for name, each in asked.answers.items()
        }

    async def close(self) -> None:
        """Stop everything that was started, and delete the topics."""
        for each in reversed(self._opened):
            try:
                async with asyncio.timeout(15):
                    await each.stop()
            except Exception as error:
                self.problems.append(f"stopping {type(each).__name__}: {error!r}")
        async with admin_client(self.where.kafka) as admin:
            await admin.delete_topics([self.where.prefix + name for name in (*TOPICS, *self.more_topics)])


def named(found: replaying.Replay, version: int, delta: int) -> set[Point]:
    """The points that an answer's version and number of deltas name; more than one where a trainer was replaced."""
    announced = found.versions.get(version)
    if announced is None:
        return set()
    points = {announced.point} if announced.point is not None else set()
    for _ in range(delta):
        points = {after for point in points for after in found.next.get(point, ())}
    return points


def memory_digest(served: Served) -> str:
    """The digest of what is in memory, computed whole."""
    return digest(memory_of(served))
