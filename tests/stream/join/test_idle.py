"""When a source is idle: at the end of all that is written, by a recent fetch, for long enough."""

from __future__ import annotations

import asyncio

import pytest

from stream.join import idle as idle_module
from stream.join import partition as partition_module
from stream.join.source_clock import AGREEING
from stream.kafka.transport import LogEnd
from stream.settings import JoinSettings
from tests.stream.join.test_commit import NAMES, Bench

CHOSEN = JoinSettings(window_ms=10, lateness_ms=0, dedupe_horizon_ms=0, idle_timeout_ms=1_000)


class Clock:
    """In the place of `time` in the modules of partition and idle sources."""

    def __init__(self) -> None:
        self.now_s = 5_000.0

    def monotonic(self) -> float:
        return self.now_s

    perf_counter = monotonic

    def time(self) -> float:
        return 1_700_000_000.0 + self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(partition_module, "time", clock)
    monkeypatch.setattr(idle_module, "time", clock)
    return clock


def test_a_source_is_idle_only_at_the_end_and_for_long_enough(clock):
    async def check() -> None:
        ends: dict[str, LogEnd] = {}
        bench = Bench(CHOSEN, ends.get)

        def idle(topic: str) -> bool:
            bench.partition.observe_idle(bench.partition.positions)
            said = bench.partition.is_idle(topic)
            assert bench.partition.is_idle(topic) == said, "asking changes nothing"
            return said

        def fetched(offset: int, highwater: int) -> None:
            ends[NAMES.clicks] = LogEnd(offset, int(clock.time() * 1000), highwater)

        clock.now_s += 10
        assert not idle(NAMES.clicks)  # never fetched
        fetched(0, 0)
        assert not idle(NAMES.clicks)  # from now on
        clock.now_s += 0.999
        fetched(0, 0)
        assert not idle(NAMES.clicks)
        clock.now_s += 0.001
        fetched(0, 0)
        assert idle(NAMES.clicks)
        # A fetch of long ago says nothing, and the time begins anew.
        clock.now_s += 1.0
        assert not idle(NAMES.clicks)
        fetched(0, 0)
        assert not idle(NAMES.clicks)
        clock.now_s += 0.6
        fetched(0, 0)
        # Behind an open transaction there is more to come, though nothing can be read yet.
        fetched(0, 1)
        assert not idle(NAMES.clicks)
        clock.now_s += 0.6
        fetched(0, 0)
        assert not idle(NAMES.clicks)
        clock.now_s += 0.6
        fetched(0, 0)
        clock.now_s += 0.4
        assert idle(NAMES.clicks)
        assert not idle(NAMES.impressions)

    asyncio.run(check())


def agreed(key: bytes, time_ms: int) -> list[tuple[bytes, int]]:
    """As many events of one time as it takes to be believed."""
    return [(key + b"%d" % index, time_ms) for index in range(AGREEING)]


def test_an_idle_source_no_longer_holds_the_watermark_and_a_record_wakes_it(clock):
    async def check() -> None:
        fetched: set[str] = set()

        def log_end(topic: str) -> LogEnd | None:
            """Of what is fetched at all, the last fetch was just now, and nothing was left."""
            at = bench.partition.positions.clicks
            return LogEnd(at, int(clock.time() * 1000), at) if topic in fetched else None

        bench = Bench(CHOSEN, log_end)
        memory = bench.partition.memory
        await bench.step(agreed(b"a", 50), agreed(b"n", 10))
        assert memory.watermark_ms == 10
        fetched.add(NAMES.clicks)
        await bench.step(agreed(b"b", 60), [])
        clock.now_s += 1.0
        await bench.step(agreed(b"c", 70), [])
        assert memory.watermark_ms == 70
        # Records of its own: it counts again, and the watermark doesn't fall.
        await bench.step(agreed(b"d", 90), agreed(b"m", 75))
        assert memory.watermark_ms == 75

    asyncio.run(check())
