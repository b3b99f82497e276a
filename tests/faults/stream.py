"""The streams that are sent during faults: records in phases, each with a description of what must become of it.

- An ordinary record is in time: it is out of order by less than the lateness, so that its label follows from the rules alone.
- A record with `after_ms` is sent once the join's watermark is known to be exactly there, and may be late.
- A record with a `reason` can't be used, and becomes a dead letter.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

__all__ = [
    "CLICKS",
    "HORIZON_MS",
    "IMPRESSIONS",
    "LATENESS_MS",
    "MAX_FUTURE_MS",
    "WINDOW_MS",
    "Phase",
    "Sent",
    "Stream",
    "large",
    "ordinary",
    "quiet",
    "returning",
    "wrong_clocks",
]

WINDOW_MS, LATENESS_MS, HORIZON_MS, MAX_FUTURE_MS = 10_000, 2_000, 15_000, 3_600_000
FIRST_MS = 1_700_000_000_000
EVERY_MS = 50
# Records are out of order by up to this much. The rest of the lateness is for the sender, which may be ahead with one topic.
DISORDER_MS = 0.7 * LATENESS_MS

IMPRESSIONS, CLICKS = "impressions", "clicks"


@dataclass(frozen=True, slots=True)
class Sent:
    """A record to be sent: source, key, value and event time. `reason` is that of the dead letter that it must become."""

    source: str
    key: bytes
    value: bytes
    time_ms: int = -1
    reason: str = ""
    after_ms: int = -1
    codec: str = ""

    @property
    def oversize(self) -> bool:
        """Whether it is a good impression that is too large for `examples`: it only fits its own topic if compressed."""
        return self.reason == "too_large"


@dataclass(slots=True)
class Phase:
    """A part of a stream: rows over `over_s` seconds, a pause, then a watermark, for whose outputs the next phase waits."""

    rows: list[Sent]
    over_s: float = 3.0
    pause_s: float = 0.0
    watermark_ms: int = -1


@dataclass(slots=True)
class Stream:
    phases: list[Phase] = field(default_factory=list)

    @property
    def rows(self) -> list[Sent]:
        return [row for phase in self.phases for row in phase.rows]

    @property
    def last_ms(self) -> int:
        """The latest event time of a record that can be used."""
        return max(row.time_ms for row in self.rows if not row.reason)


@dataclass(slots=True)
class _Maker:
    """Makes records by event time; `arriving` returns them in the order of sending."""

    draw: random.Random
    hold_ms: int
    skew_ms: int
    timed: list[tuple[float, Sent]] = field(default_factory=list)

    def add(self, row: Sent, *, at_ms: int | None = None) -> None:
        time_ms = row.time_ms if at_ms is None else at_ms
        self.timed.append((time_ms + self.draw.uniform(0, DISORDER_MS), row))

    def arriving(self) -> list[Sent]:
        timed, self.timed = sorted(self.timed, key=lambda pair: pair[0]), []
        return [row for _, row in timed]

    def impression(self, key: bytes, time_ms: int) -> None:
        """An impression with repeats and with clicks within the hold, after it and after the window, at random."""
        draw = self.draw
        row = event(IMPRESSIONS, key, time_ms)
        self.add(row)
        if draw.random() < 0.05:
            self.add(row)
        kind = draw.random()
        if kind < 0.3:
            for _ in range(draw.choice([1, 1, 1, 2, 3])):
                click = event(CLICKS, key, time_ms + self._delay())
                for _ in range(draw.choice([1, 1, 1, 2])):
                    self.add(click)
        elif kind < 0.35:
            beyond = WINDOW_MS + draw.choice([1, draw.randrange(1, 5_000)])
            self.add(event(CLICKS, key, time_ms + draw.choice([beyond, beyond, -self.skew_ms - 1])))
        self.odd(key, time_ms)

    def _delay(self) -> int:
        """The delay in ms of a click that counts, often at the edges of the hold and of the window."""
        draw, edge = self.draw, min(self.hold_ms, WINDOW_MS)
        within = [0, draw.randrange(200), draw.randrange(WINDOW_MS), WINDOW_MS, edge, min(edge + 1, WINDOW_MS), -self.skew_ms]
        return draw.choice(within)

    def odd(self, key: bytes, time_ms: int) -> None:
        """Now and then a record that can't be joined: without an impression, unreadable or too far in the future."""
        draw = self.draw
        if draw.random() < 0.02:
            self.add(event(CLICKS, b"nobody-" + key, time_ms))
        if draw.random() < 0.02:
            source, (value, reason) = draw.choice([IMPRESSIONS, CLICKS]), draw.choice(UNREADABLE)(b"bad-" + key, time_ms)
            self.add(Sent(source, b"bad-" + key, value, reason=reason), at_ms=time_ms)
        if draw.random() < 0.005:
            # A margin for the time of the run, minutes at most, and for the broker's clock.
            ahead = event(draw.choice([IMPRESSIONS, CLICKS]), b"ahead-" + key, now_ms() + MAX_FUTURE_MS + 1_800_000)
            self.add(replace(ahead, reason="future_timestamp"), at_ms=time_ms)


