"""What arrives of a simulated stream: events merged, delayed and sent twice, with broken records among them.

The simulation's probabilities and clicks stay as they are; only what a pipeline receives, and when, changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from deploy.feeding.simulation import Batch, Simulation

__all__ = ["AGAIN", "BROKEN", "FIRST", "Sends", "arrivals"]

_REPEAT_MS = 2_000  # a duplicate comes up to this long after the first

Int64s = npt.NDArray[np.int64]

FIRST, AGAIN, BROKEN = 0, 1, 2  # an event, its duplicate, a broken record


@dataclass(frozen=True, slots=True)
class Sends:
    """Records in the order in which they are sent."""

    times_ms: Int64s  # when each is sent, never falling
    event_times_ms: Int64s
    is_click: npt.NDArray[np.bool_]
    what: Int64s  # FIRST, AGAIN or BROKEN
    keys: list[bytes]
    values: list[bytes | None]


# One for each way in which producers get it wrong. The id in the key distinguishes broken records from events.
_GARBAGE: tuple[bytes | None, ...] = (
    b'{"impression_id":"%b","timestamp":',
    b'{"impression_id":"%b","timestamp":"yesterday","features":{}}',
    b'{"timestamp":1700000000000,"features":{},"note":"%b"}',
    b'{"impression_id":"not-%b","timestamp":1700000000000,"features":{}}',
    b"\xff\xfe%b",
    None,
)


def arrivals(batches: Iterator[Batch], simulation: Simulation) -> Iterator[Sends]:
    """Put events in the order of arrival: clicks among impressions, with delays, duplicates and broken records."""
    rng = np.random.default_rng([simulation.seed, 3])
    waiting: Sends | None = None
    for batch in batches:
        sends = _concatenated(waiting, _sends_of(batch, simulation, rng))
        order = np.argsort(sends.times_ms, kind="stable")
        # The next batch may have events before these, so the rest waits for it.
        ready = int(np.searchsorted(sends.times_ms[order], int(batch.times_ms[-1]), side="left"))
        waiting = _take(sends, order[ready:])
        if ready:
            yield _take(sends, order[:ready])
    if waiting is not None and len(waiting.keys):
        yield waiting


def _sends_of(batch: Batch, simulation: Simulation, rng: np.random.Generator) -> Sends:
    encode = msgspec.json.encode
    clicked = np.flatnonzero(batch.clicked)
    keys = [name.encode() for name in batch.ids]
    keys += [keys[row] for row in clicked.tolist()]
    times = np.concatenate([batch.times_ms, batch.click_times_ms[clicked]])
    listed = times.tolist()
    count = len(batch.ids)
    values: list[bytes | None] = [
        b'{"impression_id":%b,"timestamp":%d,"features":%b}' % (encode(batch.ids[row]), listed[row], batch.features[row])
        for row in range(count)
    ]
    values += [
        b'{"impression_id":%b,"timestamp":%d}' % (encode(batch.ids[row]), when)
        for row, when in zip(clicked.tolist(), listed[count:], strict=True)
    ]
    is_click = np.arange(len(times)) >= count
    sent = times + rng.integers(0, simulation.shuffle_ms + 1, len(times))
    again = np.flatnonzero(rng.random(len(times)) < simulation.duplicates)
    sends = Sends(sent, times, is_click, np.full(len(times), FIRST), keys, values)
    if len(again):
        twice = _take(sends, again)
        later = twice.times_ms + rng.integers(1, _REPEAT_MS, len(again))
        what = np.full(len(again), AGAIN)
        sends = _concatenated(sends, Sends(later, twice.event_times_ms, twice.is_click, what, twice.keys, twice.values))
    broken = np.flatnonzero(rng.random(count) < simulation.malformed)
    if len(broken):
        names = [b"broken-%b" % keys[row] for row in broken.tolist()]
        kinds = rng.integers(0, len(_GARBAGE), len(broken)).tolist()
        bad: list[bytes | None] = []
        for name, kind in zip(names, kinds, strict=True):
            pattern = _GARBAGE[kind]
            bad.append(None if pattern is None else pattern % name)
        when = batch.times_ms[broken]
        flags = rng.random(len(broken)) < 0.5
        sends = _concatenated(sends, Sends(when, when, flags, np.full(len(broken), BROKEN), names, bad))
    return sends


def _concatenated(first: Sends | None, second: Sends) -> Sends:
    if first is None:
        return second
    return Sends(
        np.concatenate([first.times_ms, second.times_ms]),
        np.concatenate([first.event_times_ms, second.event_times_ms]),
        np.concatenate([first.is_click, second.is_click]),
        np.concatenate([first.what, second.what]),
        first.keys + second.keys,
        first.values + second.values,
    )


def _take(sends: Sends, rows: npt.NDArray[np.int64]) -> Sends:
    listed = rows.tolist()
    return Sends(
        sends.times_ms[rows],
        sends.event_times_ms[rows],
        sends.is_click[rows],
        sends.what[rows],
        [sends.keys[row] for row in listed],
        [sends.values[row] for row in listed],
    )
