"""What version 0.1.0 has left (progress without terms, examples, state) is taken over: no label twice, none never."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from state.join_state import Chunk, JoinMeta
from stream.join import local_state
from stream.records.watermark import WATERMARK_HEADER
from stream.settings import JoinSettings
from tests.stream.join.fake_state import DictState, Disk
from tests.stream.join.world import NAMES, World

FOLDER = Path("/")
SETTINGS = JoinSettings(window_ms=10, hold_ms=4, lateness_ms=0, dedupe_horizon_ms=5)
TIMES = {b"clicked": 21, b"waiting": 22, b"never": 23}
PROGRESS = {"w": 25, "i": 25, "c": 25, "il": 0, "cl": 0, "el": 0}
WAIT = [(b"clicked", 1, 24)]  # id, label, click: nothing is said of the others yet
FNW = [(b"clicked", 0, None), (b"waiting", 0, None), (b"never", 0, None), (b"clicked", 1, 24)]


def left_by_0_1_0(policy: str) -> World:
    world = World(SETTINGS, FOLDER, lambda path: None)
    world.send(NAMES.impressions, list(TIMES.items()))
    world.send(NAMES.clicks, [(b"clicked", 24)])
    offsets = {key: offset for offset, key in enumerate(TIMES)}
    for index, (key, label, click_ms) in enumerate(WAIT if policy == "wait" else FNW):
        headers = {
            "label": b"%d" % label,
            "weight": b"1",
            "kind": b"correction" if index == 3 else b"first",
            **({"policy": b"fnw"} if policy == "fnw" else {}),
            "impression_ms": b"%d" % TIMES[key],
            "source_offset": b"%d" % offsets[key],
            **({"click_ms": b"%d" % click_ms} if click_ms else {}),
        }
        world.log.append(NAMES.examples, key, world.log.topics[NAMES.impressions][offsets[key]].value, tuple(headers.items()))
    world.log.gap(NAMES.examples)
    metadata = json.dumps(PROGRESS)
    world.log.committed = {NAMES.impressions: (3, metadata), NAMES.clicks: (1, metadata)}
    return world


def state_of_0_1_0(policy: str) -> DictState:
    """As its layout 3 had it: fake negatives that are out have a mark, and the identity ends with the layout."""
    state = DictState()
    batch = state.batch()
    batch.remember((key, (time_ms, offset, key == b"clicked")) for offset, (key, time_ms) in enumerate(TIMES.items()))
    rows = [
        (time_ms, offset, key, b'{"impression_id":"%b","timestamp":%d}' % (key, time_ms))
        for offset, (key, time_ms) in enumerate(TIMES.items())
        if key != b"clicked"
    ]
    batch.add_pending(rows, labelled=policy == "fnw")
    batch.add_chunk(Chunk(0, 23, 0), list(TIMES))
    batch.set_meta(
        JoinMeta(
            identity="i/layout 3",
            impressions_position=3,
            clicks_position=1,
            examples_position=0,
            watermark_ms=25,
            impressions_seen_ms=25,
            clicks_seen_ms=25,
        )
    )
    batch.write()
    return state


def said(world: World, start: int) -> list[tuple[Any, ...]]:
    found = []
    for record in world.log.records(NAMES.examples, start):
        headers = dict(record.headers)
        if record.key is not None:
            found.append((record.key, headers["kind"], headers["label"]))
    return found


async def live(world: World, disk: Disk) -> Sequence[tuple[Any, ...]]:
    start = len(world.log.topics[NAMES.examples])
    partition = await world.own("a")
    world.now_ms = 0
    world.send(NAMES.clicks, [(b"clicked", 26), (b"waiting", 29)])
    world.send(NAMES.impressions, [(b"new", 30)])
    world.send(NAMES.clicks, [(b"new", 33)])
    for topic in (NAMES.impressions, NAMES.clicks):
        world.log.append(topic, None, b"", ((WATERMARK_HEADER, b"60"),))
    for topic, position in ((NAMES.impressions, 3), (NAMES.clicks, 1)):
        await partition._step(world.runs(topic, position, [9]))
    await partition._step([])
    await world.leave()
    return said(world, start)


@pytest.mark.parametrize("found", ["nothing", "its state"])
def test_waiting_labels(found: str, caplog: pytest.LogCaptureFixture) -> None:
    assert sorted(taken_over("wait", found)) == [
        (b"never", b"first", b"0"),
        (b"new", b"first", b"1"),
        (b"waiting", b"first", b"1"),
    ]
    assert "throwing away" not in caplog.text


@pytest.mark.parametrize("found", ["nothing", "its state"])
def test_fake_negatives(found: str, caplog: pytest.LogCaptureFixture) -> None:
    assert sorted(taken_over("fnw", found)) == [(b"new", b"first", b"1"), (b"waiting", b"correction", b"1")]
    assert "throwing away" not in caplog.text


def taken_over(policy: str, found: str) -> Sequence[tuple[Any, ...]]:
    disk = Disk()
    with patch.object(local_state, "JoinState", disk):
        world = left_by_0_1_0(policy)
        if found == "its state":
            disk.put(FOLDER / "a" / "partition-0", state_of_0_1_0(policy))
        return asyncio.run(live(world, disk))
