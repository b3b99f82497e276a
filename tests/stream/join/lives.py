"""Lives of a partition, drawn by hypothesis, and how one is lived: rounds of events, ends of workers, changed settings."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from stream.settings import JoinSettings
from tests.stream.join.world import NAMES, World

__all__ = ["ACTIONS", "CHANGES", "CUTS", "EVENTS", "KEYS", "ROUND", "SETTINGS", "live"]


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
