"""The trainer is sent back while it runs, while it is dead, and while it goes back already; what was poisoned is left out.

Besides what every run is checked for, the trainer's weights must be those of a run that never saw what is left out.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

from aiokafka import AIOKafkaProducer

from state.rewinds import SkippedRange
from state.store import SnapshotStore
from stream.kafka.clients import aiokafka_options
from stream.registry.log import read_registry
from stream.registry.operations import Operations
from stream.registry.reindex import plan_reindexing, reindex
from stream.registry.requests import RollbackRequest
from stream.registry.skipping import NOTHING, SkipRequest, TimeRange
from stream.registry.writer import RegistryWriter
from tests.faults.snapshots.child import GOING_BACK
from tests.faults.snapshots.kinds.base import flipped, kinds
from tests.faults.snapshots.kinds.deltas import at, header_end
from tests.faults.snapshots.kinds.lives import spawn
from tests.faults.snapshots.kinds.logs import delete, forget
from tests.faults.snapshots.play import Kind, create_topics
from tests.faults.snapshots.run import Run
from tests.faults.snapshots.trainer import never_saw, weights_of
from tests.faults.snapshots.weights import digest

__all__ = ["KINDS"]

KINDS: list[Kind] = []
kind = kinds(KINDS)

# What a child does once it has gone back.
LIFE = ("version", "delta", "delta", "version", "delta")


class Poisoned:
    """A run whose trainer has learned something after its first versions that it shouldn't have.

    good    offsets from which on the log is poisoned
    target  version before that, to which the trainer is sent back
    """

    def __init__(self, run: Run) -> None:
        self.run, self.names = run, run.where.names
        self.operations = Operations(run.where.kafka, self.names, "operator", store=SnapshotStore(run.where.snapshots))
        self.end = 0
        self.good = 0
        self.from_ms = 0
        self.target = 0
        self.left_out: list[SkippedRange] = []

    async def begin(self) -> Poisoned:
        run = self.run
        await create_topics(run.where, "examples")
        run.more_topics.append("examples")
        await run.begin(versions=2)
        self.target = run.drawn.choice([1, 2])
        await self.fill()
        self.good = self.end
        await asyncio.sleep(0.02)
        self.from_ms = time.time_ns() // 1_000_000
        await run.trainer.delta(run.drawn.randrange(1, 4))
        if run.drawn.random() < 0.5:
            await run.version()
            await run.trainer.delta()
        await self.fill(run.drawn.randrange(200))
        await run.caught_up()
        return self

    async def fill(self, more: int = 0) -> None:
        """Write what the trainer has learned, and some records more, to the log of examples. Only their offsets count."""
        end = self.run.trainer.training.positions[0] + more
        async with AIOKafkaProducer(**aiokafka_options(self.run.where.kafka)) as producer:
            futures = [await producer.send(self.names.examples, b"{}", partition=0) for _ in range(end - self.end)]
            await asyncio.gather(*futures)
        self.end = max(self.end, end)

    def drawn_range(self) -> SkippedRange:
        """A stretch after what is good, in which batches begin and end."""
        first = self.good + self.run.drawn.randrange(max(1, self.end - self.good - 1))
        return SkippedRange(partition=0, first=first, to=self.run.drawn.randint(first + 1, self.end))

    async def ask(self, skip: SkipRequest = NOTHING, *, to: int | None = None, timeout_ms: int = 20_000) -> bool:
        """Roll back and send the trainer back. Returns whether it has gone in time."""
        request = RollbackRequest("poisoned", to=to or self.target, rewind=True, skip=skip, timeout_ms=timeout_ms)
        done = await self.operations.rollback(request)
        self.left_out += done.skipped or ()
        found = [(each.first, each.to) for each in done.skipped or ()]
        if skip.to_latest:
            learned = SnapshotStore(self.run.where.snapshots).manifest(request.to or 0).offsets["0"]
            self.run.expect(found == [(learned, self.end)], f"expected {learned} to {self.end} to be left out, found {found}")
        if skip.times:
            self.run.expect(
                found == [(self.good, self.end)], f"expected {self.good} to {self.end} to be left out, found {found}"
            )
        return done.trainer is not None

    async def ask_the_living(self, skip: SkipRequest = NOTHING, *, to: int | None = None) -> None:
        """The same while the trainer runs: it goes back as soon as it hears of it."""
        asked = asyncio.ensure_future(self.ask(skip, to=to))
        await self.run.until(self.run.trainer.obey, "the trainer is asked to go back")
        self.run.expect(await asked, "expected that the operation waits for the trainer, found that it didn't")

    async def ask_the_dead(self, skip: SkipRequest = NOTHING, *, to: int | None = None) -> None:
        """The same while no trainer runs."""
        self.run.expect(not await self.ask(skip, to=to, timeout_ms=50), "expected nobody to go back")

    async def end_well(self) -> None:
        """Scorers serve the version; the trainer learns through what is left out, and is what it should be; all resume."""
        run, target = self.run, (await read_registry(self.run.where.kafka, self.names)).champion.version
        await run.until(
            lambda: all(each.served is not None and each.served.version == target for each in run.scorers), "they are pinned"
        )
        beyond = self.end + run.drawn.randrange(2) * 64
        while run.trainer.training.positions[0] < beyond:
            await run.trainer.delta()
            if run.drawn.random() < 0.1:
                await run.trainer.stop()
                await run.start_trainer()
        self.equals_a_run_that_never_saw_it()
        await run.version()
        await self.operations.resume()
        await run.caught_up()
        self.equals_a_run_that_never_saw_it()

    def equals_a_run_that_never_saw_it(self) -> None:
        trainer = self.run.trainer
        expected = digest(never_saw(self.run.where, self.left_out, trainer.training.positions[0]))
        found = digest(weights_of(trainer.learner))
        self.run.expect(found == expected, f"the trainer has {found}, a run that never saw what is left out {expected}")


Skipping = Callable[[Poisoned], SkipRequest]
SKIPPING: dict[str, Skipping] = {
    "nothing": lambda at: NOTHING,
    "to the latest": lambda at: SkipRequest(to_latest=True),
    "by offsets": lambda at: SkipRequest(ranges=tuple(at.drawn_range() for _ in range(at.run.drawn.randint(1, 3)))),
    "by time": lambda at: SkipRequest(times=(TimeRange(at.from_ms, time.time_ns() // 1_000_000 + 1),)),
}


def alive(name: str, skipping: Skipping) -> None:
    @kind(f"the running trainer is sent back, skipping {name}")
    async def play(run: Run) -> None:
        here = await Poisoned(run).begin()
        await here.ask_the_living(skipping(here))
        if run.drawn.random() < 0.3:  # and once more, perhaps further back, before it has learned all of it again
            await run.trainer.delta()
            await here.ask_the_living(skipping(here), to=run.drawn.randint(1, here.target))
            run.happened.append("twice")
        await here.end_well()
        run.happened.append("went back")


def dead(name: str, skipping: Skipping) -> None:
    @kind(f"a dead trainer is sent back, skipping {name}")
    async def play(run: Run) -> None:
        here = await Poisoned(run).begin()
        await run.trainer.stop()
        await here.ask_the_dead(skipping(here))
        if run.drawn.random() < 0.3:
            await here.ask_the_dead(skipping(here), to=run.drawn.randint(1, here.target))
            run.happened.append("twice")
        await run.start_trainer()
        await here.end_well()
        run.happened.append("went back")


for each in SKIPPING.items():
    alive(*each)
    dead(*each)


def killed(step: str) -> None:
    @kind(f"kill -9 of a trainer that goes back: {step}")
    async def play(run: Run) -> None:
        here = await Poisoned(run).begin()
        await run.trainer.stop()
        await here.ask_the_dead(SKIPPING[run.drawn.choice(list(SKIPPING))](here))
        for _ in range(run.drawn.randint(1, 2)):
            code = await spawn(run, step=step, script=LIFE).ended()
            run.expect(code == -signal.SIGKILL, f"expected the trainer to be killed, found exit code {code}")
        run.happened.append("killed")
        await run.start_trainer()
        await here.end_well()


for step in GOING_BACK:
    killed(step)


@kind("two operators send the trainer back at once")
async def _two(run: Run) -> None:
    here = await Poisoned(run).begin()
    asked = [asyncio.ensure_future(here.ask(skip, timeout_ms=20_000)) for skip in (SKIPPING["by offsets"](here), NOTHING)]

    async def all_obeyed() -> bool:
        await run.trainer.obey()
        return all(each.done() for each in asked)

    await run.until(all_obeyed, "the trainer obeys both")
    run.expect(all(await asyncio.gather(*asked)), "expected both operators to hear that the trainer has gone back")
    await here.end_well()
    run.happened.append("went back")


@kind("the trainer is sent back after deltas were damaged in the log")
async def _damaged(run: Run) -> None:
    here = await Poisoned(run).begin()

    def mangle(pieces: list[bytes]) -> list[bytes]:
        return at(pieces, 0, flipped(pieces[0], run.drawn.randrange(8 * header_end(pieces))))

    run.trainer.writer.mangle = mangle
    await run.trainer.delta(2)
    await here.fill()
    await here.ask_the_living(SKIPPING["by offsets"](here))
    await here.end_well()
    run.happened.append("went back")


@kind("the trainer is sent back after retention deleted deltas")
async def _forgotten(run: Run) -> None:
    here = await Poisoned(run).begin()
    await forget(run, keep=run.drawn.choice([0, 3]))
    await here.ask_the_living(SKIPPING["by offsets"](here))
    await here.end_well()
    run.happened.append("went back")


@kind("topic snapshots is lost before the trainer has come to what it leaves out")
async def _ahead(run: Run) -> None:
    here = await Poisoned(run).begin()
    await here.fill(300)
    first = run.trainer.training.positions[0] + 100 + run.drawn.randrange(100)
    await here.ask_the_living(SkipRequest(ranges=(SkippedRange(partition=0, first=first, to=first + 90),)))
    await run.version()
    before = await read_registry(run.where.kafka, run.where.names)
    await run.trainer.stop()
    await delete(run, "snapshots")
    await create_topics(run.where, "snapshots")
    state = await read_registry(run.where.kafka, run.where.names)
    plan, manifests = await asyncio.to_thread(plan_reindexing, state, run.trainer.store, [], before.champion.version)
    writer = RegistryWriter(run.where.kafka, run.where.names, who="operator")
    try:
        await reindex(writer, plan, manifests, "test")
    finally:
        await writer.close()
    after = await read_registry(run.where.kafka, run.where.names)
    run.expect(after.rewinds.skipped == before.rewinds.skipped, f"expected {before.rewinds}, found {after.rewinds}")
    await run.start_trainer()
    while run.trainer.training.positions[0] < first + 90:
        await run.trainer.delta()
    here.equals_a_run_that_never_saw_it()
    run.expect(len(run.trainer.skips.begun({0: first + 1})) == 1, "expected the range to be left out")
    await run.version()
    await here.operations.resume()
    run.happened.append("indexed")
