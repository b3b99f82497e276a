"""One run: a stream goes in, a kind of fault happens meanwhile, and the ledger says whether anything was lost by it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from deploy.demo.play import worker_environment
from deploy.local_kafka.cluster import LocalKafka
from deploy.settings import Settings
from state.settings import SnapshotSettings
from stream.kafka.clients import aiokafka_options
from stream.settings import JoinSettings, KafkaSettings, TopicSettings
from stream.topics.names import TopicNames
from tests.faults.clusters import Clusters
from tests.faults.fault_worker import END_S, FaultWorker
from tests.faults.ledger import FOREVER_MS, Ledger, Life
from tests.faults.logs import Logs
from tests.faults.sender import Sender
from tests.faults.stream import HORIZON_MS, LATENESS_MS, MAX_FUTURE_MS, WINDOW_MS, Sent, Stream
from tests.faults.worker import Fault

__all__ = ["POLL_S", "Run", "happens"]

PATIENCE_S = 120.0
FAULT_S = 40.0  # the longest wait for a fault to happen
POLL_S = 0.2
MAX_RESTARTS = 20


@contextlib.asynccontextmanager
async def happens(what: str) -> AsyncIterator[None]:
    """Wait for a part of the fault. A run without it is an error, never a success."""
    try:
        async with asyncio.timeout(FAULT_S):
            yield
    except TimeoutError as error:
        raise AssertionError(f"the fault did not happen: not in {FAULT_S:.0f} s: {what}") from error


class Run:
    """One run: the cluster, the stream, the workers, and the actions that a kind of fault takes on them.

    Attributes:
        draw: the source of everything random, so that a seed repeats a run.
        kafka: the cluster.
        logs: reads what the topics hold.
        lives: the settings that the stream was joined under so far, one entry for each change.
        everyone: all workers ever started, also those whose name another worker has now.
        fault_over: when the fault ended, in monotonic seconds. Recovery is timed from then on.
    """

    def __init__(
        self, seed: int, kafka: LocalKafka, folder: Path, *, static: bool, stream: Stream, clusters: Clusters, **join: object
    ) -> None:
        self.draw, self.kafka, self.folder, self.stream = random.Random(seed), kafka, folder, stream
        self.clusters = clusters
        self.links: dict[str, int] = {}
        self.before: tuple[str, ...] = ()  # words before a worker's command, such as strace
        self.environment: dict[str, str] = {}  # more environment of the workers, besides their settings
        self.drains_late = False  # whether a worker may exceed its drain limit at the end, and exit with 1
        replicas = kafka.brokers
        base = Settings(
            kafka=KafkaSettings(bootstrap_servers=kafka.bootstrap_servers),
            topics=TopicSettings(prefix=f"{folder.name}-", partitions=2, request_partitions=1, replication_factor=replicas),
            snapshots=SnapshotSettings(url=str(folder / "snapshots")),
            state_dir=folder / "state",
        )
        self.settings = base.model_copy(update={"join": _join(base.join, static=static, **join)})
        self.logs = Logs(
            kafka.bootstrap_servers,
            prefix=self.settings.topics.prefix,
            group=self.settings.join.group,
            partitions=self.settings.topics.partitions,
        )
        self.lives = [life(self.settings.join)]
        self.workers: dict[str, FaultWorker] = {}
        self.everyone: list[FaultWorker] = []
        self.fault_over: float | None = None
        self.sent = False
        self._second_half = asyncio.Event()
        self._second_half.set()
        self._ends: dict[int, int] = {}  # partition of `examples` → its end, as last seen
        self._committed: list[tuple[float, float, int]] = []  # (previous look, this look, partition), each time it grew

    def state_of(self, name: str) -> Path:
        return self.folder / f"state-{name}"

    def worker(
        self, name: str = "one", fault: Fault | None = None, *, state: Path | None = None, instance: str = ""
    ) -> FaultWorker:
        """Start a worker. It has the fault until its next start."""
        settings = self.settings.model_copy(update={"state_dir": state or self.state_of(name)})
        if self.settings.join.instance_id is not None:
            settings = _with_join(settings, instance_id=instance or name)
        env = worker_environment(settings) | self.environment
        worker = FaultWorker(env, self.folder / f"{name}.log", cwd=Path.cwd(), before=self.before)
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
        """End a worker; the supervisor doesn't start it again."""
        await asyncio.to_thread(worker.end, number)

    async def leave(self, worker: FaultWorker) -> None:
        """End one worker among others, by SIGTERM or SIGKILL at random. Recovery is timed only after SIGKILL."""
        number = self.draw.choice([signal.SIGTERM, signal.SIGKILL])
        await self.end(worker, number)
        if number == signal.SIGKILL:
            self.over()

    async def died(self, worker: FaultWorker, code: int = -signal.SIGKILL) -> None:
        """Wait until the worker's built-in fault has ended it, and the supervisor has started it again."""
        async with happens("the worker ends by the fault"):
            while not worker.ended:
                await asyncio.sleep(POLL_S)
        assert worker.ended[0] == code, f"expected the fault to end the worker with {code}, found {worker.ended[0]}"

    async def labels(self, count: int = 1) -> None:
        """Wait until about `count` more labels are seen committed, or all events are sent."""
        began, have = time.monotonic(), sum(self._ends.values())
        while sum(self._ends.values()) < have + count and not self.sent:
            assert time.monotonic() - began < PATIENCE_S, "no labels"
            await asyncio.sleep(POLL_S)

    async def change(self, worker: FaultWorker, **join: object) -> None:
        """Give the only worker, which has ended, other settings. They hold from what the worker has committed on."""
        await asyncio.sleep(0.5)  # a commit that the kill came upon is through by then
        committed, ends = await asyncio.to_thread(lambda: (self.logs.committed(), self.logs.ends("examples")))
        self.settings = _with_join(self.settings, **join)
        name = worker.log.stem
        settings = _with_join(self.settings, instance_id=self.settings.join.instance_id and name)
        worker.settings(settings.model_copy(update={"state_dir": self.state_of(name)}))
        since = {number: committed.get(("impressions", number), 0) for number in ends}
        self.lives.append(replace(life(self.settings.join), impressions_from=since, examples_from=ends))

    async def refused(self, pattern: str, *workers: FaultWorker) -> None:
        """Wait until each worker has exited with 1 for a second time, with `pattern` in its log; then keep it ended."""
        for worker in workers:
            async with happens(f"the worker ends, and says {pattern!r}"):
                while worker.ended.count(1) < 2:
                    await asyncio.sleep(POLL_S)
            worker.wanted = False
            worker.kill()
            log = worker.log.read_text(errors="replace")
            assert re.search(pattern, log), f"expected the worker to say {pattern!r}, found:\n{log[-3_000:]}"

    def hold(self) -> None:
        """Keep back the second half of the stream's last phase until `go_on`: workers have work left after the fault."""
        self._second_half.clear()

    def go_on(self) -> None:
        self._second_half.set()

    async def pause(self, least_s: float, most_s: float) -> None:
        await asyncio.sleep(self.draw.uniform(least_s, most_s))

    def over(self) -> None:
        """Note that the fault is over: recovery begins."""
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
        async with Sender(self.settings) as sender:
            for number, phase in enumerate(self.stream.phases):
                half = len(phase.rows) // 2
                await sender.send(phase.rows[:half], over_s=phase.over_s / 2)
                if phase is self.stream.phases[-1]:
                    await self._second_half.wait()
                await sender.send(phase.rows[half:], over_s=phase.over_s / 2)
                await asyncio.sleep(phase.pause_s)
                if phase.watermark_ms >= 0:
                    await sender.watermark(phase.watermark_ms)
                    sent = [row for done in self.stream.phases[: number + 1] for row in done.rows]
                    await self.complete(sent, phase.watermark_ms)
        self.sent = True

    async def supervise(self) -> None:
        """Start workers again that end by themselves, as a supervisor would."""
        while True:
            for worker in self.workers.values():
                if worker.wanted and (code := worker.returncode) is not None:
                    worker.ended.append(code)
                    if len(worker.ended) > MAX_RESTARTS:
                        raise AssertionError(f"it ends again and again: {worker.log.read_text()[-3_000:]}")
                    worker.start()
            await asyncio.sleep(POLL_S)

    async def watch(self) -> None:
        """Note how far `examples` is committed, again and again."""
        topic = TopicNames.of(self.settings.topics).examples
        places = [TopicPartition(topic, number) for number in range(self.settings.topics.partitions)]
        options = {**aiokafka_options(self.settings.kafka), "request_timeout_ms": 5_000}
        while True:
            with contextlib.suppress(KafkaError, TimeoutError, OSError):
                consumer = AIOKafkaConsumer(**options, isolation_level="read_committed")
                try:
                    await consumer.start()
                    since = 0.0  # when the previous answer was asked for
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
                finally:  # also for a consumer that could not start
                    await consumer.stop()
            await asyncio.sleep(POLL_S)

    async def ledger(self, sent: list[Sent] | None = None, until_ms: int = FOREVER_MS) -> Ledger:
        """A ledger of the logs as they are now against the events that were sent."""
        found = await asyncio.to_thread(self.logs.read)
        return Ledger(self.lives, found, self.stream.rows if sent is None else sent, until_ms=until_ms)

    async def complete(self, sent: list[Sent] | None = None, until_ms: int = FOREVER_MS) -> Ledger:
        """Wait until no label that the watermark settles is missing, or until something is doubled or wrong."""
        ends = time.monotonic() + PATIENCE_S
        while (ledger := await self.ledger(sent, until_ms)).lost and not ledger.doubled and not ledger.wrong:
            if time.monotonic() > ends:
                break
            await asyncio.sleep(0.3)
        return ledger

    async def settle(self) -> Ledger:
        """End the stream, wait for what is missing, stop the workers cleanly, and check."""
        async with Sender(self.settings) as sender:
            await sender.watermark(self.stream.last_ms + 2 * max(life.window_ms for life in self.lives))
        began = time.monotonic()
        problems = (await self.complete()).problems
        for worker in self.workers.values():
            if worker.wanted:
                while not await asyncio.to_thread(worker.is_ready) and time.monotonic() < began + PATIENCE_S:
                    await asyncio.sleep(POLL_S)  # one that is starting has no handler for SIGTERM yet
                worker.wanted = False
                worker.ask_to_stop()
                await asyncio.to_thread(worker.wait_stopped, END_S)
                if worker.returncode and not (self.drains_late and worker.returncode == 1):
                    problems.append(f"asked to stop, {worker.log.name} ended with {worker.returncode}")
        ledger = await self.ledger()
        ledger.problems = [*problems, *(problem for problem in ledger.problems if problem not in problems)]
        return ledger


def life(join: JoinSettings) -> Life:
    """Settings as the ledger knows them, from the beginning."""
    hold_ms = min(join.hold_ms, join.window_ms)
    return Life(join.window_ms, hold_ms, join.dedupe_horizon_ms, join.negative_skew_ms, join.negative_rate)


def _with_join(settings: Settings, **join: object) -> Settings:
    return settings.model_copy(update={"join": settings.join.model_copy(update=join)})


def _join(join: JoinSettings, *, static: bool, **chosen: object) -> JoinSettings:
    """Small steps, forgetting on the way, no idling, and short sessions."""
    update = {
        "window_ms": WINDOW_MS,
        "lateness_ms": LATENESS_MS,
        "dedupe_horizon_ms": HORIZON_MS,
        "max_future_ms": MAX_FUTURE_MS,
        "max_ahead_ms": 5_000,
        "idle_timeout_ms": 600_000,
        "step_ms": 10,
        "max_outputs": 100,
        "session_timeout_ms": 2_000,
        "instance_id": "one" if static else None,
    }
    return join.model_copy(update={**update, **chosen})
