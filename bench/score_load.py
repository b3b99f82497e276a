"""The load of `bench/score.py`: requests at a steady rate, their answers, and latencies by the broker's clock."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.structs import TopicPartition

from deploy.datasets import DataSet

__all__ = ["Load", "Offered", "request_bodies"]

POOL = 2_000  # distinct requests, sent in turn
STEP_S = 0.002  # pause between two looks at the requests that are due


def request_bodies(data_set: DataSet, candidates: int, seed: int = 0) -> list[bytes]:
    """Score requests from a data set, without their ids: the context of one impression, and items of others as candidates."""
    chunk = next(iter(data_set.chunks()))
    rng = np.random.default_rng(seed)
    bodies = []
    for row in rng.integers(0, len(chunk), POOL).tolist():
        rows = rng.integers(0, len(chunk), candidates).tolist()
        listed = (b'{"id":%b,"features":%b}' % (msgspec.json.encode(chunk.items[i] or "-"), chunk.candidates[i]) for i in rows)
        bodies.append(b'"context":%b,"candidates":[%b]}' % (chunk.contexts[row], b",".join(listed)))
    return bodies


@dataclass(slots=True)
class Offered:
    """The result of a stretch of load. Latencies are in ms, by the broker's clock and by the client's."""

    rate: float
    sent: int = 0
    answered: int = 0
    errors: int = 0
    behind: int = 0  # requests that weren't answered `late_s` seconds after the last request
    broker_ms: list[float] = field(default_factory=list)
    client_ms: list[float] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)

    def quantile(self, q: float, *, client: bool = False) -> float:
        values = self.client_ms if client else self.broker_ms
        return round(float(np.quantile(values, q)), 2) if values else float("inf")

    def holds(self, limit_ms: float) -> bool:
        """Whether every request was answered with scores and without a backlog, 99 % of them within the limit."""
        return not self.behind and not self.errors and self.quantile(0.99) <= limit_ms


class Load:
    """Sends requests and reads their answers; an async context manager. Use it for one stretch of load at a time."""

    def __init__(self, bootstrap_servers: str, requests: str, scores: str, partitions: int, bodies: list[bytes]) -> None:
        self._servers, self._requests, self._scores = bootstrap_servers, requests, scores
        self._partitions, self._bodies = partitions, bodies
        self._round = 0
        self._due: dict[bytes, float] = {}  # request → time at which it was due to be sent
        self._appended: dict[bytes, int] = {}  # request → LogAppendTime
        self._answers: dict[bytes, tuple[int, float]] = {}  # request → LogAppendTime of the answer, time at which it was read
        self._bad = 0
        self._versions: set[int] = set()
        self._producer: Any = None
        self._consumer: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Load:
        self._producer = AIOKafkaProducer(bootstrap_servers=self._servers, acks=1, max_batch_size=900_000)
        self._consumer = AIOKafkaConsumer(bootstrap_servers=self._servers, enable_auto_commit=False, fetch_max_wait_ms=100)
        await self._producer.start()
        await self._consumer.start()
        self._consumer.assign([TopicPartition(self._scores, number) for number in range(self._partitions)])
        await self._consumer.seek_to_end()
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
        await self._producer.stop()
        await self._consumer.stop()

    async def warm_up(self, timeout_s: float = 120.0) -> None:
        """Send a light load until all requests are answered with scores. Raises SystemExit after `timeout_s`."""
        until = time.monotonic() + timeout_s
        while True:
            offered = await self.offer(50, 2.0)
            if offered.answered == offered.sent and not offered.errors:
                return
            if time.monotonic() > until:
                raise SystemExit(f"no scores within {timeout_s:.0f} s: {offered.answered} of {offered.sent} answered")

    async def offer(self, rate: float, seconds: float, *, late_s: float = 1.0, drain_s: float = 30.0) -> Offered:
        """Send `rate` requests a second for some seconds, then wait for missing answers.

        Args:
            late_s: requests that aren't answered this long after the last request are the backlog.
            drain_s: longest wait for the backlog, so that the next stretch begins without one.
        """
        self._round += 1
        for kept in (self._due, self._appended, self._answers, self._versions):
            kept.clear()
        self._bad = 0
        total = int(rate * seconds)
        began = time.perf_counter()
        sent = 0
        while sent < total:
            due = min(int((time.perf_counter() - began) * rate) + 1, total)
            for number in range(sent, due):
                await self._ask(number, began + number / rate)
            sent = due
            await asyncio.sleep(STEP_S)
        offered = Offered(rate, sent=total)
        await self._answered(total, late_s)
        offered.behind = total - len(self._answers)
        if offered.behind:
            await self._answered(total, drain_s)
        offered.answered, offered.errors, offered.versions = len(self._answers), self._bad, set(self._versions)
        for key, (appended_ms, read_s) in list(self._answers.items()):
            if key in self._appended:
                offered.broker_ms.append(appended_ms - self._appended[key])
                offered.client_ms.append((read_s - self._due[key]) * 1_000)
        return offered

    async def _ask(self, number: int, due: float) -> None:
        name = b"%d-%d" % (self._round, number)
        value = b'{"request_id":"%b",%b' % (name, self._bodies[number % len(self._bodies)])
        self._due[name] = due
        future = await self._producer.send(self._requests, value=value, key=name)
        future.add_done_callback(lambda done: self._note(name, done))

    def _note(self, name: bytes, done: asyncio.Future[Any]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._appended[name] = done.result().timestamp

    async def _answered(self, total: int, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while len(self._answers) < total and time.monotonic() < until:
            await asyncio.sleep(0.02)

    async def _read(self) -> None:
        prefix = b""
        async for record in self._consumer:
            prefix = b"%d-" % self._round
            if not record.key or not record.key.startswith(prefix) or record.key in self._answers:
                continue
            self._answers[record.key] = (record.timestamp, time.perf_counter())
            # Answers aren't decoded as a whole: the load must cost little compared with the scorer.
            if b'"error"' in record.value:
                self._bad += 1
            else:
                self._versions.add(_version(record.value))


def _version(value: bytes) -> int:
    digits = value.partition(b'"model_version":')[2].partition(b",")[0].strip(b" }")
    return int(digits) if digits.isdigit() else -1