def event(source: str, key: bytes, time_ms: int, *, padding: bytes = b"") -> Sent:
    """A record as clients send it."""
    features = b',"features":{"u":"u%d%b"}' % (time_ms % 7, padding) if source == IMPRESSIONS else b""
    return Sent(source, key, b'{"impression_id":"%b","timestamp":%d%b}' % (key, time_ms, features), time_ms)


def _unreadable(reason: str, value: Callable[[str, int], object]) -> Callable[[bytes, int], tuple[bytes, str]]:
    def make(key: bytes, time_ms: int) -> tuple[bytes, str]:
        found = value(key.decode(), time_ms)
        return (found if isinstance(found, bytes) else json.dumps(found).encode()), reason

    return make


UNREADABLE: Sequence[Callable[[bytes, int], tuple[bytes, str]]] = [
    _unreadable("malformed_json", lambda key, ms: b'{"impression_id":'),
    _unreadable("empty_value", lambda key, ms: b""),
    _unreadable("bad_utf8", lambda key, ms: b'{"impression_id":"\xff\xfe","timestamp":1}'),
    _unreadable("missing_field", lambda key, ms: {"impression_id": key}),
    _unreadable("wrong_type", lambda key, ms: {"impression_id": key, "timestamp": str(ms)}),
    _unreadable("out_of_range", lambda key, ms: {"impression_id": key, "timestamp": -1}),
    _unreadable("id_mismatch", lambda key, ms: {"impression_id": key + "x", "timestamp": ms}),
]


def now_ms() -> int:
    return int(time.time() * 1_000)


def _maker(seed: int, hold_ms: int, skew_ms: int) -> _Maker:
    return _Maker(random.Random(seed), hold_ms, skew_ms)


def ordinary(seed: int, hold_ms: int, skew_ms: int, *, count: int = 600, every_ms: int = EVERY_MS) -> Stream:
    """Three windows of ordinary traffic."""
    maker = _maker(seed, hold_ms, skew_ms)
    for index in range(count):
        maker.impression(b"%d-%d" % (seed, index), FIRST_MS + every_ms * index)
    return Stream([Phase(maker.arriving())])


