"""State is a function of the committed log: whatever a worker finds on its disk, it goes on as if nothing had happened.

The real partition, takeover and RocksDB over a log in memory, so that thousands of crashes and moves cost seconds. Two workers
with a folder each take the partition from one another, end before and after commits, give up rebuilds half way and lose their
folders; the oracle of `oracle.py`, which is told of committed steps alone, must agree with what is in the log after each.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from state.join_state import JoinState, StateOptions
from stream.errors import Abandoned
from stream.join import takeover
from stream.join.events import WATERMARK_HEADER
from stream.join.metrics import JoinMetrics
from stream.join.partition import PartitionJoin, TakenOver
from stream.join.progress import decode_progress
from stream.join.takeover import Takeover, _Committed, _Rebuild
from stream.settings import JoinSettings, KafkaSettings, TopicSettings
from stream.topics import TopicNames
from stream.transport import LogEnd, Run
from tests.stream.join.fake_log import Crash, FakeConsumer, FakeLog, FakeProducer
from tests.stream.join.fake_state import Disk
from tests.stream.join.oracle import Oracle

NAMES = TopicNames.of(TopicSettings())
OPTIONS = StateOptions(8)
END_MS = 100_000


class World:
    """The log, the workers' folders, the partition where one of them has it, and the oracle."""

    def __init__(self, chosen: JoinSettings, folder: Path, destroy: Callable[[Path], None]) -> None:
        self.settings, self.folder = chosen, folder
        self.lose = lambda worker: destroy(folder / worker / "partition-0")
        self.log, self.oracle = FakeLog(NAMES), Oracle(chosen)
        self.owner, self.partition = "", None
        self.idle: set[str] = set()
        self.metrics = JoinMetrics(CollectorRegistry())
        self.audited = {NAMES.examples: 0, NAMES.dead_letters: 0}
        self.labels: dict[int, int] = {}
        self.dead: set[tuple[str, int]] = set()

    def committed(self) -> _Committed:
        if not self.log.committed:
            return _Committed(0, 0, 0, 0, None)
        (impressions, metadata), (clicks, _) = (self.log.committed[topic] for topic in (NAMES.impressions, NAMES.clicks))
        return _Committed(impressions, clicks, 0, 0, decode_progress(metadata))

    async def take(self, worker: str, still_ours: Callable[[], bool] = lambda: True) -> PartitionJoin:
        """As `Takeover.take` does, with the fakes."""
        committed = self.committed()
        state = Takeover(
            kafka=KafkaSettings(),
            settings=self.settings,
            names=NAMES,
            group="g",
            identity="i",
            state_dir=self.folder / worker,
            options=OPTIONS,
        )._open(0, committed)
        try:
            consumer = FakeConsumer(self.log)
            rebuild = _Rebuild(self.settings, NAMES, 0, "i", consumer, state, committed, still_ours)
            memory, positions, pending = await rebuild.run()
        except BaseException:
            state.close()
            raise
        return PartitionJoin(
            0,
            settings=self.settings,
            names=NAMES,
            group="g",
            identity="i",
            taken=TakenOver(FakeProducer(self.log), state, memory, positions, pending),
            log_end=self.log_end,
            after_step=lambda partition: None,
            fatal=lambda what, error: None,
            metrics=self.metrics,
        )

    def log_end(self, topic: str) -> LogEnd | None:
        end = len(self.log.topics[topic])
        return LogEnd(end, 1 << 60, end) if topic in self.idle else None

    async def own(self, worker: str) -> PartitionJoin:
        if self.partition is None:
            self.owner, self.partition = worker, await self.take(worker)
        return self.partition

    async def leave(self) -> None:
        if self.partition is not None:
            await self.partition.close()
            self.partition = None

    def runs(self, topic: str, start: int, counts: list[int]) -> list[Run]:
        """The next records cut into runs of so many offsets."""
        log, cut = self.log.topics[topic], []
        for count in counts:
            after = min(start + count, len(log))
            if after > start:
                cut.append(Run(topic, 0, start, after, len(log), self.log.records(topic, start, after)))
            start = after
        return cut

    async def step(self, impressions: list[int], clicks: list[int], *, clicks_first: bool = False, crash: str = "") -> None:
        partition = await self.own("a")
        assert partition is not None
        cut = [self.runs(NAMES.impressions, partition.positions.impressions, impressions)]
        cut.append(self.runs(NAMES.clicks, partition.positions.clicks, clicks))
        runs = [run for part in (reversed(cut) if clicks_first else cut) for run in part]
        partition._producer.crash = crash
        # A watermark that moved without settling anything was not committed; a crash takes it back.
        self.oracle.watermark_ms, before = partition.memory.watermark_ms, dict(self.log.committed)
        try:
            await partition._step(runs)
        except Crash:
            await self.leave()
        if self.log.committed != before:
            for run in runs:
                judge = self.oracle.impression if run.topic == NAMES.impressions else self.oracle.click
                for record in run.records:
                    if record.value:
                        judge(record.key, int(record.value.split(b":")[-1][:-1]), record.offset)
        assert partition is not None
        if self.log.committed != before:
            self.oracle.move(self.committed().progress.watermark_ms)  # type: ignore[union-attr]
        self.audit()

    def audit(self) -> None:
        """The log against the oracle."""
        for record in self.log.records(NAMES.examples, self.audited[NAMES.examples]):
            headers = dict(record.headers)
            offset = int(headers["source_offset"])
            assert offset not in self.labels, "a second first label"
            self.labels[offset] = int(headers.get("click_ms", b"-1"))
            assert (headers["label"] == b"1") == (self.labels[offset] >= 0)
            source = self.log.topics[NAMES.impressions][offset]
            assert (record.key, record.value) == (source.key, source.value)
        for record in self.log.records(NAMES.dead_letters, self.audited[NAMES.dead_letters]):
            headers = dict(record.headers)
            letter = headers["reason"].decode(), int(headers["source_offset"])
            assert letter not in self.dead, "said twice"
            self.dead.add(letter)
        for topic in self.audited:
            self.audited[topic] = len(self.log.topics[topic])
        assert self.labels == self.oracle.labels
        assert self.dead == self.oracle.dead

    def content(self, partition: PartitionJoin) -> dict[str, Any]:
        """What decides the future: the same for every way to the same place in the log."""
        state, memory = partition._state, partition.memory
        bound = memory.watermark_ms - self.settings.window_ms - 2 * self.settings.dedupe_horizon_ms
        keys = sorted({record.key for record in self.log.records(NAMES.impressions) if record.key})
        entries = zip(keys, state.entries(keys), strict=True)
        early = sorted(state.early_clicks())
        assert early == sorted((key, click) for key, waiting in memory.early.items() for click in waiting.values())
        assert partition.pending == state.count_pending() == len(self.oracle.pending())
        return {
            "positions": (partition.positions.impressions, partition.positions.clicks),
            "event time": (memory.watermark_ms, memory.impressions_seen_ms, memory.clicks_seen_ms),
            "ids": {key: entry for key, entry in entries if entry is not None and entry[0] >= bound},
            "pending": list(state.pending_between(0, 1 << 60)),
            "early": early,
        }

    async def give_up(self, worker: str, reads: int) -> None:
        """A worker takes the partition, and loses it to the one that had it after so many fetches."""
        owner, had = self.owner, self.partition is not None
        await self.leave()
        left = iter(range(reads))
        with contextlib.suppress(Abandoned):
            await (await self.take(worker, lambda: next(left, None) is not None)).close()
        if had:
            await self.own(owner)

    async def move(self, to: str, given_up_after: list[int]) -> None:
        """The partition goes to a worker, after rebuilds that were given up; what it has then is what a third one finds."""
        before = None
        if self.partition is not None and self.partition.memory.watermark_ms == self.oracle.watermark_ms:
            before = self.content(self.partition)
        await self.leave()
        for reads in given_up_after:
            await self.give_up(to, reads)
        partition = await self.own(to)
        self.lose("third")
        third = await self.take("third")
        there = self.content(partition)
        assert self.content(third) == there
        committed = self.committed().progress
        if before is not None and committed is not None and before["event time"][0] == committed.watermark_ms:
            assert there == before
        assert self._low_water_holds(partition)
        assert self._low_water_holds(third)
        await third.close()

    def _low_water_holds(self, partition: PartitionJoin) -> bool:
        low = partition._progress(partition.positions)
        pending = [offset for _, offset, _, _ in partition._state.pending_between(0, 1 << 60)]
        early = [click[1] for _, click in partition._state.early_clicks()]
        return all(offset >= low.impressions_low for offset in pending) and all(offset >= low.clicks_low for offset in early)

    async def end(self) -> None:
        for topic in (NAMES.impressions, NAMES.clicks):
            self.log.append(topic, None, b"", ((WATERMARK_HEADER, b"%d" % END_MS),))
        await self.step([1 << 30], [1 << 30])
        for _ in range(1_000):
            if self.partition is not None and self.partition.memory.watermark_ms == END_MS:
                break
            await self.step([], [])
        assert self.labels.keys() == self.oracle.accepted.keys()
        assert self.partition is not None
        assert (self.partition.pending, self.partition.memory.early) == (0, {})
        # What is settled is forgotten, also when nothing else happens.
        await self.step([], [])
        state = self.partition._state
        assert list(state.all_chunks()) == []
        assert state.entries(sorted(self.oracle.last)) == [None] * len(self.oracle.last)


