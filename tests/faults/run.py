"""One run: a stream goes in, a kind of fault happens meanwhile, and the ledger says whether anything came of it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from deploy.demo.play import worker_environment
from deploy.demo.workers import Worker
from deploy.feed import Feed
from deploy.local_kafka import LocalKafka
from deploy.settings import LocalKafkaSettings, Settings
from state.settings import SnapshotSettings
from stream.clients import aiokafka_options
from stream.settings import KafkaSettings, TopicSettings
from stream.topic_admin import create_topics
from stream.topics import TopicNames
from tests.faults.ledger import Ledger, read_ledger
from tests.faults.worker import Fault
from tests.stream.join.made_up import Events, end, join_settings, made_up, send_by

__all__ = ["POLL_S", "Clusters", "FaultWorker", "Kind", "Result", "Run", "happens", "play", "variant"]

IMPRESSIONS = 1_600  # 40 s of event time: four windows
SEND_S = 4.0
PATIENCE_S = 120.0
SEND_PATIENCE_MS = 120_000
FAULT_S = 30.0  # for a fault to happen
POLL_S = 0.05
END_S = 30.0  # a worker drains within 9 s by itself
MAX_RESTARTS = 20


class Result(msgspec.Struct):
    """What one run came to: a line of the results' file."""

    kind: str
    seed: int
    lost: int
    doubled: int
    wrong: int
    recovery_s: float | None
    """From the end of the fault until every partition of `examples` has a new transaction; None where one had no more."""
    restarts: int
    """Of workers that ended without being asked to."""
    events: int
    seconds: float
    problems: list[str]
    policy: str = "wait"
    negative_rate: float = 1.0
    code: str = ""
    """What it is a result of; see `tests.faults.code`."""


