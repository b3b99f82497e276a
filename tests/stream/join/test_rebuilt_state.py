"""The state rebuilt at any committed position is the state that was there.

A partition lives through a stream with everything in it; after each commit what it holds is kept. Then, for every position, it
is rebuilt from the log as it was at that moment: from nothing, with the log deleted up to the low-water offsets; from what it
held at every earlier position, and at the one after it; from what an earlier rebuild had made or, given up, left behind. All
must be equal, and so must be what is rebuilt from the low water of a rebuilt state.
"""

from __future__ import annotations

import asyncio
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stream.errors import Abandoned, PositionError
from stream.join import local_state
from stream.join.commit_metadata import decode_progress, encode_progress
from stream.join.partition import PartitionJoin
from stream.settings import JoinSettings
from tests.stream.join.fake_log import FakeLog
from tests.stream.join.fake_state import DictState, Disk
from tests.stream.join.world import NAMES, World

FOLDER = Path("/")


@dataclass
class Position:
    """What was there after a commit."""

    ends: dict[str, int]  # of every log
    committed: dict[str, tuple[int, str]]
    content: dict[str, Any]
    state: DictState


SETTINGS = st.builds(
    JoinSettings,
    window_ms=st.just(10),
    lateness_ms=st.sampled_from([0, 3]),
    dedupe_horizon_ms=st.sampled_from([0, 3, 8, 40]),
    negative_skew_ms=st.sampled_from([0, 2]),
    max_outputs=st.sampled_from([1, 3, 10_000]),
    idle_timeout_ms=st.just(100),
    hold_ms=st.sampled_from([0, 4, 10]),
    negative_rate=st.sampled_from([1.0, 0.4]),
)
# Few ids, and times that move on: most clicks find an impression, windows end, ids are used again and forgotten.
ROWS = st.lists(st.one_of(st.none(), st.tuples(st.sampled_from([b"a", b"b", b"c", b"d"]), st.integers(-12, 12))), max_size=5)
CUTS = st.lists(st.integers(1, 4), max_size=2)
ROUNDS = st.lists(
    st.tuples(
        st.integers(0, 12),  # event time goes on by
        ROWS,  # impressions
        ROWS,  # clicks
        CUTS,
        CUTS,
        st.booleans(),  # clicks first
        st.sampled_from(["", "", "", "", "before", "after"]),  # where it crashes
        st.sets(st.sampled_from([NAMES.impressions, NAMES.clicks])),  # idle
    ),
    min_size=4,
    max_size=9,
)


async def live(world: World, rounds: list[Any]) -> list[Position]:
    """Live through the rounds; every position that was committed, and what was there."""
    positions, world.now_ms = [], 12
    for later_ms, impressions, clicks, impression_cuts, click_cuts, clicks_first, crash, idle in rounds:
        world.now_ms, world.idle = world.now_ms + later_ms, idle
        world.send(NAMES.impressions, impressions)
        world.send(NAMES.clicks, clicks)
        before = dict(world.log.committed)
        await world.step(impression_cuts, click_cuts, clicks_first=clicks_first, crash=crash)
        if world.partition is not None and world.log.committed != before:
            ends = {topic: len(log) for topic, log in world.log.topics.items()}
            state = copy.deepcopy(world.partition._state)
            positions.append(Position(ends, dict(world.log.committed), world.content(world.partition), state))
    await world.leave()
    return positions


def log_at(world: World, position: Position) -> FakeLog:
    """The log as a takeover at this position finds it. The sources may have gone on since, the outputs not."""
    log = FakeLog(NAMES)
    for topic, records in world.log.topics.items():
        log.topics[topic] = records[: None if topic in (NAMES.impressions, NAMES.clicks) else position.ends[topic]]
    log.committed = dict(position.committed)
    return log


async def rebuild(
    world: World, log: FakeLog, found: DictState | None, *, reads: int = 1 << 30
) -> tuple[PartitionJoin | None, DictState | None]:
    """Take the partition over with a state in the folder; the partition, closed, and what it or a rebuild given up has left."""
    disk, left = Disk(), iter(range(reads))
    if found is not None:
        disk.put(FOLDER / "w" / "partition-0", copy.deepcopy(found))
    with patch.object(local_state, "JoinState", disk):
        other = World(world.settings, FOLDER, disk.destroy)
        other.log = log
        try:
            partition = await other.take("w", lambda: next(left, None) is not None)
        except Abandoned:
            return None, disk.get(FOLDER / "w" / "partition-0")
    return partition, disk.get(FOLDER / "w" / "partition-0")


