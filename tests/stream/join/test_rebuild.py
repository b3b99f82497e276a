"""State is a function of the committed log: whatever a worker finds on its disk, it goes on as if nothing had happened.

The real partition, takeover and RocksDB over a log in memory, so that thousands of crashes and moves cost seconds. Two workers
with a folder each take the partition from one another, end before and after commits, give up rebuilds half way and lose their
folders; the oracle of `oracle.py`, which is told of committed steps alone, must agree with what is in the log after each.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from state.join_state import JoinState
from stream.join import local_state
from stream.join.commit_metadata import encode_progress
from stream.join.partition import PartitionJoin
from stream.settings import JoinSettings
from stream.topics.limits import OutputLimits
from tests.stream.join.fake_state import Disk
from tests.stream.join.world import NAMES, World

SETTINGS = st.builds(
    JoinSettings,
    window_ms=st.just(10),
    lateness_ms=st.sampled_from([0, 3]),
    dedupe_horizon_ms=st.sampled_from([0, 8, 40]),
    negative_skew_ms=st.sampled_from([0, 0, 2, 12]),
    max_outputs=st.sampled_from([1, 3, 10_000]),
    idle_timeout_ms=st.just(100),
    hold_ms=st.sampled_from([0, 4, 10]),
    negative_rate=st.sampled_from([1.0, 0.4]),
)
CHANGES = st.fixed_dictionaries(
    {
        "hold_ms": st.sampled_from([0, 4, 10]),
        "window_ms": st.sampled_from([4, 10, 25]),
        "dedupe_horizon_ms": st.sampled_from([0, 8, 40]),
        "negative_skew_ms": st.sampled_from([0, 2, 12, 30]),
        "negative_rate": st.sampled_from([1.0, 0.4]),
        "max_future_ms": st.sampled_from([0, 3_600_000]),
    }
)
# Few ids, and times that move on: clicks find their impressions, windows end, ids are used again.
KEYS = st.sampled_from([b"%d" % index for index in range(6)])
EVENTS = st.lists(st.one_of(st.none(), st.tuples(KEYS, st.integers(-12, 12))), max_size=6)
CUTS = st.lists(st.integers(1, 6), max_size=3)
ROUND = st.tuples(st.just("round"), st.integers(0, 15), EVENTS, EVENTS, CUTS, CUTS, st.booleans(), st.just(""))
ACTIONS = st.lists(
    st.one_of(
        ROUND,
        ROUND,
        ROUND,
        st.tuples(st.just("step"), CUTS, CUTS, st.booleans(), st.sampled_from(["", "before", "after"])),
        st.tuples(st.just("idle"), st.sets(st.sampled_from([NAMES.impressions, NAMES.clicks]))),
        st.tuples(st.just("keep"), st.sampled_from("ab")),
        st.tuples(st.just("old"), st.sampled_from("ab")),
        st.tuples(st.just("move"), st.sampled_from("ab"), st.lists(st.integers(0, 8), max_size=2)),
        st.tuples(st.just("give up"), st.sampled_from("ab"), st.integers(0, 8)),
        st.tuples(st.just("replay"), st.integers(0, 30)),
        st.tuples(st.just("lose"), st.sampled_from("ab")),
        st.tuples(st.just("settings"), CHANGES),
        st.tuples(st.just("turn"), CHANGES, st.sampled_from("ab"), EVENTS, EVENTS),
    ),
    min_size=4,
    max_size=25,
)


async def live(world: World, actions: list[Any]) -> None:
    for name, *rest in actions:
        if name in ("impressions", "clicks"):
            world.send(getattr(NAMES, name), rest[0])
        elif name == "round":
            world.now_ms += rest[0]
            world.send(NAMES.impressions, rest[1])
            world.send(NAMES.clicks, rest[2])
            await world.step(rest[3], rest[4], clicks_first=rest[5], crash=rest[6])
        elif name == "keep":  # a folder is copied, and later put in the place of any
            if not world.is_open(rest[0]):
                world.copy(rest[0], "kept")
        elif name == "old":
            if not world.is_open(rest[0]):
                world.copy("kept", rest[0])
        elif name == "step":
            await world.step(rest[0], rest[1], clicks_first=rest[2], crash=rest[3])
        elif name == "replay":
            world.replay(*rest)
        elif name == "idle":
            world.idle = rest[0]
        elif name == "move":
            await world.move(*rest)
        elif name == "give up":
            await world.give_up(*rest)
        elif name == "mark":
            world.mark(rest[0])
        elif name == "arrival":
            world.log.now_ms = rest[0]
        elif name == "settings":  # of whoever takes the partition next
            world.settings = world.settings.model_copy(update=rest[0])
        elif name == "turn":  # all at once, so that terms follow one another while something waits
            world.settings = world.settings.model_copy(update=rest[0])
            await world.move(rest[1], [])
            world.send(NAMES.impressions, rest[2])
            world.send(NAMES.clicks, rest[3])
            await world.step([9], [9])
        elif not world.is_open(rest[0]):
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
        ("mark", 7),
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
        ("mark", 12),
        ("step", [9], [9], False, ""),
        ("lose", "a"),
        ("move", "a", []),
    ],
    # A replayed negative lies behind its correction: taken for news, it would be corrected again.
    "a negative replayed after its correction": [
        ("impressions", [(b"0", 1)]),
        ("mark", 7),
        ("step", [9], [9], False, ""),
        ("clicks", [(b"0", 6)]),
        ("step", [9], [9], False, ""),
        ("replay", 0),
        ("move", "b", []),
        ("clicks", [(b"0", 3)]),
        ("step", [9], [9], False, ""),
    ],
    # Its click came to nothing before it; read again by a rebuild it looks like one that waits for the label.
    "an orphan whose impression came late": [
        ("clicks", [(b"0", 3)]),
        ("impressions", [(b"1", 9)]),
        ("idle", {NAMES.clicks}),
        ("step", [9], [9], False, ""),
        ("impressions", [(b"0", 2)]),
        ("step", [9], [9], False, ""),
        ("move", "b", []),
    ],
    # The click that waits for the label is known to the log only by the join's own record of it.
    "killed between match and label": [
        ("impressions", [(b"0", 1)]),
        ("clicks", [(b"0", 2)]),
        ("step", [9], [9], False, ""),
        ("move", "b", []),
        ("lose", "a"),
        ("move", "a", []),
    ],
    # What was late stays late: its id may be forgotten, so that nobody could tell a repeated one.
    "a window that grows over what is gone": [
        ("impressions", [(b"1", 60)]),
        ("clicks", [(b"9", 60)]),
        ("step", [9], [9], False, ""),
        ("settings", {"window_ms": 100, "hold_ms": 100}),
        ("move", "b", []),
        ("impressions", [(b"0", 30)]),
        ("step", [9], [9], False, ""),
        ("lose", "a"),
        ("move", "a", []),
    ],
    "a window that shrinks under what is pending": [
        ("impressions", [(b"0", 60), (b"1", 60)]),
        ("clicks", [(b"9", 60)]),
        ("step", [9], [9], False, ""),
        ("settings", {"window_ms": 2, "hold_ms": 1}),
        ("move", "b", []),
        ("impressions", [(b"2", 66)]),
        ("clicks", [(b"0", 66)]),
        ("step", [9], [9], False, ""),
        ("lose", "a"),
        ("move", "a", []),
    ],
    # The horizon of the first use counts: it may have been forgotten by that.
    "a longer horizon, and an id used again": [
        ("impressions", [(b"0", 20)]),
        ("step", [9], [9], False, ""),
        ("mark", 35),
        ("step", [9], [9], False, ""),
        ("settings", {"dedupe_horizon_ms": 40}),
        ("move", "b", []),
        ("impressions", [(b"0", 30)]),
        ("step", [9], [9], False, ""),
        ("lose", "a"),
        ("move", "a", []),
    ],
    "a shorter bound on times ahead, under what was accepted": [
        ("arrival", 0),
        ("impressions", [(b"0", 50)]),
        ("clicks", [(b"0", 52), (b"1", 53)]),
        ("step", [9], [9], False, ""),
        ("settings", {"max_future_ms": 0}),
        ("move", "b", []),
        ("arrival", 10**12),
        ("impressions", [(b"2", 60)]),
        ("step", [9], [9], False, ""),
        ("lose", "a"),
        ("move", "a", []),
    ],
    # The progress no longer has the terms of what the old folder holds: its label would go out again, a window of today later.
    "an old folder from before a longer window": [
        ("impressions", [(b"a", 20)]),
        ("step", [9], [9], False, ""),
        ("move", "b", []),
        ("keep", "a"),
        ("mark", 60),
        ("step", [9], [9], False, ""),
        ("step", [], [], False, ""),
        ("settings", {"window_ms": 100, "hold_ms": 100}),
        ("move", "a", []),
        ("impressions", [(b"b", 75)]),
        ("step", [9], [9], False, ""),
        ("impressions", [(b"c", 75)]),
        ("step", [9], [9], False, ""),
        ("move", "b", []),
        ("old", "a"),
        ("move", "a", []),
    ],
    # The same: its id is forgotten, and today's horizon would make a duplicate of a pending impression.
    "an old folder from before a longer horizon": [
        ("impressions", [(b"a", 20)]),
        ("step", [9], [9], False, ""),
        ("move", "b", []),
        ("keep", "a"),
        ("mark", 35),
        ("step", [9], [9], False, ""),
        ("step", [], [], False, ""),
        ("settings", {"dedupe_horizon_ms": 40}),
        ("move", "a", []),
        ("impressions", [(b"a", 30)]),
        ("step", [9], [9], False, ""),
        ("impressions", [(b"c", 36)]),
        ("step", [9], [9], False, ""),
        ("move", "b", []),
        ("old", "a"),
        ("move", "a", []),
    ],
    # Nothing is remembered in A's folder, so nothing there says which terms it is from; it lies before all that are known.
    "an empty folder from before a longer horizon": [
        ("impressions", [(b"x", 20)]),
        ("mark", 60),
        ("step", [9], [9], False, ""),
        ("step", [], [], False, ""),
        ("move", "b", []),
        ("impressions", [(b"a", 70)]),
        ("step", [9], [9], False, ""),
        ("mark", 84),
        ("step", [9], [9], False, ""),
        ("step", [], [], False, ""),
        ("settings", {"dedupe_horizon_ms": 40}),
        ("move", "c", []),
        ("impressions", [(b"a", 85)]),
        ("step", [9], [9], False, ""),
        ("impressions", [(b"q", 86)]),
        ("step", [9], [9], False, ""),
        ("move", "a", []),
    ],
    "an empty folder from before a wider bound on times ahead": [
        ("settings", {"max_future_ms": 0}),
        ("impressions", [(b"x", 20)]),
        ("mark", 60),
        ("step", [9], [9], False, ""),
        ("step", [], [], False, ""),
        ("move", "b", []),
        ("arrival", 60),
        ("impressions", [(b"a", 90)]),
        ("clicks", [(b"b", 95)]),
        ("step", [9], [9], False, ""),
        ("settings", {"max_future_ms": 1_000}),
        ("move", "c", []),
        ("impressions", [(b"q", 86)]),
        ("step", [9], [9], False, ""),
        ("impressions", [(b"r", 87)]),
        ("step", [9], [9], False, ""),
        ("move", "a", []),
        ("arrival", 10**12),
        ("impressions", [(b"b", 94)]),
        ("step", [9], [9], False, ""),
    ],
    # Of clicks alone there are terms of before: no impression was read under them.
    "an empty folder from before a wider bound on times ahead, and clicks alone": [
        ("settings", {"max_future_ms": 0}),
        ("step", [9], [9], False, ""),
        ("move", "b", []),
        ("arrival", 60),
        ("clicks", [(b"b", 95)]),
        ("step", [9], [9], False, ""),
        ("settings", {"max_future_ms": 1_000}),
        ("move", "c", []),
        ("clicks", [(b"q", 86)]),
        ("step", [9], [9], False, ""),
        ("step", [9], [9], False, ""),
        ("move", "a", []),
        ("arrival", 10**12),
        ("impressions", [(b"b", 94)]),
        ("step", [9], [9], False, ""),
    ],
    # By the longer skew it would wait still, for a rebuild that reads it again.
    "a longer skew, and an orphan": [
        ("clicks", [(b"a", 90), (b"b", 50)]),
        ("mark", 55),
        ("step", [9], [9], False, ""),
        ("settings", {"negative_skew_ms": 20}),
        ("move", "b", []),
        ("impressions", [(b"c", 56)]),
        ("step", [9], [9], False, ""),
        ("lose", "a"),
        ("move", "a", []),
    ],
    # The floor of the terms between is not that of the last: the click was read under them, and waits by their skew.
    "two changes, the second while a click waits that is older than the first": [
        ("impressions", [(b"z", 100)]),
        ("clicks", [(b"z", 100)]),
        ("step", [9], [9], False, ""),
        ("settings", {"negative_skew_ms": 20}),
        ("move", "b", []),
        ("clicks", [(b"a", 90)]),
        ("step", [9], [9], False, ""),
        ("settings", {"hold_ms": 3}),
        ("move", "a", []),
        ("impressions", [(b"q", 100)]),
        ("step", [9], [9], False, ""),
        ("move", "b", []),
        ("impressions", [(b"a", 95)]),
        ("step", [9], [9], False, ""),
        ("mark", 200),
        ("step", [9], [9], False, ""),
    ],
    # Its impression is forgotten and its label no longer read, while a click of that time may wait.
    "a skew beyond the horizon, and a click that made a label": [
        ("settings", {"negative_skew_ms": 2}),
        ("clicks", [(b"a", 90), (b"b", 30)]),
        ("impressions", [(b"b", 20)]),
        ("step", [9], [9], False, ""),
        ("mark", 31),
        ("step", [9], [9], False, ""),
        ("lose", "b"),
        ("move", "b", []),
    ],
}


NO_HORIZON = JoinSettings(window_ms=10, lateness_ms=0, dedupe_horizon_ms=0, max_outputs=1, idle_timeout_ms=100)


AT_ONCE = LOW.model_copy(update={"hold_ms": 0})
SOME = AT_ONCE.model_copy(update={"negative_rate": 0.4})
HELD = LOW.model_copy(update={"hold_ms": 4})


@pytest.mark.parametrize(
    "chosen", [LOW, NO_HORIZON, AT_ONCE, SOME, HELD], ids=["low", "no horizon", "at once", "some left out", "held"]
)
@pytest.mark.parametrize("actions", KNOWN.values(), ids=KNOWN.keys())
def test_known(actions, chosen):
    disk = Disk()
    with patch.object(local_state, "JoinState", disk):
        asyncio.run(live_and_leave(World(chosen, Path("/"), disk.destroy, disk.copy, plain_clocks=True), actions))


async def live_and_leave(world: World, actions: list[Any]) -> None:
    try:
        await live(world, actions)
    finally:
        await world.leave()


def on_disk(check: Callable[[World, Disk], Awaitable[None]]) -> None:
    """Run a check over a world with folders in memory."""
    disk = Disk()
    with patch.object(local_state, "JoinState", disk):
        world = World(LOW, Path("/"), disk.destroy, disk.copy, plain_clocks=True)

        async def run() -> None:
            try:
                await check(world, disk)
            finally:
                await world.leave()

        asyncio.run(run())


def test_a_folder_from_before_offsets_were_reset_is_moved_aside(caplog):
    """Its positions, its watermark and its topics fit; what it has pending lies before the reset, and was given up by it."""

    async def check(world: World, disk: Disk) -> None:
        world.send(NAMES.impressions, [(b"a", 20)])
        world.send(NAMES.clicks, [(b"x", 20)])
        await world.own("b")
        await world.step([9], [9])
        await world.leave()
        world.reset(1, 1)
        world.oracle.accepted.clear()
        world.oracle.waiting.clear()
        await world.own("a")  # its own folder is new
        world.send(NAMES.impressions, [(b"b", 22)])
        world.send(NAMES.clicks, [(b"y", 22)])
        await world.step([9], [9])
        await world.leave()
        await world.move("b", [])
        assert "from before offsets were reset" in caplog.text
        await world.end()
        assert world.firsts == {1: -1}

    on_disk(check)


def test_a_life_goes_on_through_takeovers_and_none_is_one_too(caplog):
    """Progress and folders of versions that drew none fit each other."""

    async def check(world: World, disk: Disk) -> None:
        def lives() -> tuple[str, str]:
            state, progress = disk.get(Path("/b/partition-0")), world.committed().progress
            assert state is not None and progress is not None
            meta = state.meta()
            assert meta is not None
            return meta.life, progress.life

        for worker in "ab":  # both look at what nobody has committed, and find their folders later
            await world.own(worker)
            await world.leave()
        world.send(NAMES.impressions, [(b"a", 20)])
        await world.own("b")
        await world.step([9], [9])
        life = lives()[1]
        assert len(life) == 8
        await world.move("a", [])
        world.send(NAMES.impressions, [(b"b", 21)])
        await world.step([9], [9])
        await world.move("b", [])
        assert lives() == (life, life)
        await world.leave()
        state, progress = disk.get(Path("/b/partition-0")), world.committed().progress
        assert state is not None and progress is not None
        state._meta = msgspec.structs.replace(state.meta(), life="")
        metadata = encode_progress(msgspec.structs.replace(progress, life=""))
        world.log.committed = {topic: (offset, metadata) for topic, (offset, _) in world.log.committed.items()}
        world.send(NAMES.impressions, [(b"c", 22)])
        await world.own("b")
        await world.step([9], [9])
        assert lives() == ("", "")
        assert "moved it aside" not in caplog.text
        await world.end()

    on_disk(check)


@pytest.mark.parametrize("found", ["nothing", "its folder of before the click", "its folder of before the label"])
@pytest.mark.parametrize("click_ms", [22, 27], ids=["a first label", "a correction"])
def test_a_click_whose_label_was_too_large_is_not_read_twice(click_ms, found):
    """Nothing in `examples` is positive then, and a second click would correct what the first one has decided."""

    async def check(world: World, disk: Disk) -> None:
        world.settings = HELD
        limits = OutputLimits(example_bytes=600)

        async def step(partition: PartitionJoin) -> None:
            for topic in (NAMES.impressions, NAMES.clicks):
                at = partition.positions.impressions if topic == NAMES.impressions else partition.positions.clicks
                await partition._step(world.runs(topic, at, [9]))

        first = await world.own("a")
        world.log.append(NAMES.impressions, b"a", b'{"impression_id":"a","timestamp":20,"features":"%b"}' % (b"x" * 90))
        world.send(NAMES.impressions, [(b"b", 20)])
        await step(first)
        if found == "its folder of before the click":
            world.copy("a", "c")
        if click_ms > 24:
            world.mark(25)
            await step(first)  # the negative fits
        world.send(NAMES.clicks, [(b"a", click_ms)])
        first._limits = limits
        if click_ms <= 24:
            await step(first)
        if found == "its folder of before the label":
            world.copy("a", "c")
        world.mark(26)
        await step(first)
        await first._step([])
        letters = [dict(record.headers)["reason"] for record in world.log.records(NAMES.dead_letters)]
        assert letters == [b"too_large"]
        there = world.content(first)
        await world.leave()
        again = await world.own("c")
        assert world.content(again) == there
        said = len(world.log.records(NAMES.examples))
        world.send(NAMES.clicks, [(b"a", 28)])
        await step(again)
        assert len(world.log.records(NAMES.examples)) == said
        await world.leave()

    on_disk(check)


@settings(max_examples=300, deadline=None)
@given(SETTINGS, ACTIONS, st.booleans())
def test_a_partition_goes_on_as_if_nothing_had_happened(chosen, actions, plain_clocks):
    disk = Disk()
    with patch.object(local_state, "JoinState", disk):
        world = World(chosen, Path("/"), disk.destroy, disk.copy, plain_clocks=plain_clocks)
        asyncio.run(live_and_leave(world, actions))


def copy_folder(path: Path, to: Path) -> None:
    if path.exists():
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(path, to)


# Few and not made smaller: every try opens databases.
@settings(max_examples=3, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SETTINGS, ACTIONS)
def test_the_same_on_rocksdb(tmp_path, chosen, actions):
    folder = tmp_path / uuid.uuid4().hex
    asyncio.run(live_and_leave(World(chosen, folder, JoinState.destroy, copy_folder), actions))