def returning(seed: int, hold_ms: int, skew_ms: int, *, again: bool) -> Stream:
    """A first part, which ends with a watermark, and a second part that uses the first part's ids.

    With `again`, ids are used for impressions again: within the dedupe horizon (duplicates) and beyond it (new impressions).
    Otherwise late records of the first part come: impressions that the join remembers, others, and clicks of every age.
    """
    maker, count = _maker(seed, hold_ms, skew_ms), 300
    draw, times = maker.draw, {b"%d-%d" % (seed, index): FIRST_MS + EVERY_MS * index for index in range(count)}
    # Some impressions are so old when the second part begins that a repeat is late or their id is forgotten.
    times |= {b"%d-old-%d" % (seed, index): FIRST_MS - 60_000 + 1_000 * index for index in range(60)}
    for key, time_ms in times.items():
        maker.impression(key, time_ms)
    first = Phase(maker.arriving())
    end_ms = max(times.values())
    # Late clicks are sent both for windows and holds that the watermark has passed and for others.
    mark_ms = end_ms + draw.choice([WINDOW_MS + LATENESS_MS, WINDOW_MS // 2])
    if again:
        mark_ms = end_ms + WINDOW_MS + LATENESS_MS
    first.watermark_ms = mark_ms
    second: list[Sent] = []
    for key, time_ms in times.items():
        if again:
            if draw.random() < 0.3:
                maker.impression(key, mark_ms + 100 + draw.randrange(WINDOW_MS))
            continue
        if draw.random() < 0.1:
            second.append(replace(event(IMPRESSIONS, key, time_ms), after_ms=mark_ms))
        if draw.random() < 0.05:
            second.append(replace(event(IMPRESSIONS, b"late-" + key, time_ms), after_ms=mark_ms))
        if draw.random() < 0.15:
            delay = draw.choice([0, draw.randrange(WINDOW_MS), WINDOW_MS])
            second.append(replace(event(CLICKS, key, time_ms + delay), after_ms=mark_ms))
    draw.shuffle(second)
    fresh = _fresh(maker, seed, mark_ms + 100, 150)
    return Stream([first, Phase(second + fresh)])


def _fresh(maker: _Maker, seed: int, from_ms: int, count: int) -> list[Sent]:
    for index in range(count):
        maker.impression(b"%d-fresh-%d" % (seed, index), from_ms + EVERY_MS * index)
    return maker.arriving()


def large(seed: int, hold_ms: int, skew_ms: int) -> Stream:
    """Records near the topic's size limit, some of which only fit compressed, in batches with and without compression."""
    stream = ordinary(seed, hold_ms, skew_ms, count=400, every_ms=75)
    draw, [phase] = random.Random(seed), stream.phases
    rows = [replace(row, codec=draw.choice(["", "gzip"])) for row in phase.rows]
    for index in range(8):
        at = draw.randrange(len(rows))
        near_ms = max(FIRST_MS, rows[at].time_ms)
        fits = draw.random() < 0.7
        size = draw.choice([200_000, 700_000, 1_040_000]) if fits else draw.choice([1_200_000, 1_500_000, 3_000_000])
        row = event(IMPRESSIONS, b"%d-large-%d" % (seed, index), near_ms, padding=b"x" * size)
        # A record that only fits its topic compressed may be too large for `examples`, so it becomes a dead letter.
        rows.insert(at, replace(row, codec="gzip", reason="" if fits else "too_large"))
    phase.rows = rows
    return stream


def quiet(seed: int, hold_ms: int, skew_ms: int) -> Stream:
    """Clicks or both sources pause for longer than the default idle timeout (5 s).

    Event times pass in real time: an idle source stays idle until it is fetched again, and the other source may be ahead then.
    """
    maker, from_ms, phases = _maker(seed, hold_ms, skew_ms), FIRST_MS, [Phase([], over_s=0.0)]
    for number, silent in enumerate(maker.draw.sample(["none", CLICKS, "both", "none"], 4)):
        if silent == "both":
            phases[-1].pause_s = 6.5
            continue
        count = 130 if silent == CLICKS else 60
        for index in range(count):
            key, time_ms = b"%d-%d-%d" % (seed, number, index), from_ms + EVERY_MS * index
            if silent == CLICKS:
                maker.add(event(IMPRESSIONS, key, time_ms))
            else:
                maker.impression(key, time_ms)
        rows = maker.arriving()
        from_ms = max(row.time_ms for row in rows if not row.reason) + LATENESS_MS
        phases.append(Phase(rows, over_s=EVERY_MS * count / 1_000))
    return Stream(phases)


def wrong_clocks(seed: int, hold_ms: int, skew_ms: int, *, ahead_ms: int) -> Stream:
    """One client's clock is ahead. The records of other clients must be joined as if this client didn't exist."""
    maker = _maker(seed, hold_ms, skew_ms)
    first_ms, count = now_ms() - 60_000, 600
    for index in range(count):
        time_ms = first_ms + EVERY_MS * index
        maker.impression(b"%d-%d" % (seed, index), time_ms)
        if maker.draw.random() < 0.01:
            maker.add(event(IMPRESSIONS, b"%d-ahead-%d" % (seed, index), time_ms + ahead_ms), at_ms=time_ms)
    return Stream([Phase(maker.arriving())])
