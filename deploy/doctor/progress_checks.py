"""Checks of the workers' progress: lag, records deleted too early, low water, watermarks, open transactions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from deploy.doctor.finding import Finding
from deploy.doctor.model_checks import publishes_nothing
from deploy.doctor.readings import Partition, Readings
from stream.records.times import MAX_TIMESTAMP_MS, clock, duration
from stream.topics.needs import MEND

__all__ = ["deleted", "lag", "low_water", "open_transactions", "watermark"]

# A record has waited too long for a worker after this. Workers take seconds, and a restart about ten seconds.
MAX_WAIT_MS = 60_000
# A partition without any event for this long is quiet, and its watermark stands still. In a stream that isn't sparse, events
# come every second.
QUIET_MS = 60_000
# The oldest record still needed may be this old, as a share of the retention; the rest is the time left to act.
NEAR_RETENTION = 0.8
# A transaction of the join ends within 15 s, by the join or by the broker (join.transaction_timeout_ms).
MAX_OPEN_MS = 60_000


class _Worker(NamedTuple):
    """What runs a worker, what it reads, and how far it has come."""

    command: str
    topics: tuple[str, ...]
    positions: Mapping[Partition, int]  # the next offset of each partition


def _workers(readings: Readings) -> dict[str, _Worker]:
    join = {
        (topic, number): position
        for number, committed in readings.committed.items()
        for topic, position in (("impressions", committed.impressions), ("clicks", committed.clicks))
        if position is not None
    }
    learned = {**readings.trainer, **readings.learned}
    trainer = {("examples", number): position for number, position in learned.items()}
    scorer = {("score-requests", number): position for number, position in readings.scorer.items()}
    return {
        "join": _Worker("headrace run join", ("impressions", "clicks"), join),
        "trainer": _Worker("headrace run trainer", ("examples",), trainer),
        "scorer": _Worker("headrace run scorer", ("score-requests",), scorer),
    }


def lag(readings: Readings) -> Iterator[Finding]:
    """Records wait too long for the join, the trainer or the scorers."""
    for name, worker in _workers(readings).items():
        if name in readings.unread_positions or (name == "trainer" and publishes_nothing(readings) is not None):
            continue  # the position is unknown, or `publishing` reports it: the trainer's is that of its newest version
        # While deltas are withheld, the trainer's position is known from its newest version, which is up to two intervals old.
        limit_ms = MAX_WAIT_MS + (2 * readings.snapshots.interval_ms if name == "trainer" and worker.positions else 0)
        waiting, behind, oldest = list[str](), 0, readings.now_ms
        for (topic, number), log in readings.logs.items():
            if topic not in worker.topics:
                continue
            position = worker.positions.get((topic, number), log.start)
            arrived = readings.arrived(topic, number, max(position, log.start))
            if position < log.stable_end and arrived is not None and readings.now_ms - arrived > limit_ms:
                waiting.append(f"{readings.topic(topic)}-{number}")
                behind += log.stable_end - position
                oldest = min(oldest, arrived)
        if waiting:
            members = readings.members.get(name)
            yield Finding(
                check="lag",
                what=f"{name}: {', '.join(waiting)}",
                expected=f"no record that waits longer than {duration(limit_ms)}",
                found=f"about {behind:,} records waiting, the oldest for {duration(readings.now_ms - oldest)}; "
                f"{'an unknown number of' if members is None else members} workers in the group",
                cure=_lag_cure(name, worker.command, members),
            )


def _lag_cure(worker: str, command: str, members: int | None) -> str:
    if members == 0:
        return f"start one: `{command}`"
    if members is None:
        return f"check whether one runs, else start one: `{command}`; if one runs, see its log and /metrics"
    if worker == "trainer":
        return "see its log and /metrics; a trainer that is busy needs more threads, a GPU or a larger batch"
    return f"see its log and /metrics; if it is busy, start another one: `{command}`"


def deleted(readings: Readings) -> Iterator[Finding]:
    """Retention has deleted records that a worker had not read; the join and the trainer stop there."""
    cures = {
        "join": f"the deleted events will have no label. Raise topics.retention_ms and run `{MEND}`; to go on without these "
        "events, set the join's offsets of impressions and clicks with Kafka's kafka-consumer-groups.sh",
        "trainer": "to go on without the deleted examples, set HEADRACE_TRAINER__LOST_EXAMPLES=skip; raise "
        f"topics.retention_ms and run `{MEND}`",
    }
    for name, worker in _workers(readings).items():
        for (topic, number), position in worker.positions.items():
            log = readings.logs.get((topic, number))
            if name in cures and log is not None and position < log.start:
                yield Finding(
                    check="deleted",
                    what=f"{name}: {readings.topic(topic)}-{number}",
                    expected=f"a log that still has offset {position}, the next one to read",
                    found=f"a log that begins at {log.start}",
                    cure=cures[name],
                )


def low_water(readings: Readings) -> Iterator[Finding]:
    """Records that the join needs to rebuild its state after the loss of its disk are deleted, or soon will be."""
    for number, committed in sorted(readings.committed.items()):
        progress = committed.progress
        if progress is None:
            continue
        lows = {
            "impressions": (progress.impressions_low, committed.impressions),
            "clicks": (progress.clicks_low, committed.clicks),
            "examples": (progress.examples_low, None),
        }
        for topic, (low, position) in lows.items():
            log = readings.logs.get((topic, number))
            if log is None or low == position or low >= log.stable_end:
                continue  # only records that the join has not read are needed
            kept_ms = int(readings.configs.get(topic, {}).get("retention.ms", "-1"))
            arrived = readings.arrived(topic, number, max(low, log.start))
            age_ms = 0 if arrived is None else readings.now_ms - arrived
            if low < log.start:
                found = f"a log that begins at {log.start}: the state can't be rebuilt without the worker's disk"
            elif 0 <= kept_ms < age_ms / NEAR_RETENTION:
                found = f"that record is {duration(age_ms)} old, and retention is {duration(kept_ms)}"
            else:
                continue
            yield Finding(
                check="low_water",
                what=f"{readings.topic(topic)}-{number}",
                expected=f"a log that keeps offset {low}, the earliest that the join's pending or remembered records need, for "
                "longer",
                found=found,
                cure=f"raise topics.retention_ms and run `{MEND}` now; then fix what `watermark` found, if it is listed, so "
                "that pending impressions get their labels",
            )


def watermark(readings: Readings) -> Iterator[Finding]:
    """One source holds back the watermark, or no event moves it while impressions are pending."""
    join = readings.join_settings
    for number, committed in sorted(readings.committed.items()):
        progress = committed.progress
        if progress is None:
            continue
        seen = {"impressions": progress.impressions_seen_ms, "clicks": progress.clicks_seen_ms}
        slow = min(seen, key=lambda topic: seen[topic])
        held_ms = max(seen.values()) - progress.watermark_ms
        what = f"partition {number}: {_time(progress.watermark_ms)}"
        newest = max((_newest(readings, topic, number) for topic in seen), default=0)
        quiet_ms = readings.now_ms - newest
        pending = _pending(readings, number, progress.watermark_ms)
        if held_ms > join.max_ahead_ms and held_ms > join.window_ms:
            other = "clicks" if slow == "impressions" else "impressions"
            yield Finding(
                check="watermark",
                what=what,
                expected=f"event times of both sources within {duration(join.max_ahead_ms)} (join.max_ahead_ms)",
                found=f"{readings.topic(slow)} stands at {_time(seen[slow])}, {readings.topic(other)} is "
                f"{duration(held_ms) if seen[slow] >= 0 else 'far'} ahead: labels wait for {readings.topic(slow)}",
                cure=f"check whether the producers of {readings.topic(slow)} run, and whether their clocks are right; if that "
                "stream is sparse, run `headrace watermarks` beside it",
            )
        elif pending and newest and quiet_ms > QUIET_MS:
            yield Finding(
                check="watermark",
                what=what,
                expected=f"a watermark that passes the hold of the newest impression, {_time(pending)}",
                found=f"a quiet partition, no event for {duration(quiet_ms)}: its last impressions have no label",
                cure="if the streams are sparse, run `headrace watermarks` beside them (or call `Client.send_watermark` on a "
                "timer); otherwise check whether the producers run",
            )


def _newest(readings: Readings, topic: str, number: int) -> int:
    """When the newest sampled record arrived; 0 if there is none."""
    tail = readings.tails.get((topic, number))
    return 0 if tail is None or not len(tail.arrived_ms) else int(tail.arrived_ms.max())


def _pending(readings: Readings, number: int, watermark_ms: int) -> int | None:
    """When the label of the newest impression that the join accepts is due; None if the watermark has passed that time."""
    tail, join = readings.tails.get(("impressions", number)), readings.join_settings
    if tail is None:
        return None
    limit_ms = np.minimum(tail.arrived_ms + join.max_future_ms, MAX_TIMESTAMP_MS - join.window_ms)
    accepted = tail.event_ms[(tail.event_ms >= 0) & (tail.event_ms <= limit_ms)]
    if not len(accepted):
        return None
    until = int(accepted.max()) + join.held_ms
    return until if until >= watermark_ms else None


def _time(event_ms: int) -> str:
    return "no event yet" if event_ms < 0 else clock(event_ms) if event_ms else "0"


def open_transactions(readings: Readings) -> Iterator[Finding]:
    """A transaction stays open: readers of committed records stop before it, and so does the watermark."""
    for (topic, number), since_ms in sorted(readings.open_since_ms.items()):
        if readings.now_ms - since_ms > MAX_OPEN_MS:
            name = readings.topic(topic)
            yield Finding(
                check="open_transactions",
                what=f"{name}-{number}",
                expected=f"transactions that end within {duration(MAX_OPEN_MS)}",
                found=f"a transaction that has been open for {duration(readings.now_ms - since_ms)}",
                cure="stop the producer that began it; kafka-transactions.sh --find-hanging and --abort end the transaction by "
                f"force (--topic {name} --partition {number})",
            )