SETTINGS = st.builds(
    JoinSettings,
    window_ms=st.just(10),
    lateness_ms=st.sampled_from([0, 3]),
    dedupe_horizon_ms=st.sampled_from([0, 8, 40]),
    negative_skew_ms=st.sampled_from([0, 0, 2]),
    max_outputs=st.sampled_from([1, 3, 10_000]),
    idle_timeout_ms=st.just(100),
)
KEYS = st.sampled_from([b"%d" % index for index in range(8)])
EVENTS = st.lists(st.one_of(st.none(), st.tuples(KEYS, st.integers(0, 60))), min_size=1, max_size=8)
CUTS = st.lists(st.integers(1, 6), max_size=3)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("impressions"), EVENTS),
        st.tuples(st.just("clicks"), EVENTS),
        st.tuples(st.just("step"), CUTS, CUTS, st.booleans(), st.sampled_from(["", "", "before", "after"])),
        st.tuples(st.just("step"), CUTS, CUTS, st.booleans(), st.just("")),
        st.tuples(st.just("idle"), st.sets(st.sampled_from([NAMES.impressions, NAMES.clicks]))),
        st.tuples(st.just("move"), st.sampled_from("ab"), st.lists(st.integers(0, 8), max_size=2)),
        st.tuples(st.just("give up"), st.sampled_from("ab"), st.integers(0, 8)),
        st.tuples(st.just("lose"), st.sampled_from("ab")),
    ),
    max_size=25,
)


