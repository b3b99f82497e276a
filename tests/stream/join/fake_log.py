"""One partition of a cluster in memory: logs with gaps, transactions, committed offsets. Enough for a partition of the join."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from stream.topics.names import TopicNames

__all__ = ["Crash", "FakeConsumer", "FakeLog", "FakeProducer"]


class Crash(Exception):
    """The process ended here."""


class FakeLog:
    """What a `read_committed` reader sees: a record, or None for an offset that holds none (a marker, an aborted record)."""

    def __init__(self, names: TopicNames) -> None:
        self.topics: dict[str, list[Any]] = {
            name: [] for name in (names.impressions, names.clicks, names.examples, names.dead_letters)
        }
        self.starts = dict.fromkeys((names.impressions, names.clicks, names.examples), 0)  # below is deleted
        self.committed: dict[str, tuple[int, str]] = {}
        self.now_ms = 10**12  # when the first record of a topic arrives; each later one arrives a millisecond later

    def append(self, topic: str, key: bytes | None, value: bytes | None, headers: tuple[tuple[str, bytes], ...] = ()) -> None:
        log, more = self.topics[topic], {"headers": tuple(headers), "timestamp": self.now_ms + len(self.topics[topic])}
        log.append(SimpleNamespace(topic=topic, partition=0, offset=len(log), key=key, value=value, **more))

    def gap(self, topic: str) -> None:
        self.topics[topic].append(None)

    def records(self, topic: str, start: int = 0, until: int | None = None) -> list[Any]:
        return [record for record in self.topics[topic][start:until] if record is not None]


class _Batch:
    ROOM = 3  # records; small, so that steps need several

    def __init__(self) -> None:
        self.rows: list[tuple[bytes | None, bytes | None, Any]] = []

    def append(self, *, timestamp: int, key: bytes | None, value: bytes | None, headers: Any) -> object | None:
        if len(self.rows) == self.ROOM:
            return None
        self.rows.append((key, value, tuple(headers)))
        return object()


class FakeProducer:
    """A transactional producer. `crash` says where the next transaction ends the process: "before" or "after" the commit."""

    def __init__(self, log: FakeLog) -> None:
        self._log, self.crash = log, ""
        self._sent: list[tuple[str, int]] = []
        self._offsets: dict[str, tuple[int, str]] = {}

    async def begin_transaction(self) -> None:
        self._sent, self._offsets = [], {}

    def create_batch(self) -> _Batch:
        return _Batch()

    async def send_batch(self, batch: _Batch, topic: str, *, partition: int) -> asyncio.Future[Any]:
        assert partition == 0
        first = len(self._log.topics[topic])
        for row in batch.rows:
            self._sent.append((topic, len(self._log.topics[topic])))
            self._log.append(topic, *row)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(SimpleNamespace(offset=first))
        return future

    async def send_offsets_to_transaction(self, offsets: Any, group: str) -> None:
        self._offsets = {tp.topic: (offset.offset, offset.metadata) for tp, offset in offsets.items()}

    async def commit_transaction(self) -> None:
        committed = self.crash != "before"
        if committed:
            self._log.committed.update(self._offsets)
        for topic, offset in self._sent:
            if not committed:
                self._log.topics[topic][offset] = None
        for topic in {topic for topic, _ in self._sent}:
            self._log.gap(topic)
        if self.crash:
            raise Crash

    async def stop(self) -> None:
        pass


class FakeConsumer:
    """A consumer without a group; it fetches a few offsets at a time."""

    def __init__(self, log: FakeLog, fetch: int = 3) -> None:
        self._log, self._fetch = log, fetch
        self._tp: Any = None
        self._position = 0

    def assign(self, tps: list[Any]) -> None:
        [self._tp] = tps

    def seek(self, tp: Any, offset: int) -> None:
        assert tp == self._tp
        assert offset >= self._log.starts[tp.topic], "out of range"
        self._position = offset

    async def position(self, tp: Any) -> int:
        assert tp == self._tp
        return self._position

    def pause(self, tp: Any) -> None:
        assert tp == self._tp

    async def getmany(self, tp: Any, *, timeout_ms: int, max_records: int | None = None) -> dict[Any, list[Any]]:
        start, self._position = self._position, min(self._position + self._fetch, len(self._log.topics[tp.topic]))
        return {tp: self._log.records(tp.topic, start, self._position)}

    async def beginning_offsets(self, tps: list[Any]) -> dict[Any, int]:
        return {tp: self._log.starts[tp.topic] for tp in tps}