class Clusters:
    """Kafka clusters, each started when it is first asked for: `shared`, `alone` to be hurt, and `three` brokers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, LocalKafka] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Clusters:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def adopt(self, name: str, kafka: LocalKafka) -> None:
        """Use one that runs already."""
        self._running[name] = kafka

    def get(self, name: str) -> LocalKafka:
        if name not in self._running:
            settings = LocalKafkaSettings(dir=self._folder / name, start_timeout_ms=120_000, heap_mb=384)
            kafka = LocalKafka(settings, brokers=3 if name == "three" else 1)
            self._running[name] = self._stack.enter_context(kafka)
        return self._running[name]


class FaultWorker(Worker):
    """A join worker with a fault built in until it is started again."""

    def __init__(self, env: dict[str, str], log: Path, *, cwd: Path) -> None:
        super().__init__("join", env, log, cwd=cwd)
        self.program = [sys.executable, "-m", "tests.faults.worker"]
        self.wanted = False
        self.ended: list[int] = []  # exit codes of the ends that nobody asked for

    def arm(self, fault: Fault) -> None:
        self._env["FAULT"] = msgspec.json.encode(fault).decode()

    def start(self) -> None:
        super().start()
        self.wanted = True

    def end(self, number: int = signal.SIGKILL) -> None:
        """End it, and leave it ended; blocks."""
        self.wanted = False
        assert self._process is not None
        self._process.send_signal(number)
        code = self._process.wait(END_S)
        if code not in (0, -number):
            self.ended.append(code)


@contextlib.asynccontextmanager
async def happens(what: str) -> AsyncIterator[None]:
    """A part of the fault that is waited for: without it the run is an error."""
    try:
        async with asyncio.timeout(FAULT_S):
            yield
    except TimeoutError as error:
        raise AssertionError(f"the fault did not happen: not in {FAULT_S:.0f} s: {what}") from error


class Run:
    """What a kind of fault has to work with.

    Attributes:
        draw: everything random comes from here, so that a seed says it all.
        kafka: the cluster.
        everyone: all workers ever started, also those whose name another has now.
        fault_over: when the fault was over (monotonic); from then on recovery is timed.
    """

    def __init__(self, seed: int, kafka: LocalKafka, folder: Path, *, static: bool, events: Events, **join: object) -> None:
        self.draw, self.kafka, self.folder, self.events = random.Random(seed), kafka, folder, events
        self.links: dict[str, int] = {}
        replicas = kafka.brokers
        base = Settings(
            kafka=KafkaSettings(bootstrap_servers=kafka.bootstrap_servers),
            topics=TopicSettings(prefix=f"{folder.name}-", partitions=2, request_partitions=1, replication_factor=replicas),
            snapshots=SnapshotSettings(url=str(folder / "snapshots")),
            state_dir=folder / "state",
        )
        chosen = {"session_timeout_ms": 2_000, "instance_id": "one" if static else None, **join}
        self.settings = join_settings(base, **chosen)
        self.workers: dict[str, FaultWorker] = {}
        self.everyone: list[FaultWorker] = []
        self.fault_over: float | None = None
        self.sent = False
        self._second_half = asyncio.Event()
        self._second_half.set()
        self._ends: dict[int, int] = {}  # of `examples`, by partition, as last seen
        self._committed: list[tuple[float, float, int]] = []  # since when, and when, a partition of it was seen to have grown

    def state_of(self, name: str) -> Path:
        return self.folder / f"state-{name}"

    def worker(self, name: str = "one", fault: Fault | None = None, *, state: Path | None = None) -> FaultWorker:
        """Start a worker; with a fault that it has until its next start."""
        settings = self.settings.model_copy(update={"state_dir": state or self.state_of(name)})
        if self.settings.join.instance_id is not None:
            settings = settings.model_copy(update={"join": settings.join.model_copy(update={"instance_id": name})})
        worker = FaultWorker(worker_environment(settings), self.folder / f"{name}.log", cwd=Path.cwd())
        self.workers[name] = worker
        self.everyone.append(worker)
        self.start(worker, fault)
        return worker

    def start(self, worker: FaultWorker, fault: Fault | None = None) -> None:
        fault = fault or Fault()
        worker.arm(msgspec.structs.replace(fault, links=self.links))
        worker.start()
        worker.arm(Fault(links=self.links))

    async def end(self, worker: FaultWorker, number: int = signal.SIGKILL) -> None:
        """End a worker, and leave it ended."""
        await asyncio.to_thread(worker.end, number)

    async def leave(self, worker: FaultWorker) -> None:
        """End a worker while others stay, in order or not. Only what is killed leaves something to recover from."""
        number = self.draw.choice([signal.SIGTERM, signal.SIGKILL])
        await self.end(worker, number)
        if number == signal.SIGKILL:
            self.over()

    async def died(self, worker: FaultWorker, code: int = -signal.SIGKILL) -> None:
        """Wait until the fault built in has happened, and the supervisor has started the worker again."""
        async with happens("the worker ends by the fault"):
            while not worker.ended:
                await asyncio.sleep(POLL_S)
        assert worker.ended[0] == code, f"expected the fault to end the worker with {code}, found {worker.ended[0]}"

    async def labels(self, count: int = 1) -> None:
        """Wait until that many more labels or so are seen committed, or all is sent."""
        began, have = time.monotonic(), sum(self._ends.values())
        while sum(self._ends.values()) < have + count and not self.sent:
            assert time.monotonic() - began < PATIENCE_S, "no labels"
            await asyncio.sleep(POLL_S)

    def hold(self) -> None:
        """Keep back the second half of the stream until `go_on`: what is hurt by then has work left."""
        self._second_half.clear()

    def go_on(self) -> None:
        self._second_half.set()

    async def pause(self, least_s: float, most_s: float) -> None:
        await asyncio.sleep(self.draw.uniform(least_s, most_s))

    def over(self) -> None:
        """The fault is over: from now on it is recovery."""
        self.fault_over = time.monotonic()

    def recovery_s(self) -> float | None:
        if self.fault_over is None:
            return None
        first: dict[int, float] = {}
        for since, when, number in self._committed:
            if since > self.fault_over:
                first.setdefault(number, when)
        complete = len(first) == self.settings.topics.partitions
        return round(max(first.values()) - self.fault_over, 2) if complete else None

    # In the background

    async def send(self) -> None:
        """Send the stream from the moment a worker is ready, by a producer that outlasts every fault."""
        while not any([await asyncio.to_thread(worker.is_ready) for worker in list(self.workers.values())]):
            await asyncio.sleep(POLL_S)
        async with Feed(self.settings.kafka.model_copy(update={"request_timeout_ms": SEND_PATIENCE_MS})) as feed:
            await send_by(feed, self.settings, self.events.part(0.0, 0.5), over_s=SEND_S / 2)
            await self._second_half.wait()
            await send_by(feed, self.settings, self.events.part(0.5, 1.0), over_s=SEND_S / 2)
        self.sent = True

    async def supervise(self) -> None:
        """Start again what ends by itself, as a supervisor would."""
        while True:
            for worker in self.workers.values():
                if worker.wanted and (code := worker.returncode) is not None:
                    worker.ended.append(code)
                    if len(worker.ended) > MAX_RESTARTS:
                        raise AssertionError(f"it ends again and again: {worker.log.read_text()[-3_000:]}")
                    worker.start()
            await asyncio.sleep(POLL_S)

    async def watch(self) -> None:
        """See how far `examples` is committed."""
        topic = TopicNames.of(self.settings.topics).examples
        places = [TopicPartition(topic, number) for number in range(self.settings.topics.partitions)]
        options = {**aiokafka_options(self.settings.kafka), "request_timeout_ms": 5_000}
        while True:
            with contextlib.suppress(KafkaError, TimeoutError, OSError):
                async with AIOKafkaConsumer(**options, isolation_level="read_committed") as consumer:
                    since = 0.0  # when the answer before was asked for
                    while True:
                        asked = time.monotonic()
                        # Not `wait_for`, which before Python 3.12 may swallow the cancellation that ends this.
                        async with asyncio.timeout(5.0):
                            ends = await consumer.end_offsets(places)
                        for tp, end in ends.items():
                            if end > self._ends.get(tp.partition, 0):
                                self._ends[tp.partition] = end
                                self._committed.append((since, time.monotonic(), tp.partition))
                        since = asked
                        await asyncio.sleep(POLL_S)
            await asyncio.sleep(POLL_S)

    async def settle(self) -> Ledger:
        """End the stream, wait for what is missing, stop the workers cleanly, and check."""
        await end(self.settings, self.events)
        until = time.monotonic() + PATIENCE_S
        ledger = await read_ledger(self.settings)
        ledger.check(self.events)
        while ledger.lost and not ledger.doubled and not ledger.wrong and time.monotonic() < until:
            await asyncio.sleep(0.3)
            ledger = await read_ledger(self.settings)
            ledger.check(self.events)
        for worker in self.workers.values():
            if worker.wanted:
                while not await asyncio.to_thread(worker.is_ready) and time.monotonic() < until:
                    await asyncio.sleep(POLL_S)  # one that is starting has no handler for SIGTERM yet
                worker.wanted = False
                worker.ask_to_stop()
                await asyncio.to_thread(worker.wait_stopped)
                if worker.returncode:
                    ledger.problems.append(f"asked to stop, {worker.log.name} ended with {worker.returncode}")
        problems = ledger.problems
        ledger = await read_ledger(self.settings)
        ledger.check(self.events)
        ledger.problems = [*problems, *(problem for problem in ledger.problems if problem not in problems)]
        return ledger


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Args:
        play: makes it happen while the stream goes in; may be a stream of its own when `sends` is false.
        cluster: `shared`, `alone` or `three`.
        static: whether workers have an instance id; None draws.
        sends: whether the stream is sent while it plays.
        killed: how often a worker kills itself, exactly.
        crashes: how often workers may end with 1, least and most: where the fault is one that a worker must not live on.
    """

    name: str
    play: Callable[[Run], Awaitable[None]]
    cluster: str = "shared"
    static: bool | None = None
    sends: bool = True
    every_ms: int = 25
    join: tuple[tuple[str, object], ...] = ()
    killed: int = 0
    crashes: tuple[int, int] = (0, 0)

    def unexpected(self, ended: list[int]) -> list[str]:
        """What is wrong with the exit codes of workers that nobody asked to end."""
        killed, crashed = ended.count(-signal.SIGKILL), ended.count(1)
        least, most = self.crashes
        if killed == self.killed and least <= crashed <= most and killed + crashed == len(ended):
            return []
        return [f"expected {self.killed} kills and {least} to {most} ends with 1, found workers that ended with {ended}"]