async def live(world: World, actions: list[Any]) -> None:
    for name, *rest in actions:
        if name in ("impressions", "clicks"):
            topic = getattr(NAMES, name)
            for row in rest[0]:
                if row is None:
                    world.log.gap(topic)
                else:
                    world.log.append(topic, row[0], b'{"impression_id":"%b","timestamp":%d}' % row)
        elif name == "step":
            await world.step(rest[0], rest[1], clicks_first=rest[2], crash=rest[3])
        elif name == "idle":
            world.idle = rest[0]
        elif name == "move":
            await world.move(*rest)
        elif name == "give up":
            await world.give_up(*rest)
        elif world.owner != rest[0] or world.partition is None:
            world.lose(rest[0])
    await world.move("b", [])
    await world.end()
    await world.move("a", [])


LOW = JoinSettings(window_ms=10, lateness_ms=0, dedupe_horizon_ms=0)
KNOWN = {
    # What the rebuild wrote as pending was clicked elsewhere, and the watermark has not passed it: it would expire once more.
    "an abandoned rebuild's pending impression got its label elsewhere": [
        ("impressions", [(b"0", 1)]),
        ("step", [9], [9], False, ""),
        ("move", "b", []),
        ("move", "a", []),
        ("impressions", [(b"1", 2), (b"2", 2), (b"3", 2), (b"4", 2)]),
        ("step", [9], [9], False, ""),
        ("give up", "b", 1),
        ("clicks", [(b"1", 3)]),
        ("step", [9], [9], False, ""),
        ("move", "b", []),
    ],
    # One after the other cuts the same offsets into other chunks.
    "two abandoned rebuilds": [
        ("step", [9], [9], False, ""),
        ("move", "b", []),
        ("impressions", [(b"1", 1), (b"2", 2)]),
        ("clicks", [(b"9", 1)]),
        ("move", "a", []),
        ("step", [9], [9], False, ""),
        ("give up", "b", 1),
        ("impressions", [(b"3", 3), (b"4", 4)]),
        ("step", [9], [9], False, ""),
        ("give up", "b", 3),
        ("move", "b", []),
    ],
    # Forgetting reads the state, which doesn't know yet what the same step remembers.
    "an id used again in the step that forgets it": [
        ("impressions", [(b"0", 1)]),
        ("step", [9], [9], False, ""),
        ("impressions", [(b"0", 40)]),
        ("clicks", [(b"1", 30)]),
        ("step", [9], [9], False, ""),
        ("clicks", [(b"0", 45)]),
        ("step", [9], [9], False, ""),
    ],
    # Its first use is pending too, and must lie above the low-water offset.
    "an id used twice in one step": [
        ("impressions", [(b"0", 20), (b"1", 20), (b"0", 40)]),
        ("step", [9], [9], False, ""),
        ("move", "b", []),
    ],
    # Read again by a rebuild, it is outside the window of the newer use; it waited there, to be called an orphan.
    "a click that labelled an id's earlier use": [
        ("give up", "b", 0),
        ("clicks", [(b"0", 0)]),
        ("impressions", [(b"0", 0), (b"0", 1)]),
        ("step", [2], [1], True, ""),
        ("move", "b", []),
    ],
}


