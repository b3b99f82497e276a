"""A chain of made-up weights: a trainer that writes deltas and versions, a log that can be damaged, and a store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from model.errors import DigestMismatch, ModelError
from state.chain import Problem
from state.gate_report import GateReport
from state.registry import Champion, RegistryState, VersionRecord
from state.rewinds import Rewind, Rewinds
from stream.records.delta import DeltaHeader, Point
from stream.records.heartbeat import Mark
from stream.scorer.replica import DeltaLog, LogItem
from stream.scorer.serving import Served, WeightsState

MASK = (1 << 64) - 1

Rows = dict[int, int]


def digest_of(rows: Rows) -> int:
    return sum(hash((key, value)) for key, value in rows.items()) & MASK


class Change(NamedTuple):
    """What a delta changes, and the digest after it."""

    rows: Rows
    digest: int


class Delta(NamedTuple):
    header: DeltaHeader
    model: Any


class Weights:
    """What `model.predictor.Predictor` is, with numbers for rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.digest, self.negative_rate = dict(rows), digest_of(rows), 1.0
        self.scrubs = 0

    def prepare(self, change: Change) -> tuple[int, Change]:
        if not isinstance(change, Change):
            raise ModelError("expected rows of this model")
        old = {key: self.rows[key] for key in change.rows if key in self.rows}
        found = (self.digest - digest_of(old) + digest_of(change.rows)) & MASK
        if found != change.digest:
            raise DigestMismatch(f"expected the digest {change.digest:016x}, found {found:016x}")
        return self.digest, change

    def apply(self, prepared: tuple[int, Change]) -> None:
        before, change = prepared
        assert before == self.digest and threading.current_thread().name.startswith("scoring")
        self.rows.update(change.rows)
        self.digest = change.digest

    def scrub(self) -> Iterator[bool | None]:
        self.scrubs += 1
        yield None
        yield digest_of(self.rows) == self.digest


@dataclass
class Trainer:
    """Writes a chain. Nothing is published by itself: `delta` changes the weights and appends to the log."""

    log: Log
    chain: str = "deepfm/1/0"
    line: int = 1
    sequence: int = 0
    rows: Rows = field(default_factory=lambda: {1: 10})
    parent: Point | None = None
    versions: dict[int, Rows] = field(default_factory=dict)
    records: dict[int, VersionRecord] = field(default_factory=dict)
    rewinds: Rewinds = field(default_factory=Rewinds)

    def make(self, **changed: Any) -> Delta:
        """The next delta; the weights and the sequence have moved on, the log has not."""
        before = self.parent or Point(self.chain, self.sequence)
        rebase, self.parent = self.parent is not None, None
        self.sequence += 1
        change = {self.sequence: 100 * self.sequence, 1: self.sequence}
        self.rows |= change
        fields: dict[str, Any] = {
            "chain": self.chain,
            "sequence": self.sequence,
            "parent": before,
            "offsets": {},
            "watermark_ms": 0,
            "examples_seen": 0,
            "negative_rate": 0.5,
            "at_ms": 1_000 * self.sequence,
            "rebase": rebase,
            "rows": len(change),
            "digest": f"{digest_of(self.rows):016x}",
            **changed,
        }
        header = DeltaHeader(**fields)
        return Delta(header, Change(change, int(header.digest, 16)))

    def delta(self, count: int = 1, **changed: Any) -> None:
        for _ in range(count):
            self.log.append(self.make(**changed))

    def restart(self, epoch: int) -> None:
        """Another trainer goes on from here, in a chain of its own."""
        self.parent = Point(self.chain, self.sequence)
        self.chain, self.sequence = f"deepfm/{epoch}/0", 0

    def version(self, number: int, **changed: Any) -> VersionRecord:
        self.versions[number] = dict(self.rows)
        fields: dict[str, Any] = {
            "version": number,
            "chain": self.chain,
            "sequence": self.sequence,
            "digest": f"{digest_of(self.rows):016x}",
            "deltas_offset": self.log.end,
            "verdict": GateReport(line=self.line),
            "good_at_ms": 1,
            **changed,
        }
        self.records[number] = VersionRecord(**fields)
        return self.records[number]

    def registry(self, champion: int, *, hold: bool = False, **changed: Any) -> RegistryState:
        return RegistryState(dict(self.records), Champion(version=champion, hold=hold, **changed), rewinds=self.rewinds)

    def gone_back(self, to: int, chain: str) -> None:
        """The registry says that the trainer has gone back to a version, and has begun a chain there."""
        rewind = Rewind(version=to, who="ann", at_ms=1, reason="bad", operation="one", up_to=max(self.records), chain=chain)
        self.rewinds = Rewinds(rewinds=(rewind,))


class Log:
    """The log of deltas. Offsets go up by ten, as pieces and markers take some."""

    def __init__(self) -> None:
        self.items: list[LogItem] = []
        self.opened: list[int] = []
        self.broken: Exception | None = None
        self._news = asyncio.Event()

    @property
    def end(self) -> int:
        return self.items[-1].next_offset if self.items else 5

    def append(self, found: Any) -> None:
        self.items.append(LogItem(found, self.end + 10))
        self._news.set()

    def problem(self, *args: Any) -> None:
        self.append(Problem(*args))

    @asynccontextmanager
    async def open(self, offset: int) -> AsyncIterator[DeltaLog]:
        self.opened.append(offset)
        if self.broken is not None:
            raise self.broken
        yield _Reading(self, offset)

    async def wait(self) -> None:
        self._news.clear()
        await self._news.wait()


class _Reading:
    def __init__(self, log: Log, position: int) -> None:
        self._log, self.position = log, position

    @property
    def at_end(self) -> bool:
        return self.position >= self._log.end

    async def __aiter__(self) -> AsyncIterator[LogItem]:
        while True:
            item = next((each for each in self._log.items if each.next_offset > self.position), None)
            if item is None:
                await self._log.wait()
                continue
            self.position = item.next_offset
            yield item


class Store:
    """Reads versions, when it is told to."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.asked: list[int] = []
        self.broken: set[int] = set()
        self.held: dict[int, threading.Event] = {}

    def load(self, version: int) -> Served:
        self.asked.append(version)
        if version in self.held:
            assert self.held[version].wait(10)
        if version in self.broken:
            raise RuntimeError(f"version {version} is broken")
        rows = self.trainer.versions[version]
        weights: Any = Weights(rows)
        digest = f"{weights.digest:016x}"
        sequence = self.trainer.records[version].sequence or 0
        state = WeightsState(version, 1_000 * version, digest=weights.digest, recent=(Mark(sequence, digest),))
        decoder: Any = None
        return Served(state, decoder, weights, size=1)
