"""Checks of how far the workers are: lag, what retention took from them, low water, watermarks, open transactions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from deploy.cli.times import clock, duration
from deploy.doctor.finding import Finding
from deploy.doctor.model_checks import publishes_nothing
from deploy.doctor.readings import Readings
from stream.records.times import MAX_TIMESTAMP_MS
from stream.topics.needs import MEND

__all__ = ["deleted", "lag", "low_water", "open_transactions", "watermark"]

# A record that has waited this long for a worker. All of them work in seconds; a restart takes some ten.
MAX_WAIT_MS = 60_000
# Without any event for this long a watermark that holds back labels stands still: the partition is quiet. Events of a stream
# that isn't sparse come every second.
QUIET_MS = 60_000
# Share of the retention that the oldest record still needed may have used up: the rest is the time left to act.
NEAR_RETENTION = 0.8
# A transaction of the join ends after 15 s, by itself or by the broker (join.transaction_timeout_ms).
MAX_OPEN_MS = 60_000


def _positions(readings: Readings) -> dict[str, tuple[str, Mapping[tuple[str, int], int]]]:
    """By worker: the command that runs it, and the next offset it reads of each partition."""
    join = {
        (topic, number): position
        for number, committed in readings.committed.items()
        for topic, position in (("impressions", committed.impressions), ("clicks", committed.clicks))
        if position is not None
    }
    trainer = {("examples", number): at for number, at in readings.trainer.items()}
    scorer = {("score-requests", number): at for number, at in readings.scorer.items()}
    return {
        "join": ("headrace run join", join),
        "trainer": ("headrace run trainer", trainer),
        "scorer": ("headrace run scorer", scorer),
    }


_READS = {"join": ("impressions", "clicks"), "trainer": ("examples",), "scorer": ("score-requests",)}


def lag(readings: Readings) -> Iterator[Finding]:
    """Records wait too long for the join, the trainer or the scorers."""
    for worker, (command, positions) in _positions(readings).items():
        if worker in readings.unread_positions or (worker == "trainer" and publishes_nothing(readings) is not None):
            continue  # unknown; or told by `publishing`, since the trainer's position is that of its newest version
        # A version stands for the trainer's progress, and is that old at least.
        limit_ms = MAX_WAIT_MS + (2 * readings.snapshots.interval_ms if worker == "trainer" else 0)
        waiting, behind, oldest = list[str](), 0, readings.now_ms
        for (topic, number), log in readings.logs.items():
            if topic not in _READS[worker]:
                continue
            position = positions.get((topic, number), log.start)
            arrived = readings.arrived(topic, number, max(position, log.start))
            if position < log.stable_end and arrived is not None and readings.now_ms - arrived > limit_ms:
                waiting.append(f"{readings.topic(topic)}-{number}")
                behind += log.stable_end - position
                oldest = min(oldest, arrived)
        if waiting:
            members = readings.members.get(worker)
            yield Finding(
                check="lag",
                what=f"{worker}: {', '.join(waiting)}",
                expected=f"no record waiting longer than {duration(limit_ms)}",
                found=f"about {behind:,} records waiting, the oldest for {duration(readings.now_ms - oldest)}; "
                f"{'an unknown number of' if members is None else members} workers in the group",
                cure=_lag_cure(worker, command, members),
            )


def _lag_cure(worker: str, command: str, members: int | None) -> str:
    if members == 0:
        return f"start one: `{command}`"
    if members is None:
        return f"look whether one runs, else start it: `{command}`; if it runs, look at its log and /metrics"
    if worker == "trainer":
        return "look at its log and /metrics; a trainer that is busy needs more threads or a GPU, or a larger batch"
    return f"look at its log and /metrics; if it is busy, start another: `{command}`"


def deleted(readings: Readings) -> Iterator[Finding]:
    """Retention has deleted what a worker had not read: the join and the trainer stop there."""
    cures = {
        "join": "those events have no label any more. Raise topics.retention_ms and run `" + MEND + "`; set the offsets of "
        "impressions and clicks with Kafka's kafka-consumer-groups.sh to go on without them",
        "trainer": "HEADRACE_TRAINER__LOST_EXAMPLES=skip goes on without them; raise topics.retention_ms and run `"
        + MEND
        + "`",
    }
    for worker, (_, positions) in _positions(readings).items():
        for (topic, number), position in positions.items():
            log = readings.logs.get((topic, number))
            if worker in cures and log is not None and position < log.start:
                yield Finding(
                    check="deleted",
                    what=f"{worker}: {readings.topic(topic)}-{number}",
                    expected=f"the log from offset {position}, up to which it has read",
                    found=f"a log that begins at {log.start}",
                    cure=cures[worker],
                )


def low_water(readings: Readings) -> Iterator[Finding]:
    """What the join would have to read after the loss of its disk is deleted, or soon will be."""
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
                continue  # nothing is needed but what comes
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
                expected=f"the log from offset {low}, the earliest that the join's pending or remembered records need, kept "
                "for longer",
                found=found,
                cure=f"raise topics.retention_ms and run `{MEND}` now, then see `watermark`: it frees what is pending",
            )


def watermark(readings: Readings) -> Iterator[Finding]:
    """A watermark that one source holds back, or that nothing moves while impressions are pending."""
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
                expected=f"both sources within {duration(join.max_ahead_ms)} of event time (join.max_ahead_ms)",
                found=f"{readings.topic(slow)} stands at {_time(seen[slow])}, {readings.topic(other)} is "
                f"{duration(held_ms) if seen[slow] >= 0 else 'far'} ahead: labels wait for {readings.topic(slow)}",
                cure=f"look whether the producers of {readings.topic(slow)} run, and whether their clock is right; where it is "
                "sparse, run `headrace watermarks` beside it",
            )
        elif pending and newest and quiet_ms > QUIET_MS:
            yield Finding(
                check="watermark",
                what=what,
                expected=f"a watermark that passes the hold of the newest impression, {_time(pending)}",
                found=f"a quiet partition, no event for {duration(quiet_ms)}: its last impressions have no label",
                cure="where streams are sparse, run `headrace watermarks` beside them (or call `Client.send_watermark` on a "
                "timer); else look whether the producers run",
            )


def _newest(readings: Readings, topic: str, number: int) -> int:
    """When the newest sampled record arrived; 0 without one."""
    tail = readings.tails.get((topic, number))
    return 0 if tail is None or not len(tail.arrived_ms) else int(tail.arrived_ms.max())


def _pending(readings: Readings, number: int, watermark_ms: int) -> int | None:
    """When the newest impression's label is due, where the watermark has not passed that. Not of one that the join refuses."""
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
    """A transaction that nobody ends: readers of committed records stop before it, and the watermark with them."""
    for (topic, number), since_ms in sorted(readings.open_since_ms.items()):
        if readings.now_ms - since_ms > MAX_OPEN_MS:
            name = readings.topic(topic)
            yield Finding(
                check="open_transactions",
                what=f"{name}-{number}",
                expected=f"transactions that end within {duration(MAX_OPEN_MS)}",
                found=f"one that has been open for {duration(readings.now_ms - since_ms)}",
                cure="end the producer that began it; kafka-transactions.sh --find-hanging and --abort end it by force "
                f"(--topic {name} --partition {number})",
            )
