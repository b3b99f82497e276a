"""Requesting scores before impressions are sent: the item shown among other items of that hour, for the user who sees it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import msgspec
import numpy as np
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from deploy.datasets.base import Chunk, draw_uniform
from deploy.feeding.feed import Feed
from deploy.feeding.stats import ReplayStats
from deploy.settings import Settings
from stream.kafka.clients import aiokafka_options
from stream.topics.names import TopicNames

__all__ = ["Scoring"]

_HOUR_MS = 3_600_000
_SAMPLES = 100_000  # latencies kept, so that a long replay's memory stays flat


class _Score(msgspec.Struct):
    id: str
    score: float
    shadow: float | None = None


class _Answer(msgspec.Struct):
    request_id: str
    scores: list[_Score] = []
    model_version: int | None = None
    delta: int = 0  # absent from an answer means 0
    shadow_version: int | None = None


class _Shown(NamedTuple):
    """An item that was shown."""

    time_ms: int
    item: str
    features: bytes


class _Asked(NamedTuple):
    """A request without an answer yet."""

    item: str  # the one that is shown
    at_s: float  # monotonic


class Scoring:
    """Sends the score requests of a step and collects their answers.

    A request has its impression's id, and a candidate has its item's id, so the score of the item shown can be found in the
    answer. The position of that item among the candidates is drawn.

    No step waits longer than `timeout_ms`. After a step without any answer, later steps don't wait at all until an answer
    comes. So the stream goes on unscored while there is no model yet, or while the scorers are down.
    """

    def __init__(
        self, settings: Settings, stats: ReplayStats, *, fraction: float, candidates: int, timeout_ms: int, seed: int
    ) -> None:
        self._settings = settings
        self._topics = TopicNames.of(settings.topics)
        self._fraction = fraction
        self._others = candidates - 1
        self._timeout_ms = timeout_ms
        self._seed = seed
        self._random = random.Random(seed)
        self._stats = stats
        self._row = 0  # impressions seen
        self._shown: list[_Shown] = []  # by event time
        self._oldest = 0  # index in `_shown` at which the last hour begins
        self._asked: dict[str, _Asked] = {}  # by request id
        self._answered: dict[str, bytes] = {}  # request id → members that the impression will carry
        self._new_answer = asyncio.Event()
        self._alive = True  # whether answers come, so that waiting is worth it
        self._feed: Feed | None = None
        self._decode = msgspec.json.Decoder(_Answer).decode

    @asynccontextmanager
    async def using(self, feed: Feed) -> AsyncIterator[None]:
        """Read answers while the `async with` block runs. Raises FeedError when the topic is missing."""
        self._feed = feed
        topic = self._topics.scores
        partitions = [TopicPartition(topic, number) for number in range(await feed.partitions(topic))]
        consumer = AIOKafkaConsumer(
            **aiokafka_options(self._settings.kafka),
            enable_auto_commit=False,
            auto_offset_reset="latest",
            fetch_max_wait_ms=100,
        )
        await consumer.start()
        reader: asyncio.Task[None] | None = None
        try:
            consumer.assign(partitions)
            await consumer.seek_to_end(*partitions)
            for partition in partitions:
                await consumer.position(partition)
            reader = asyncio.create_task(self._read(consumer))
            yield
        finally:
            if reader is not None:
                reader.cancel()
                with suppress(asyncio.CancelledError):
                    await reader
            await consumer.stop()

    async def ask(self, chunk: Chunk, rows: Sequence[int]) -> dict[int, bytes]:
        """Request scores for a sample of the rows. Raises FeedError.

        Returns:
            For each row answered in time, the members that its impression will carry.
        """
        assert self._feed is not None
        drawn = draw_uniform(np.arange(self._row, self._row + len(rows)), seed=self._seed + 1) < self._fraction
        self._row += len(rows)
        keys: list[bytes] = []
        values: list[bytes | None] = []
        sampled: dict[str, int] = {}
        deadline_ms = int(time.time() * 1_000) + self._timeout_ms
        for row, wanted in zip(rows, drawn.tolist(), strict=True):
            item, now_ms = chunk.items[row], int(chunk.timestamps_ms[row])
            if wanted:
                name = chunk.ids[row]
                keys.append(name.encode())
                values.append(self._request(name, chunk, row, now_ms, deadline_ms))
                sampled[name] = row
                self._asked[name] = _Asked(item, time.monotonic())
            self._shown.append(_Shown(now_ms, item, chunk.candidates[row]))
        if not sampled:
            return {}
        await self._feed.send(self._topics.score_requests, keys, values)
        self._stats.requests += len(keys)
        await self._wait_for_answers(sampled)
        served = {row: self._answered[name] for name, row in sampled.items() if name in self._answered}
        self._answered.clear()
        for name in sampled:
            self._asked.pop(name, None)
        return served

    def _request(self, name: str, chunk: Chunk, row: int, now_ms: int, deadline_ms: int) -> bytes:
        item = chunk.items[row]
        listed = [*self._drawn(item, now_ms).items(), (item, chunk.candidates[row])]
        self._random.shuffle(listed)
        user = chunk.users[row]
        candidates = b",".join(
            b'{"id":%b,"features":%b}' % (msgspec.json.encode(item or "-"), _with(features, chunk.pair(user, item)))
            for item, features in listed
        )
        return b'{"request_id":%b,"context":%b,"candidates":[%b],"deadline_ms":%d,"timestamp":%d}' % (
            msgspec.json.encode(name),
            chunk.contexts[row],
            candidates,
            deadline_ms,
            now_ms,
        )

    def _drawn(self, item: str, now_ms: int) -> dict[str, bytes]:
        """Other items shown within the hour before, and their features."""
        shown = self._shown
        while self._oldest < len(shown) and shown[self._oldest].time_ms < now_ms - _HOUR_MS:
            self._oldest += 1
        if self._oldest > 100_000:  # remove many at once: each removal copies the rest
            del shown[: self._oldest]
            self._oldest = 0
        others: dict[str, bytes] = {}
        # Draws include repeats and the item itself. Four times as many draws are nearly always enough; fewer items do no harm.
        for _ in range(4 * self._others if len(shown) > self._oldest else 0):
            other = shown[self._random.randrange(self._oldest, len(shown))]
            if other.item != item:
                others[other.item] = other.features
            if len(others) == self._others:
                break
        return others

    async def _wait_for_answers(self, sampled: dict[str, int]) -> None:
        until = time.monotonic() + self._timeout_ms / 1_000
        while self._alive and not sampled.keys() <= self._answered.keys():
            self._new_answer.clear()
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self._new_answer.wait()
            except TimeoutError:
                break
        self._alive = self._alive and any(name in self._answered for name in sampled)

    async def _read(self, consumer: Any) -> None:
        async for record in consumer:
            try:
                answer = self._decode(record.value or b"")
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue  # another producer's record; `headrace scores tail` shows it
            self._alive = self._alive or answer.model_version is not None
            asked = self._asked.pop(answer.request_id, None)
            if asked is None or answer.model_version is None:
                continue
            scored = next((each for each in answer.scores if each.id == (asked.item or "-")), None)
            if scored is not None:
                served = b',"score":%b,"model_version":%d,"delta":%d' % (
                    msgspec.json.encode(scored.score),
                    answer.model_version,
                    answer.delta,
                )
                if scored.shadow is not None and answer.shadow_version is not None:
                    beside = msgspec.json.encode(scored.shadow)
                    served += b',"shadow_score":%b,"shadow_version":%d' % (beside, answer.shadow_version)
                self._answered[answer.request_id] = served
                self._stats.answers += 1
                if len(self._stats.answer_ms) < _SAMPLES:
                    self._stats.answer_ms.append((time.monotonic() - asked.at_s) * 1_000)
            self._new_answer.set()


def _with(features: bytes, more: bytes) -> bytes:
    """The JSON object `features` with the members `more` added."""
    if not more:
        return features
    return b"%b,%b}" % (features[:-1], more) if features != b"{}" else b"{%b}" % more