def check(world: World, log: FakeLog, position: Position, partition: PartitionJoin | None) -> None:
    assert partition is not None
    found = world.content(partition)
    assert world.told_apart(found) == world.told_apart(position.content)
    state, memory = partition._state, partition.memory
    # Every id remembered is in a chunk that holds the low water for it and lives as long.
    labels = {}
    for record in log.records(NAMES.examples):
        if dict(record.headers)["kind"] == b"matched":
            continue
        offsets = [int(dict(record.headers)["source_offset"])] if record.key is not None else json.loads(record.value)
        for offset in offsets:
            labels.setdefault(offset, record.offset)
    for key, (time_ms, offset, _) in position.content["ids"].items():
        assert any(
            key in keys
            and chunk.first_offset <= offset
            and chunk.max_time_ms >= time_ms
            and chunk.examples_position <= labels.get(offset, 1 << 60)
            for chunk, keys in state.chunks.items()
        )
    assert sorted(memory._chunks) == sorted(state.chunks)
    waiting = [click[1] for _, click in found["early"]]
    assert memory.low_water(1 << 60, 1 << 60, 1 << 60)[1] == min(waiting, default=1 << 60)
    assert memory.early_clicks == len(waiting)


async def check_every_position(chosen: JoinSettings, rounds: list[Any], reads: int, back: int) -> None:
    disk = Disk()
    with patch.object(local_state, "JoinState", disk):
        world = World(chosen, FOLDER, disk.destroy, plain_clocks=True)
        try:
            positions = await live(world, rounds)
        finally:
            await world.leave()
    once: DictState | None = None  # what a rebuild had made of the position before
    for index, position in enumerate(positions):
        log = log_at(world, position)
        again, _ = await rebuild(world, log, once)
        check(world, log, position, again)
        for ahead in positions[index + 1 : index + 2]:
            check(world, log, position, (await rebuild(world, log, ahead.state))[0])
        fresh, once = await rebuild(world, trimmed(log), positions[0].state if back else None)
        check(world, log, position, fresh)
        fresh, _ = await rebuild(world, trimmed(log), None)
        check(world, log, position, fresh)
        # Once more, from the low water of what was rebuilt.
        assert fresh is not None
        metadata = encode_progress(fresh._progress(fresh.positions))
        lower = log_at(world, position)
        lower.committed = {topic: (offset, metadata) for topic, (offset, _) in lower.committed.items()}
        check(world, log, position, (await rebuild(world, trimmed(lower), None))[0])
        for older in positions[: index + 1]:
            check(world, log, position, (await rebuild(world, log, older.state))[0])
            check(world, log, position, (await rebuild(world, trimmed(log_at(world, position)), older.state))[0])
        await check_lost_labels(world, position)
        # Over what was left by a rebuild that was given up, from nothing and from the first state.
        for found in (None, positions[0].state):
            earlier = positions[max(index - back, 0)]
            _, left = await rebuild(world, log_at(world, earlier), found, reads=reads)
            check(world, log, position, (await rebuild(world, log, left))[0])


async def check_lost_labels(world: World, position: Position) -> None:
    """Where retention has deleted one offset of `examples` too many, only a state that is up to date still goes on."""
    log = trimmed(log_at(world, position))
    at = {topic: log.committed[topic][0] for topic in (NAMES.impressions, NAMES.clicks)}
    needed = any(log.starts[topic] < at[topic] for topic in at) and log.starts[NAMES.examples] < position.ends[NAMES.examples]
    log.starts[NAMES.examples] += 1
    if needed:
        with pytest.raises(PositionError, match=f"{NAMES.examples}, partition 0: rebuilding needs offsets from"):
            await rebuild(world, log, None)
    else:
        check(world, log, position, (await rebuild(world, log, None))[0])
    check(world, log, position, (await rebuild(world, log, position.state))[0])


def trimmed(log: FakeLog) -> FakeLog:
    """The log with everything below the low-water offsets deleted by retention."""
    progress = decode_progress(log.committed[NAMES.impressions][1])
    low = {
        NAMES.impressions: progress.impressions_low,
        NAMES.clicks: progress.clicks_low,
        NAMES.examples: progress.examples_low,
    }
    log.starts.update(low)
    for topic, start in low.items():
        log.topics[topic] = [None] * start + log.topics[topic][start:]
    return log


# What an unfinished rebuild has left knew the id's later use; the repeated impression then was no duplicate of the earlier one.
REPEATED = [
    (0, [(b"c", 0)], [], [1], [], False, "", set()),
    (0, [(b"c", 0), (b"c", 1), None, None], [], [4], [], False, "", set()),
]


@example(JoinSettings(window_ms=10, lateness_ms=0, dedupe_horizon_ms=0), REPEATED, 1, 0)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SETTINGS, ROUNDS, st.integers(0, 7), st.integers(0, 2))
def test_any_position(chosen, rounds, reads, back):
    asyncio.run(check_every_position(chosen, rounds, reads, back))
