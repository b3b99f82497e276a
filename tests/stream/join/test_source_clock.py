"""The front of a source: where a stream in order is, and out of reach of clocks that are wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from stream.join.events import Events
from stream.join.metrics import JoinMetrics
from stream.join.source_clock import AGREEING, SourceClock
from stream.settings import JoinSettings
from tests.stream.join.oracle import Partition, run_of
from tests.stream.join.test_commit import NUMBER, Bench

NOW_MS, PAST_MS, HOUR_MS = 1_750_000_000_000, 1_650_000_000_000, 3_600_000
LATENESS_MS = 5_000


def events(times: Sequence[int], arrivals: Sequence[int]) -> Events:
    return Events(times_ms=list(times), arrivals_ms=list(arrivals))


def front(times: Sequence[int], arrivals: Sequence[int], runs: Sequence[int] = (), start: int = -1) -> int:
    """Where a clock is behind events handed over in runs of these lengths; what is left comes in the last one."""
    clock, position = SourceClock(LATENESS_MS, start), 0
    for length in [*runs, len(times)]:
        run = events(times[position : position + length], arrivals[position : position + length])
        clock.read(run)
        assert run.front_ms == clock.front_ms
        position += length
    return clock.front_ms


RUNS = st.lists(st.integers(0, 7), max_size=12)
GAPS = st.lists(st.integers(0, 10 * HOUR_MS), min_size=AGREEING, max_size=40)
Draw = Any


def summed(gaps: Sequence[int], start: int) -> list[int]:
    times = [start]
    for gap in gaps:
        times.append(times[-1] + gap)
    return times


@given(GAPS, RUNS, st.integers(0, 100_000))
def test_a_live_stream_loses_nothing_however_few_its_events_are(gaps, runs, lag_ms):
    times = summed(gaps, NOW_MS)
    assert front(times, [time + lag_ms for time in times], runs) == times[-1]


@given(GAPS, RUNS, st.integers(2, 100_000))
def test_a_replay_in_order_is_four_events_behind_at_most(gaps, runs, speed):
    times = summed(gaps, PAST_MS)
    arrivals = [NOW_MS + (time - PAST_MS) // speed for time in times]
    assert times[-AGREEING] <= front(times, arrivals, runs) <= times[-1]


@given(GAPS, RUNS, st.data())
def test_events_out_of_order_by_the_lateness_hide_nothing(gaps, runs, data):
    """The front is never beyond the largest event time, and what comes later in order moves it on."""
    times = summed(gaps, NOW_MS)
    jitter = [data.draw(st.integers(0, LATENESS_MS)) for _ in times]
    arriving = sorted(zip(times, jitter, strict=True), key=sum)
    times, arrivals = [time for time, _ in arriving], [time + late for time, late in arriving]
    assert min(times[-AGREEING:]) <= front(times, arrivals, runs) <= max(times)


@given(GAPS, RUNS, st.data())
def test_wrong_events_in_a_replay_move_nothing(gaps, runs, data):
    """Four of them at most, anywhere, together too, with any time between the last right event and the present."""
    times = summed(gaps, PAST_MS)
    right = max(times)
    for _ in range(data.draw(st.integers(1, AGREEING - 1))):
        times.insert(data.draw(st.integers(0, len(times))), data.draw(st.integers(right + HOUR_MS, NOW_MS)))
    assert front(times, [NOW_MS] * len(times), runs) <= right


@given(GAPS, RUNS, st.data())
def test_no_clock_moves_a_live_stream_beyond_the_arrival(gaps, runs, data):
    """However many are wrong, and however far."""
    arrivals = summed(gaps, NOW_MS)
    times = [arrived + data.draw(st.integers(-HOUR_MS, HOUR_MS)) for arrived in arrivals]
    assert front(times, arrivals, runs) <= arrivals[-1]


def test_fifty_nine_minutes_ahead_make_no_right_event_late():
    """Every third event is wrong, live. The watermark stays behind what is on its way."""
    clock = SourceClock(LATENESS_MS, -1)
    for index in range(3_000):
        arrived = NOW_MS + 100 * index
        wrong = index % 3 == 0
        time = arrived + 59 * 60_000 if wrong else arrived - 400
        assert wrong or time >= clock.front_ms - LATENESS_MS
        clock.read(events([time], [arrived]))
    assert clock.front_ms >= arrived - 1_000


def test_a_slow_pipeline_is_not_hurried_by_one_event_that_came_at_once():
    """All events arrive half a minute late; one from a clock half a minute ahead seems to have taken no time."""
    clock = SourceClock(LATENESS_MS, -1)
    arrived = [NOW_MS + 100 * index for index in range(200)]
    clock.read(events([at - 30_000 for at in arrived], arrived))
    clock.read(events([arrived[-1]], [arrived[-1]]))
    assert clock.front_ms == arrived[-1] - 30_000


def test_a_step_forward_of_the_whole_stream_is_followed():
    """A night without events in a log of the past: five events on the other side are enough."""
    times = [PAST_MS + index for index in range(100)] + [PAST_MS + 8 * HOUR_MS + index for index in range(AGREEING)]
    assert front(times[:-1], [NOW_MS] * len(times)) == PAST_MS + 99
    assert front(times, [NOW_MS] * len(times)) >= PAST_MS + 8 * HOUR_MS


def test_the_front_goes_on_from_where_it_was_and_never_falls():
    clock = SourceClock(LATENESS_MS, NOW_MS)
    run = events([], [])
    clock.read(run)
    assert (run.front_ms, run.ahead) == (NOW_MS, 0)
    clock.read(events([PAST_MS] * 10, [NOW_MS] * 10))
    assert clock.front_ms == NOW_MS


@pytest.mark.parametrize(("ahead_ms", "counted"), [(1_000, 0), (1_001, 1)])
def test_events_ahead_of_their_arrival_are_counted(ahead_ms, counted):
    run = events([NOW_MS, NOW_MS + ahead_ms], [NOW_MS, NOW_MS])
    SourceClock(LATENESS_MS, -1).read(run)
    assert run.ahead == counted


@pytest.mark.parametrize(("speed", "wrong_every"), [(1, 7), (1_000, 40)])
def test_impressions_behind_a_wrong_clock_are_not_late(speed, wrong_every):
    """Live, and in a replay of the past: without the source's clock nearly all of the impressions after it are."""
    chosen = JoinSettings(window_ms=60_000, dedupe_horizon_ms=0, lateness_ms=LATENESS_MS)
    first_ms = NOW_MS if speed == 1 else PAST_MS
    late = {}
    for clocked in (True, False):
        partition = Partition(chosen)
        clocks = {source: SourceClock(LATENESS_MS, -1) for source in ("impressions", "clicks")}
        for index in range(400):
            runs = []
            for source, offset in (("impressions", partition.impressions), ("clicks", partition.clicks)):
                wrong = index % wrong_every == wrong_every - 1
                time_ms = first_ms + 1_000 * index + 59 * 60_000 * wrong
                run = run_of([(b"%d-%d" % (index, number), time_ms + number) for number in range(3)], offset, mark=-1)
                run.arrivals_ms = [NOW_MS + 1_000 * index // speed + 200] * 3
                if wrong:
                    run = run_of([(b"%d" % index, time_ms)], offset, mark=-1)
                    run.arrivals_ms = [NOW_MS + 1_000 * index // speed + 200]
                if clocked:
                    clocks[source].read(run)
                runs.append((source, run))
            plan = partition.step(runs, impressions_idle=False, clicks_idle=False)
            late[clocked] = late.get(clocked, 0) + plan.counts["late_impressions"]
    assert late[True] == 0
    assert late[False] > 1_000


def test_events_ahead_are_counted_by_source_and_partition():
    """The metric of a client's wrong clock, over a log whose records all arrived at 10^12."""

    async def check() -> None:
        bench = Bench()
        registry = CollectorRegistry()
        bench.partition._metrics = JoinMetrics(registry)
        await bench.step([(b"a", 10**12 + 1_001), (b"b", 10**12 + 1_000)], [(b"a", 10**12 + 9_000), (b"c", 10**12 + 9_001)])
        for source, count in (("impressions", 1), ("clicks", 2)):
            labels = {"source": source, "partition": str(NUMBER)}
            assert registry.get_sample_value("headrace_join_events_ahead_total", labels) == count

    asyncio.run(check())
