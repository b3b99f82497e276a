"""A stream with every ordinary irregularity and known labels, sent to the real topics; workers that join it; what came out."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from deploy.demo.audit import Audit, Ledger
from deploy.demo.play import worker_environment
from deploy.feeding.feed import Feed
from deploy.processes.workers import Worker
from deploy.settings import Settings
from stream.topics.names import TopicNames
from tests.forked import ForkedWorker

__all__ = ["FIRST_MS", "Events", "end", "join_settings", "join_worker", "made_up", "send", "send_by", "settled", "until"]

FIRST_MS = 1_700_000_000_000
WINDOW_MS = 10_000
LATENESS_MS = 2_000
PATIENCE_S = 60.0


@dataclass(slots=True)
class Events:
    """Events in order of arrival, and what a join must make of them."""

    arriving: list[tuple[str, bytes, bytes]] = field(default_factory=list)  # impressions or clicks, key, value
    positives: set[bytes] = field(default_factory=set)
    negatives: set[bytes] = field(default_factory=set)
    dead: Counter[str] = field(default_factory=Counter)
    last_ms: int = 0

    @property
    def ids(self) -> set[bytes]:
        return self.positives | self.negatives

    def part(self, begin: float, end: float) -> list[tuple[str, bytes, bytes]]:
        """What arrives between two fractions of the stream."""
        return self.arriving[int(begin * len(self.arriving)) : int(end * len(self.arriving))]


def made_up(count: int, seed: int, *, every_ms: int = 25) -> Events:
    """`count` impressions, one every `every_ms`; out of order within the lateness, clicks before and after their impressions.

    An impression is positive exactly when one of its clicks is at most the window later. Clicks beyond the window and those of
    nobody are orphans; a repeated impression or click changes nothing.
    """
    draw, events = random.Random(seed), Events()
    timed: list[tuple[float, str, bytes, bytes]] = []

    def arrive(source: str, key: bytes, time_ms: int, value: bytes | None = None) -> None:
        body = b'{"impression_id":"%b","timestamp":%d,"features":{"u":"u%d"}}' % (key, time_ms, time_ms % 7)
        timed.append((time_ms + draw.uniform(0, 0.9 * LATENESS_MS), source, key, body if value is None else value))
        events.last_ms = max(events.last_ms, time_ms)

    for index in range(count):
        key, time_ms = b"%d-%d" % (seed, index), FIRST_MS + every_ms * index
        arrive("impressions", key, time_ms)
        if draw.random() < 0.05:
            arrive("impressions", key, time_ms)
        kind = draw.random()
        if kind < 0.3:
            # Half of them soon, so that many arrive before their impression; the edge of the window is in it.
            delay_ms = draw.choice([0, draw.randrange(200), draw.randrange(WINDOW_MS), WINDOW_MS])
            for _ in range(draw.choice([1, 1, 1, 2, 3])):
                arrive("clicks", key, time_ms + delay_ms)
            events.positives.add(key)
        else:
            events.negatives.add(key)
            if kind < 0.35:
                arrive("clicks", key, time_ms + WINDOW_MS + draw.choice([1, draw.randrange(1, 5_000)]))
                events.dead["orphan_click"] += 1
        if draw.random() < 0.02:
            arrive("clicks", b"nobody-" + key, time_ms)
            events.dead["orphan_click"] += 1
        if draw.random() < 0.01:
            arrive("clicks", b"broken-" + key, time_ms, b'{"impression_id":')
            events.dead["malformed_json"] += 1
    events.arriving = [(source, key, value) for _, source, key, value in sorted(timed, key=lambda row: row[0])]
    return events


async def send(settings: Settings, arriving: list[tuple[str, bytes, bytes]], *, over_s: float = 0.0) -> None:
    """Send events in their order, evenly over some time."""
    async with Feed(settings.kafka) as feed:
        await send_by(feed, settings, arriving, over_s=over_s)


async def send_by(feed: Feed, settings: Settings, arriving: list[tuple[str, bytes, bytes]], *, over_s: float = 0.0) -> None:
    """`send`, by a feed that goes on after it."""
    names = TopicNames.of(settings.topics)
    topics = {"impressions": names.impressions, "clicks": names.clicks}
    step, began = 25 if over_s else 500, time.monotonic()
    for start in range(0, len(arriving), step):
        rows = arriving[start : start + step]
        for source, topic in topics.items():
            mine = [(key, value) for where, key, value in rows if where == source]
            await feed.send(topic, [key for key, _ in mine], [value for _, value in mine])
        await asyncio.sleep(max(0.0, began + over_s * start / len(arriving) - time.monotonic()))
    await feed.flush()


async def end(settings: Settings, events: Events) -> None:
    """Say that nothing more comes: a watermark behind everything."""
    names = TopicNames.of(settings.topics)
    async with Feed(settings.kafka) as feed:
        await feed.watermark((names.impressions, names.clicks), events.last_ms + 2 * WINDOW_MS)
        await feed.flush()


def join_settings(settings: Settings, **join: object) -> Settings:
    """Settings under which `made_up` is joined as said: small steps, forgetting on the way, no idling."""
    chosen = {
        "window_ms": WINDOW_MS,
        "lateness_ms": LATENESS_MS,
        "dedupe_horizon_ms": 15_000,
        "max_ahead_ms": 5_000,
        "idle_timeout_ms": 600_000,
        "step_ms": 10,
        "max_outputs": 300,
        "instance_id": "one",
        **join,
    }
    return settings.model_copy(update={"join": settings.join.model_copy(update=chosen)})


def join_worker(settings: Settings, folder: Path, name: str = "join", *, change: str = "") -> Worker:
    """A join worker, not started, with a log of its own under `folder`. `change` is Python that it runs first."""
    return ForkedWorker("join", worker_environment(settings), folder / f"{name}.log", cwd=folder, change=change)


async def until(true: Callable[[], bool], what: str, *workers: Worker, patience_s: float = PATIENCE_S) -> None:
    """Poll until it is true. The workers named must keep running."""
    ends = time.monotonic() + patience_s
    while not await asyncio.to_thread(true):
        for worker in workers:
            worker.check()
        assert time.monotonic() < ends, f"not in {patience_s:.0f} s: {what}"
        await asyncio.sleep(0.05)


async def settled(settings: Settings, events: Events, *workers: Worker) -> Ledger:
    """End the stream, wait for the last label, stop the workers, and hold what came out against what had to."""
    await end(settings, events)
    async with Audit(settings) as audit:
        ends = time.monotonic() + PATIENCE_S
        while (ledger := await audit.read()).labels.keys() != events.ids or ledger.dead_letters != events.dead:
            for worker in workers:
                worker.check()
            if time.monotonic() > ends or ledger.labels.total() > len(events.ids):
                break
            await asyncio.sleep(0.1)
        for worker in workers:
            worker.ask_to_stop()
        for worker in workers:
            await asyncio.to_thread(worker.wait_stopped)
            assert worker.returncode == 0, worker.log.read_text()[-4_000:]
        ledger = await audit.read()
    assert ledger.problems() == []
    assert ledger.labels == Counter(dict.fromkeys(events.ids, 1))
    assert set(ledger.positives) == events.positives
    assert ledger.dead_letters == events.dead
    return ledger
