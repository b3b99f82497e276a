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
from tests.stream.join.known_lives import KNOWN, LOW
from tests.stream.join.lives import ACTIONS, SETTINGS, live
from tests.stream.join.world import NAMES, World

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
