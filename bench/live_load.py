"""A live load on running workers: a service asks for scores, shows its impressions, and sends them with their scores.

Events are sent at the times that they carry, so the stream is drawn before it begins.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from deploy.evaluate.stream import Stream, simulated
from deploy.feeding.arrivals import arrivals
from deploy.feeding.feed import Feed
from deploy.feeding.simulation import Simulation, generate
from deploy.settings import Settings
from stream.kafka.clients import aiokafka_options
from stream.topics.names import TopicNames

__all__ = ["PRINT_S", "LiveStream", "Shown", "draw_live", "play_live"]

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
    delta: int = 0  # absent from an answer means 0


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
    deltas: dict[int, int] = field(default_factory=dict)
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
            row = int(scored.id)
            self.scores[row], self.versions[row], self.deltas[row] = scored.score, answer.model_version, answer.delta
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
                told = (score, int(self.versions[row]), self.deltas.pop(row))
                value = b'%b,"score":%b,"model_version":%d,"delta":%d}' % (value[:-1], *told)
            values.append(value)
        await self.feed.send(self.names.impressions, [self.keys[row] for row in rows], values)


def _features(impression: bytes) -> bytes:
    """The features of an encoded impression, which are its last member."""
    return impression[impression.index(b'"features":') + len(b'"features":') : -1]


@dataclass(frozen=True, slots=True)
class LiveStream:
    """The E records of a stream in the order in which they are sent. `rows` (E,): rows of the stream, -1 for clicks."""

    stream: Stream
    times_ms: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    keys: list[bytes]
    values: list[bytes]


def draw_live(simulation: Simulation, ahead_ms: int | None = None) -> tuple[LiveStream, Simulation]:
    """Draw a stream that begins a little later than now.

    If drawing it takes too long, as on a busy machine, it is drawn again for a later beginning.

    Returns:
        The stream, and the simulation with the time at which it begins.
    """
    ahead_ms = AHEAD_MS + simulation.count // 10 if ahead_ms is None else ahead_ms
    while True:
        simulation = replace(simulation, start_ms=time.time_ns() // 1_000_000 + ahead_ms)
        stream = _drawn(simulation)
        if time.time_ns() // 1_000_000 < simulation.start_ms:
            return stream, simulation
        ahead_ms *= 2


def _drawn(simulation: Simulation) -> LiveStream:
    stream = simulated(simulation)
    sends = list(arrivals(generate(simulation), simulation))
    keys = [key for each in sends for key in each.keys]
    is_click = np.concatenate([each.is_click for each in sends]).tolist()
    # Impressions are numbered as the stream's rows.
    rows = [-1 if click else int(key.removeprefix(b"sim-")) for key, click in zip(keys, is_click, strict=True)]
    return LiveStream(
        stream,
        np.concatenate([each.times_ms for each in sends]),
        np.array(rows),
        keys,
        [value or b"" for each in sends for value in each.values],
    )


@dataclass(frozen=True, slots=True)
class Shown:
    """What the service got for each impression of the stream, N of them.

    scores    float32 (N,)  NaN for an impression that was shown without a score
    versions  int64 (N,)    the version that gave the score, -1 without one
    """

    scores: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int64]


async def play_live(live: LiveStream, settings: Settings, start_ms: int, every_while: Callable[[Shown, int], None]) -> Shown:
    """Send all records at their times, up to the last impression.

    Args:
        start_ms: when the stream begins.
        every_while: called every `PRINT_S` with what was got so far, and the time (ms).
    """
    names = TopicNames.of(settings.topics)
    stream, times_ms, keys, values = live.stream, live.times_ms, live.keys, live.values
    positions = np.empty(len(stream), np.int64)  # of the stream's rows among the records
    positions[live.rows[live.rows >= 0]] = np.flatnonzero(live.rows >= 0)
    shown = Shown(np.full(len(stream), np.nan, np.float32), np.full(len(stream), -1, np.int64))
    async with AsyncExitStack() as stack:
        feed = await stack.enter_async_context(Feed(settings.kafka))
        service = _Service(
            feed,
            names,
            [keys[position] for position in positions.tolist()],
            [values[position] for position in positions.tolist()],
            shown.scores,
            shown.versions,
        )
        reader = await _answers(settings, names, feed, stack)
        await asyncio.sleep(max(0.0, start_ms / 1_000 - time.time()))
        sent, printed_s = 0, time.monotonic()
        last_ms = int(stream.shown_ms[-1])
        while sent < len(times_ms) and times_ms[sent] <= last_ms:
            now_ms = time.time_ns() // 1_000_000
            stop = int(np.searchsorted(times_ms, now_ms, side="right"))
            if stop > sent:
                due = np.arange(sent, stop)
                rows = live.rows[due][live.rows[due] >= 0].tolist()
                clicks = due[live.rows[due] < 0].tolist()
                if rows:
                    await service.show(rows)
                await feed.send(names.clicks, [keys[at] for at in clicks], [values[at] for at in clicks])
                sent = stop
            while not reader.empty():
                await service.answered(reader.get_nowait())
            await service.give_up()
            if time.monotonic() - printed_s > PRINT_S:
                printed_s = time.monotonic()
                every_while(shown, now_ms)
            await asyncio.sleep(TICK_S)
        await feed.flush()
    return shown


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
