"""`bench/real_time.py` at real speed: the scores that a service got, and the versions that gave them."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from bench.live_load import PRINT_S, LiveStream, Shown, draw_live, play_live
from bench.real_time_figures import Served
from deploy.evaluate.stream import Stream
from deploy.feeding.simulation import Simulation
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
        live, simulation = draw_live(simulation)
        return await _stream(simulation, live, settings, workers), simulation
    finally:
        for worker in workers:
            worker.ask_to_stop()
        for worker in workers:
            await asyncio.to_thread(worker.wait_stopped)


async def _stream(simulation: Simulation, live: LiveStream, settings: Settings, workers: list[Worker]) -> LiveRun:
    """Send all records at their times; returns the scores that the service got."""
    names, stream, busy = TopicNames.of(settings.topics), live.stream, _Busy()

    def look(shown: Shown, now_ms: int) -> None:
        for worker in workers:
            worker.check()
        _print(stream, shown.scores, shown.versions, now_ms)

    shown = await play_live(live, settings, simulation.start_ms, look)
    scores, versions = shown.scores, shown.versions
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


async def _seen(settings: Settings, names: TopicNames, versions: list[int]) -> dict[int, _LabelCounts]:
    """The labels in the log up to the offsets of each version."""
    consumer: Any = AIOKafkaConsumer(
        **aiokafka_options(settings.kafka), enable_auto_commit=False, isolation_level="read_committed"
    )
    await consumer.start()
    labels: dict[int, list[tuple[int, bool]]] = {}
    try:
        partitions = [TopicPartition(names.examples, number) for number in range(settings.topics.partitions)]
        ends = await consumer.end_offsets(partitions)
        consumer.assign(partitions)  # only now: a fetch of the ends after it could undo the seek
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