def variant(seed: int) -> dict[str, object]:
    """Every third run lives by `fnw`, every fifth leaves out half of the negatives."""
    return {"label_policy": "fnw" if seed % 3 == 0 else "wait", "negative_rate": 0.5 if seed % 5 == 0 else 1.0}


@contextlib.contextmanager
def _ended(run: Run) -> Iterator[None]:
    """No worker is left, whatever happened."""
    try:
        yield
    finally:
        for worker in run.everyone:
            if worker.returncode is None:
                worker.kill()
            worker.wait_stopped()


async def _play(kind: Kind, run: Run) -> Ledger:
    background: list[asyncio.Future[Any]] = [asyncio.ensure_future(run.supervise()), asyncio.ensure_future(run.watch())]

    async def act() -> Ledger:
        if kind.sends:
            sending = asyncio.ensure_future(run.send())
            background.append(sending)
        await kind.play(run)
        if kind.sends:
            await sending
        return await run.settle()

    acting = asyncio.ensure_future(act())
    try:
        await asyncio.wait([acting, *background], return_when=asyncio.FIRST_COMPLETED)
        for task in background[:2]:  # they end only by an error
            if task.done():
                task.result()
        return await acting
    finally:
        everything = [acting, *background]
        for task in everything:
            task.cancel()
        await asyncio.gather(*everything, return_exceptions=True)


