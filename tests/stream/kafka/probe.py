"""A Faust app that notes every run that the transport delivers, and producers that write what it reads."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.structs import TopicPartition
from faust.types import TP

from deploy.settings import Settings
from stream.kafka.batches import BATCH_BYTES, send_batches
from stream.kafka.clients import aiokafka_options
from stream.kafka.transport import (
    Run,
    RunApp,
    RunSchema,
)
from stream.topics.names import TopicNames
from stream.worker.app import build_app

__all__ = ["PATIENCE_S", "Probe", "assert_contiguous", "log_ends", "probing", "producing", "send"]


PATIENCE_S = 30.0


class Probe:
    """A run app that notes what it is handed, and by default goes on from there."""

    def __init__(self, settings: Settings, start: int = 0) -> None:
        self.topic = TopicNames.of(settings.topics).impressions
        self.group = f"{settings.topics.prefix}probe"
        self.wanted = {TP(self.topic, number): start for number in (0, 1)}
        self.runs: list[Run] = []
        self.refused = 0
        self.after_run: Callable[[Run], Awaitable[None]] | None = None
        self.app: RunApp = build_app(
            self.group, settings.kafka, next_offset=lambda tp: self.wanted.get(tp), session_timeout_ms=6_000
        )
        topic = self.app.topic(self.topic, schema=RunSchema(), acks=False)
        self.agent = self.app.agent(topic, name="probe")(self._consume)

    async def _consume(self, stream: Any) -> None:
        async for run in stream:
            tp = TP(run.topic, run.partition)
            # As the workers do: what isn't the run expected next was fetched before a seek.
            if run.before != self.wanted[tp]:
                self.refused += 1
                await self.app.consumer.seek_runs({tp: self.wanted[tp]})
                continue
            self.wanted[tp] = run.after
            self.runs.append(run)
            if self.after_run is not None:
                await self.after_run(run)

    def of(self, number: int) -> list[Run]:
        return [run for run in self.runs if run.partition == number]

    def keys(self, number: int) -> list[bytes]:
        return [record.key for run in self.of(number) for record in run.records]

    async def until(self, true: Callable[[], bool]) -> None:
        ends = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < ends, f"wanted next {self.wanted}, {len(self.runs)} runs"
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def probing(settings: Settings, start: int = 0) -> AsyncIterator[Probe]:
    probe = Probe(settings, start)
    await probe.app.start()
    try:
        yield probe
    finally:
        with contextlib.suppress(asyncio.CancelledError):
            await probe.app.stop()


@contextlib.asynccontextmanager
async def producing(settings: Settings, transactional_id: str | None = None) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(
        **aiokafka_options(settings.kafka), transactional_id=transactional_id, max_batch_size=BATCH_BYTES, acks="all"
    )
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def send(producer: AIOKafkaProducer, topic: str, number: int, keys: list[bytes]) -> int:
    """Send records named by `keys`; the offset after them."""
    sent = [await future for future in await send_batches(producer, topic, number, [(key, b"v", []) for key in keys])]
    return sent[-1].offset + len(keys)


async def log_ends(settings: Settings, topic: str) -> dict[int, int]:
    """The last stable offset of both partitions."""
    async with AIOKafkaConsumer(**aiokafka_options(settings.kafka), isolation_level="read_committed") as consumer:
        ends = await consumer.end_offsets([TopicPartition(topic, number) for number in (0, 1)])
        return {tp.partition: end for tp, end in ends.items()}


def assert_contiguous(runs: list[Run], start: int = 0) -> None:
    """Positions join one another, and records lie where their run says, in order."""
    position = start
    for run in runs:
        assert run.before == position
        offsets = [record.offset for record in run.records]
        assert offsets == sorted(set(offsets))
        assert all(run.before <= offset < run.after for offset in offsets)
        position = run.after
