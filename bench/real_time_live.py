"""`bench/real_time.py` at real speed: a service asks for scores, shows its impressions, and sends them with their scores."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from bench.delay_exact import Stream, simulated
from bench.real_time_figures import Served
from deploy.feeding.arrivals import arrivals
from deploy.feeding.feed import Feed
from deploy.feeding.simulation import Simulation, generate
from deploy.processes.workers import Worker
from deploy.settings import Settings
from state.store import SnapshotStore
from stream.kafka.clients import aiokafka_options
from stream.kafka.read_log import read_to
from stream.records.example import read_example
from stream.records.join_notes import is_note
from stream.registry.log import read_registry
from stream.topics.names import TopicNames

__all__ = ["LiveRun", "run_live"]

AHEAD_MS = 20_000  # with 0.1 s for each thousand impressions: time for generating a stream, with a margin
TICK_S = 0.01
ANSWER_S = 0.5  # a service waits at most this long for scores, then shows its impressions without
PRINT_S = 30.0


class _Score(msgspec.Struct):
    id: str
    score: float


class _Answer(msgspec.Struct):
    request_id: str
    scores: list[_Score] = []
    model_version: int | None = None


@dataclass(slots=True)
class LiveRun:
    """The result of a run."""

    stream: Stream
    served: Served
    versions: int  # number of versions announced
    promoted_seen: dict[int, _LabelCounts]  # what each version that was ever promoted had learned
    gate: dict[int, str]  # the gate's decision on each version
    busy: float  # share of the machine in use

    @property
    def one_class_promoted(self) -> int:
        """Number of versions that were promoted and had seen one class only."""
        return sum(min(seen) == 0 for seen in self.promoted_seen.values())


class _LabelCounts(NamedTuple):
    """First labels of each class."""

    clicks: int
    others: int


@dataclass(slots=True)
class _Asked:
    """A request for scores of some rows of the stream, which the service waits for until `until_s` (monotonic)."""

    rows: list[int]
    until_s: float


@dataclass(slots=True)
class _Service:
    """Asks for scores and sends impressions, with one request for all impressions of a tick."""

    feed: Feed
    names: TopicNames
    keys: list[bytes]
    values: list[bytes]
    scores: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int64]
    asked: dict[str, _Asked] = field(default_factory=dict)
    sent: set[str] = field(default_factory=set)
    alive: bool = False
    number: int = 0

    async def show(self, rows: list[int]) -> None:
        """Ask for scores of impressions that are due."""
        self.number += 1
        name = f"tick-{self.number}"
        candidates = b",".join(b'{"id":"%d","features":%b}' % (row, _features(self.values[row])) for row in rows)
        deadline_ms = time.time_ns() // 1_000_000 + int(ANSWER_S * 1_000)
        request = b'{"request_id":"%b","context":{},"candidates":[%b],"deadline_ms":%d}' % (
            name.encode(),
            candidates,
            deadline_ms,
        )
        await self.feed.send(self.names.score_requests, [name.encode()], [request])
        if self.alive:
            self.asked[name] = _Asked(rows, time.monotonic() + ANSWER_S)
        else:  # before the first version it doesn't wait for scores
            await self.send(rows)

    async def answered(self, answer: _Answer) -> None:
        """Send the impressions of a request with the scores of its answer."""
        if answer.model_version is None:
            return
        self.alive = True
        asked = self.asked.pop(answer.request_id, None)
        if asked is None:
            return
        for scored in answer.scores:
            self.scores[int(scored.id)], self.versions[int(scored.id)] = scored.score, answer.model_version
        await self.send(asked.rows)

    async def give_up(self) -> None:
        """Send impressions without a score if their request has waited too long."""
        now_s = time.monotonic()
        for name in [name for name, asked in self.asked.items() if asked.until_s < now_s]:
            await self.send(self.asked.pop(name).rows)

    async def send(self, rows: list[int]) -> None:
        """Send impressions, with their scores if they have any."""
        values: list[bytes | None] = []
        for row in rows:
            value = self.values[row]
            if self.versions[row] >= 0:
                score = msgspec.json.encode(float(self.scores[row]))
                value = b'%b,"score":%b,"model_version":%d}' % (value[:-1], score, int(self.versions[row]))
            values.append(value)
        await self.feed.send(self.names.impressions, [self.keys[row] for row in rows], values)


def _features(impression: bytes) -> bytes:
    """The features of an encoded impression, which are its last member."""
    return impression[impression.index(b'"features":') + len(b'"features":') : -1]


async def run_live(simulation: Simulation, settings: Settings, env: dict[str, str], work: Path) -> tuple[LiveRun, Simulation]:
    """Start the workers, send the stream at the times of its events, and score each impression when it is shown.

    Returns:
        The run, and the simulation with the time at which it began.
    """
    workers = [Worker(kind, env, work / f"{kind}.log", cwd=work) for kind in ("join", "trainer", "scorer")]
    try:
        for worker in workers:
            worker.start()
        for worker in workers[:2]:  # the scorer is only ready once there is a version
            await asyncio.to_thread(worker.wait_ready, 120.0)
        ahead_ms = AHEAD_MS + simulation.count // 10
        while True:
            # The stream is generated before it begins, since its events carry their times. On a busy machine this may take too
            # long; then it is generated again, for a later beginning.
            simulation = replace(simulation, start_ms=time.time_ns() // 1_000_000 + ahead_ms)
            drawn = _Drawn.of(simulation)
            if time.time_ns() // 1_000_000 < simulation.start_ms:
                return await _stream(simulation, drawn, settings, workers), simulation
            ahead_ms *= 2
    finally:
        for worker in workers:
            worker.ask_to_stop()
        for worker in workers:
            await asyncio.to_thread(worker.wait_stopped)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """The E records of a stream in the order in which they are sent. `rows` (E,): rows of the stream, -1 for clicks."""

    stream: Stream
    times_ms: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    keys: list[bytes]
    values: list[bytes]

    @classmethod
    def of(cls, simulation: Simulation) -> _Drawn:
        stream = simulated(simulation)
        sends = list(arrivals(generate(simulation), simulation))
        keys = [key for each in sends for key in each.keys]
        is_click = np.concatenate([each.is_click for each in sends]).tolist()
        # Impressions are numbered as the stream's rows.
        rows = [-1 if click else int(key.removeprefix(b"sim-")) for key, click in zip(keys, is_click, strict=True)]
        return cls(
            stream,
            np.concatenate([each.times_ms for each in sends]),
            np.array(rows),
            keys,
            [value or b"" for each in sends for value in each.values],
        )


async def _stream(simulation: Simulation, drawn: _Drawn, settings: Settings, workers: list[Worker]) -> LiveRun:
    """Send all records at their times; returns the scores that the service got."""
    names = TopicNames.of(settings.topics)
    stream, times_ms, keys, values = drawn.stream, drawn.times_ms, drawn.keys, drawn.values
    positions = np.empty(len(stream), np.int64)  # of the stream's rows among the records
    positions[drawn.rows[drawn.rows >= 0]] = np.flatnonzero(drawn.rows >= 0)
    scores = np.full(len(stream), np.nan, np.float32)
    versions = np.full(len(stream), -1, np.int64)
    busy = _Busy()
    async with AsyncExitStack() as stack:
        feed = await stack.enter_async_context(Feed(settings.kafka))
        service = _Service(
            feed,
            names,
            [keys[position] for position in positions.tolist()],
            [values[position] for position in positions.tolist()],
            scores,
            versions,
        )
        reader = await _answers(settings, names, feed, stack)
        await asyncio.sleep(max(0.0, simulation.start_ms / 1_000 - time.time()))
        sent, printed_s = 0, time.monotonic()
        last_ms = int(stream.shown_ms[-1])
        while sent < len(times_ms) and times_ms[sent] <= last_ms:
            now_ms = time.time_ns() // 1_000_000
            stop = int(np.searchsorted(times_ms, now_ms, side="right"))
            if stop > sent:
                due = np.arange(sent, stop)
                rows = drawn.rows[due][drawn.rows[due] >= 0].tolist()
                clicks = due[drawn.rows[due] < 0].tolist()
                if rows:
                    await service.show(rows)
                await feed.send(names.clicks, [keys[at] for at in clicks], [values[at] for at in clicks])
                sent = stop
            while not reader.empty():
                await service.answered(reader.get_nowait())
            await service.give_up()
            if time.monotonic() - printed_s > PRINT_S:
                printed_s = time.monotonic()
                for worker in workers:
                    worker.check()
                _print(stream, scores, versions, now_ms)
            await asyncio.sleep(TICK_S)
        await feed.flush()
    state = await read_registry(settings.kafka, names)
    promoted = {version for version, record in state.versions.items() if record.champion_at_ms}
    promoted |= set(versions[versions >= 0].tolist())
    created_ms = {version: record.created_at_ms for version, record in state.versions.items()}
    seen = await _seen(settings, names, sorted(promoted))
    join = settings.join
    return LiveRun(
        stream=stream,
        served=Served(
            scores,
            np.array([created_ms.get(version, -1) for version in versions.tolist()]),
            simulation.start_ms + join.held_ms + join.lateness_ms,
        ),
        versions=len(state.versions),
        promoted_seen=seen,
        gate={version: record.gate for version, record in state.versions.items()},
        busy=busy.share(),
    )


async def _answers(settings: Settings, names: TopicNames, feed: Feed, stack: AsyncExitStack) -> asyncio.Queue[_Answer]:
    """A queue that receives all answers from now on."""
    partitions = [TopicPartition(names.scores, number) for number in range(await feed.partitions(names.scores))]
    consumer: Any = AIOKafkaConsumer(**aiokafka_options(settings.kafka), enable_auto_commit=False, fetch_max_wait_ms=100)
    await consumer.start()
    stack.push_async_callback(consumer.stop)
    consumer.assign(partitions)
    await consumer.seek_to_end(*partitions)
    for partition in partitions:
        await consumer.position(partition)  # seeks now
    queue: asyncio.Queue[_Answer] = asyncio.Queue()
    decode = msgspec.json.Decoder(_Answer).decode

    async def read() -> None:
        async for record in consumer:
            queue.put_nowait(decode(record.value))

    task = asyncio.create_task(read())

    async def end() -> None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    stack.push_async_callback(end)
    return queue


async def _seen(settings: Settings, names: TopicNames, versions: list[int]) -> dict[int, _LabelCounts]:
    """The labels in the log up to the offsets of each version."""
    consumer: Any = AIOKafkaConsumer(
        **aiokafka_options(settings.kafka), enable_auto_commit=False, isolation_level="read_committed"
    )
    await consumer.start()
    labels: dict[int, list[tuple[int, bool]]] = {}
    try:
        partitions = [TopicPartition(names.examples, number) for number in range(settings.topics.partitions)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        await consumer.seek_to_beginning(*partitions)
        async for partition, records in read_to(consumer, ends):
            kept = labels.setdefault(partition.partition, [])
            for record in records:
                if not is_note(record):
                    kept.append((record.offset, read_example(record).click_ms >= 0))
    finally:
        await consumer.stop()
    store = SnapshotStore(settings.snapshots)
    seen = {}
    for version in versions:
        offsets = store.manifest(version).offsets
        below = [clicked for part, kept in labels.items() for offset, clicked in kept if offset < offsets.get(str(part), 0)]
        seen[version] = _LabelCounts(sum(below), len(below) - sum(below))
    return seen


def _print(stream: Stream, scores: npt.NDArray[np.float32], versions: npt.NDArray[np.int64], now_ms: int) -> None:
    stop = int(np.searchsorted(stream.shown_ms, now_ms - 1_000))
    start = int(np.searchsorted(stream.shown_ms, now_ms - 1_000 - int(PRINT_S * 1_000)))
    there = start + np.flatnonzero(~np.isnan(scores[start:stop]))
    second = (now_ms - int(stream.shown_ms[0])) // 1_000
    if not len(there):
        print(f"{second:5d} s  no scores yet", flush=True)
        return
    ratio = scores[there].mean() / stream.probabilities[there].mean()
    print(f"{second:5d} s  predictions over truth {ratio:6.3f}  version {versions[there[-1]]}", flush=True)


class _Busy:
    """The share of the machine that was in use since the object was made."""

    def __init__(self) -> None:
        self._began = self._ticks()

    @staticmethod
    def _ticks() -> tuple[int, int]:
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0, os.cpu_count() or 1
        fields = [int(each) for each in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return fields[3] + fields[4], sum(fields)

    def share(self) -> float:
        idle, total = self._ticks()
        return round(1 - (idle - self._began[0]) / max(1, total - self._began[1]), 3)