def play(kind: Kind, seed: int, clusters: Clusters, folder: Path, *, code: str = "") -> Result:
    """One run of a kind; blocks. A run whose fault could not be made is an error, never a success."""
    kafka = clusters.get(kind.cluster)
    draw = random.Random(f"{kind.name} {seed}")
    slug = "".join(letter if letter.isalnum() else "-" for letter in kind.name)
    work = folder / f"{slug}-{seed}-{draw.randrange(1 << 24):06x}"
    work.mkdir(parents=True)
    static = draw.random() < 0.5 if kind.static is None else kind.static
    events = made_up(IMPRESSIONS, seed, every_ms=kind.every_ms)
    run = Run(seed, kafka, work, static=static, events=events, **{**variant(seed), **dict(kind.join)})
    create_topics(run.settings.kafka, run.settings.topics)
    began = time.monotonic()
    with _ended(run):
        try:
            ledger = asyncio.run(_play(kind, run))
            lost, doubled, wrong, problems = ledger.lost, ledger.doubled, ledger.wrong, ledger.problems
        except Exception as error:
            traceback.print_exc()
            lost, doubled, wrong, problems = 0, 0, 0, [f"the run failed: {error!r}; see {work}"]
    ended = [end for worker in run.everyone for end in worker.ended]
    problems += kind.unexpected(ended)
    join = run.settings.join
    result = Result(
        kind=kind.name,
        seed=seed,
        lost=lost,
        doubled=doubled,
        wrong=wrong,
        recovery_s=run.recovery_s(),
        restarts=len(ended),
        events=len(events.arriving),
        seconds=round(time.monotonic() - began, 1),
        problems=problems[:20],
        policy=join.label_policy,
        negative_rate=join.negative_rate,
        code=code,
    )
    if not problems:
        shutil.rmtree(work)
    return result
