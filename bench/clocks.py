"""Compares rules for how far a source has come when some of its events have wrong times. Simulated streams, without Kafka.

    python bench/clocks.py [--seeds 5] [--seconds 600]

Each stream is the events of one partition in the order of arrival, with their event times. A rule reads them and returns the
front: the event time that the watermark follows, `lateness_ms` behind. There are two figures:

- `behind_ms`, on a stream without wrong events: mean distance of the front from the largest event time;
- `ahead`, on a stream with a share of wrong events: share of the other events that are below the watermark when they arrive.

The last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stream.join.events import Events
from stream.join.source_clock import SourceClock

LATENESS_MS = 5_000
NOW_MS = 1_750_000_000_000
PAST_MS = 1_650_000_000_000

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stream:
    """Events in the order of arrival; `wrong` marks those with a wrong event time."""

    times: Int64s
    arrivals: Int64s
    wrong: npt.NDArray[np.bool_]


def stream(kind: str, share: float, seed: int, seconds: int) -> Stream:
    """A live stream of many or few events a second, or a replay of one. A `share` of events has a time 59 min ahead."""
    draw = np.random.default_rng(seed)
    per_s = 0.2 if kind.endswith("few") else 75.0  # few: the clicks of a small stream in one of four partitions
    count = max(int(per_s * seconds), 40)
    made = np.sort(draw.uniform(0, 1_000 * count / per_s, count))
    arrived = made + draw.exponential(300, count)  # ms of transport
    order = np.argsort(arrived, kind="stable")
    made, arrived = made[order], arrived[order]
    wrong = draw.random(count) < share
    if kind.startswith("replay"):
        times, arrivals = PAST_MS + made, NOW_MS + arrived / 1_000  # a thousand times faster
    else:
        times, arrivals = NOW_MS + made, NOW_MS + arrived
    times = times + wrong * 59 * 60_000.0
    return Stream(times.astype(np.int64), arrivals.astype(np.int64), wrong)


Rule = Callable[[Stream], Iterator[int]]


def largest(events: Stream) -> Iterator[int]:
    """The largest event time so far."""
    yield from np.maximum.accumulate(events.times).tolist()


def largest_by_arrival(events: Stream) -> Iterator[int]:
    """The largest event time so far, each time limited to its arrival."""
    yield from np.maximum.accumulate(np.minimum(events.times, events.arrivals)).tolist()


def kth_largest(k: int) -> Rule:
    """The k-th largest event time so far, each time limited to its arrival."""

    def rule(events: Stream) -> Iterator[int]:
        top: list[int] = []
        for time in np.minimum(events.times, events.arrivals).tolist():
            top = sorted([*top, time])[-k:]
            yield top[0]

    return rule


def quantile(window: int) -> Rule:
    """The largest median of `window` consecutive event times, each time limited to its arrival."""

    def rule(events: Stream) -> Iterator[int]:
        times, best = np.minimum(events.times, events.arrivals), 0
        for index in range(len(times)):
            best = max(
                best, int(np.sort(times[max(index + 1 - window, 0) : index + 1])[0 if index + 1 < window else window // 2])
            )
            yield best

    return rule


def agreeing(k: int) -> Rule:
    """The largest minimum of k consecutive event times, each time limited to its arrival."""

    def rule(events: Stream) -> Iterator[int]:
        times, best = np.minimum(events.times, events.arrivals), 0
        for index in range(len(times)):
            best = max(best, int(times[max(index + 1 - k, 0) : index + 1].min()))
            yield best

    return rule


def source_clock(events: Stream) -> Iterator[int]:
    """`SourceClock`, which the join uses, fed one event at a time (for a longer run it returns the front of the last event)."""
    clock = SourceClock(LATENESS_MS, -1)
    for time, arrived in zip(events.times.tolist(), events.arrivals.tolist(), strict=True):
        clock.read(Events(times_ms=[time], arrivals_ms=[arrived]))
        yield clock.front_ms


RULES: dict[str, Rule] = {
    "largest (before)": largest,
    "largest, by arrival": largest_by_arrival,
    "3rd largest, by arrival": kth_largest(3),
    "median of 9, by arrival": quantile(9),
    "2 in a row, by arrival": agreeing(2),
    "3 in a row, by arrival": agreeing(3),
    "5 in a row, by arrival": agreeing(5),
    "SourceClock": source_clock,
}
KINDS = ("live", "live, few", "replay", "replay, few")
SHARES = (0.001, 0.01, 0.1, 0.3)


def behind_ms(rule: Rule, events: Stream) -> float:
    """Mean distance of the front from the largest event time, in ms."""
    newest = np.maximum.accumulate(events.times)
    fronts = np.array(list(rule(events)))
    settled = slice(10, None)  # without the first events, at which some rules have no front yet
    return float((newest - fronts)[settled].mean())


def ahead(rule: Rule, events: Stream) -> float:
    """Share of events with right times that arrive below the watermark."""
    fronts = np.array(list(rule(events)))
    right = ~events.wrong
    late = events.times[1:] < fronts[:-1] - LATENESS_MS
    return float(late[right[1:]].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=600, help="Event time of each stream.")
    options = parser.parse_args()
    seeds, seconds = range(options.seeds), options.seconds
    figures: dict[str, dict[str, float]] = {}
    for name, rule in RULES.items():
        row = figures[name] = {}
        for kind in KINDS:
            right = [stream(kind, 0, seed, seconds) for seed in seeds]
            row[f"behind_ms, {kind}"] = sum(behind_ms(rule, each) for each in right) / len(seeds)
            for share in SHARES:
                wrong = [stream(kind, share, seed, seconds) for seed in seeds]
                row[f"ahead, {kind}, {share:.1%}"] = sum(ahead(rule, each) for each in wrong) / len(seeds)
        print(f"{name:26}", *(f"{key} {value:.4g}" for key, value in row.items()), sep="\n  ")
    print(json.dumps({name: {key: round(value, 5) for key, value in row.items()} for name, row in figures.items()}))


if __name__ == "__main__":
    main()
