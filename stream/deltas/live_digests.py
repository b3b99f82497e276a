"""Compares the digests of the weights of live scorers with one another and with the trainer's, at equal points of a chain.

A digest stands for all weights (`model.digest`), so whoever reports the same digest has the same weights, bit for bit. A
heartbeat names the last points that its scorer was at, and each delta and each version names its own. So they are compared
although they report at different times.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import NamedTuple

from state.registry import VersionRecord
from stream.deltas.pieces import FoundDelta
from stream.deltas.reader import DeltaReader
from stream.errors import TopicError
from stream.records.delta import DeltaHeader
from stream.records.heartbeat import Heartbeat
from stream.registry.heartbeat import HeartbeatReader
from stream.registry.log import read_registry
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["Difference", "LiveDigests", "compare_live"]

# Records at the end of the log that are read first: some seconds of deltas, and at least the last one where none come.
TAIL_RECORDS = 64
# How often heartbeats are looked at. Each names the last eight points, which are two seconds at four deltas a second.
LOOK_S = 0.25


class Difference(NamedTuple):
    """A point of a chain at which not all report the same digest: who reports which."""

    chain: str
    sequence: int
    digests: dict[str, list[str]]


class LiveDigests:
    """What was reported so far, by point. A version is named `version N`, the trainer's deltas TRAINER, a scorer by its id."""

    TRAINER = "the trainer"

    def __init__(self) -> None:
        self._points: dict[tuple[str, int], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.beats: dict[str, Heartbeat] = {}
        """The last heartbeat of every scorer."""

    def add_versions(self, versions: Iterable[VersionRecord]) -> None:
        """Take the digests of announced versions."""
        for record in versions:
            if record.chain and record.sequence is not None and record.digest:
                self._points[record.chain, record.sequence][record.digest].add(f"version {record.version}")

    def add_delta(self, header: DeltaHeader) -> None:
        """Take the digest that the trainer has written with a delta."""
        self._points[header.chain, header.sequence][header.digest].add(self.TRAINER)

    def add_beats(self, beats: Iterable[Heartbeat]) -> None:
        """Take the last heartbeats of the live scorers."""
        self.beats = {beat.worker: beat for beat in beats}
        for beat in self.beats.values():
            for mark in beat.marks:
                self._points[beat.chain, mark.sequence][mark.digest].add(beat.worker)

    @property
    def compared(self) -> int:
        """Number of points at which a scorer was compared with another one, with the trainer, or with a version."""
        return sum(
            len(names) > 1 and not names.isdisjoint(self.beats)
            for names in (set().union(*digests.values()) for digests in self._points.values())
        )

    @property
    def alone(self) -> list[str]:
        """Scorers with weights that were at no point which another one, the trainer or a version was at too."""
        met: set[str] = set()
        for digests in self._points.values():
            names = set().union(*digests.values())
            if len(names) > 1:
                met |= names
        return sorted(worker for worker, beat in self.beats.items() if beat.version >= 0 and worker not in met)

    @property
    def differences(self) -> list[Difference]:
        """Where digests differ, in the order of chains and points."""
        return [
            Difference(chain, sequence, {digest: sorted(names) for digest, names in sorted(digests.items())})
            for (chain, sequence), digests in sorted(self._points.items())
            if len(digests) > 1
        ]


async def compare_live(kafka: KafkaSettings, names: TopicNames, *, wait_ms: int) -> LiveDigests:
    """Look at the heartbeats until every scorer was compared with something, at most for `wait_ms`. Writes nothing.

    Raises:
        NoAnswer: Kafka can't be reached.
        TopicError: a topic is missing.
    """
    found = LiveDigests()
    deadline = time.monotonic() + wait_ms / 1_000
    async with HeartbeatReader(kafka, names) as scorers, _newest_deltas(kafka, names) as deltas:
        while True:
            while deltas is not None and (each := await deltas.next(timeout_s=LOOK_S / 10)) is not None:
                if isinstance(each, FoundDelta):  # the first records may be the rest of a delta
                    found.add_delta(each.delta.header)
            state = await read_registry(kafka, names)
            found.add_versions(state.versions.values())
            found.add_beats(await scorers.live())
            if not found.alone or time.monotonic() >= deadline:
                return found
            await asyncio.sleep(LOOK_S)


@asynccontextmanager
async def _newest_deltas(kafka: KafkaSettings, names: TopicNames) -> AsyncIterator[DeltaReader | None]:
    """Reads the log of deltas from a little before its end on; None in a system without the topic."""
    reader = DeltaReader(kafka, names, start=None)
    try:
        await reader.open()
    except TopicError:
        yield None
        return
    start = max(0, reader.position - TAIL_RECORDS)
    await reader.close()
    reader = DeltaReader(kafka, names, start=start)
    try:
        await reader.open()
        yield reader
    finally:
        await reader.close()