NO_HORIZON = JoinSettings(window_ms=10, lateness_ms=0, dedupe_horizon_ms=0, max_outputs=1, idle_timeout_ms=100)


@pytest.mark.parametrize("chosen", [LOW, NO_HORIZON], ids=["low", "no horizon"])
@pytest.mark.parametrize("actions", KNOWN.values(), ids=KNOWN.keys())
def test_known(actions, chosen):
    disk = Disk()
    with patch.object(takeover, "JoinState", disk):
        asyncio.run(live_and_leave(World(chosen, Path("/"), disk.destroy), actions))


async def live_and_leave(world: World, actions: list[Any]) -> None:
    try:
        await live(world, actions)
    finally:
        await world.leave()


@settings(max_examples=300, deadline=None)
@given(SETTINGS, ACTIONS)
def test_a_partition_goes_on_as_if_nothing_had_happened(chosen, actions):
    disk = Disk()
    with patch.object(takeover, "JoinState", disk):
        asyncio.run(live_and_leave(World(chosen, Path("/"), disk.destroy), actions))


# Few and not made smaller: every try opens databases.
@settings(max_examples=3, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SETTINGS, ACTIONS)
def test_the_same_on_rocksdb(tmp_path, chosen, actions):
    folder = tmp_path / uuid.uuid4().hex
    asyncio.run(live_and_leave(World(chosen, folder, JoinState.destroy), actions))
