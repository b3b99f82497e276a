"""Checks of what producers send, over a sample of the newest events: partitions of keys, event times, dead letters."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deploy.doctor.finding import Finding
from deploy.doctor.producers import Sent, who_sent
from deploy.doctor.readings import Readings, Tail
from deploy.feeding.partitions import partitions_of
from stream.records.times import duration, unit_of

__all__ = ["clocks", "dead_letters", "partitioner", "time_units"]

KEYS_SHOWN = 5
# Clocks kept by NTP differ by milliseconds; a clock that is a second off is not kept by NTP.
CLOCK_TOLERANCE_MS = 1_000
# Fewer records are too few to judge a rate.
MIN_RECORDS = 100
# Some clicks have no impression even in a healthy stream (a beacon that never arrived, a bot); a larger share is a fault.
MAX_ORPHANS = 0.05
# Share of dead letters of any other reason; a producer that follows the contract causes none.
MAX_UNUSABLE = 0.01
# Share of clicks that come before their impressions by more than `join.negative_skew_ms`.
MAX_BACKWARD = 0.01

_CURES = {
    "orphan_click": "fix what `partitioner` and `clocks` found, if they are listed above; otherwise impressions get lost, or "
    "they have event times later than their clicks by more than join.negative_skew_ms allows",
    "late_impression": "raise join.dedupe_horizon_ms or join.lateness_ms to how late the impressions are, then run "
    "`headrace dead-letters replay --reason late_impression`",
    "future_timestamp": "set the producers' clocks (NTP); `clocks`, if it is listed above, says which producers",
    "out_of_range": "fix what `time_units` found, if it is listed above; otherwise "
    "`headrace dead-letters list --reason out_of_range` says which times are wrong",
    "too_large": "send fewer or shorter features, or raise topics.max_message_bytes, run `headrace topics create --mend` and "
    "restart the workers; `headrace dead-letters list --reason too_large` lists these events",
    "unreadable": "find the producer of these batches: its compression is broken, or they expand to more than 64 MiB; "
    "`headrace dead-letters list --reason unreadable` lists their partitions and offsets",
    "framed": "set schema_registry.url, restart the join, then run "
    "`headrace dead-letters replay --reason framed`; or use plain JSON serializers (docs/producers.md)",
    "enveloped": "set join.envelope to what `headrace dead-letters list --reason enveloped` names, restart the join, then run "
    "`headrace dead-letters replay --reason enveloped` (docs/producers.md)",
    "unknown_schema": "make these producers and the join use the same schema registry (schema_registry.url), then run "
    "`headrace dead-letters replay --reason unknown_schema`",
    "unusable_schema": "`headrace dead-letters list --reason unusable_schema` names each schema and what is wrong with it "
    "(docs/producers.md)",
    "malformed_frame": "`headrace dead-letters list --reason malformed_frame` names the schema that these records don't fit: "
    "their producer writes with another one",
    "id_mismatch": "make the producers use `impression_id` as the record's key, the same bytes (docs/producers.md)",
}


def partitioner(readings: Readings) -> Iterator[Finding]:
    """Keys are not in the partition that murmur2 gives them, so clicks don't meet their impressions."""
    for topic in ("impressions", "clicks"):
        count = readings.partitions.get(topic, 0)
        total, wrong = 0, list[tuple[bytes, int]]()
        for (name, number), tail in readings.tails.items():
            if name == topic:
                keys = [key for key in tail.keys if key is not None]
                total += len(keys)
                rows = np.flatnonzero(partitions_of(keys, count) != number)
                wrong.extend((keys[row], number) for row in rows.tolist())
        if wrong:
            shown = [f"{_key(key)} in {number}" for key, number in dict(wrong).items()]
            guess, cure = _guess(wrong, count)
            yield Finding(
                check="partitioner",
                what=readings.topic(topic),
                expected="every key in the partition that murmur2 gives it",
                found=f"{len(wrong):,} of {total:,} sampled records ({len(shown):,} keys) elsewhere{guess}, such as "
                f"{', '.join(shown[:KEYS_SHOWN])}",
                cure=cure,
            )


def _guess(wrong: Sequence[tuple[bytes, int]], count: int) -> tuple[str, str]:
    """The partitioner that explains all these (key, partition) pairs, if it is a known one, and what to do."""
    known: tuple[tuple[str, Callable[[bytes], int], str], ...] = (
        (
            "CRC32, librdkafka's default",
            lambda key: zlib.crc32(key) % count,
            "set `partitioner` to `murmur2_random` in that producer (librdkafka: confluent-kafka, rdkafka, .NET, PHP, Go)",
        ),
        (
            "FNV-1a, sarama's default",
            lambda key: _fnv1a(key, count),
            "give that producer (sarama) a murmur2 partitioner: docs/producers.md has one in four lines",
        ),
    )
    for name, partition_of, cure in known:
        # A wrong guess agrees with one record in `count` by chance, so a few records are enough.
        if len(wrong) >= KEYS_SHOWN and all(partition_of(key) == number for key, number in wrong):
            return f" ({name})", f"{cure}. Records that are already there stay unmatched"
    return "", (
        "find the producer of these keys and give it Kafka's murmur2 partitioner (docs/producers.md); no producer may choose "
        "the partition itself. Records that are already there stay unmatched"
    )


def _fnv1a(key: bytes, count: int) -> int:
    """The partition by sarama's hash partitioner: FNV-1a of 32 bits, signed, with the remainder made positive."""
    state = 0x811C9DC5
    for byte in key:
        state = ((state ^ byte) * 0x01000193) & 0xFFFFFFFF
    signed = state - (1 << 32) if state >= 1 << 31 else state
    return abs(signed) % count  # Go's remainder has the dividend's sign, which sarama drops


def _key(key: bytes) -> str:
    return repr(key.decode(errors="backslashreplace")[:40])


def time_units(readings: Readings) -> Iterator[Finding]:
    """Event times are in seconds, microseconds or nanoseconds, or are far from their arrival in any unit."""
    for topic in ("impressions", "clicks"):
        rows = [row for row in _events(readings, topic) if row.event_ms >= 0]
        found: dict[str | None, list[_Event]] = {}
        for row in rows:
            found.setdefault(row.unit, []).append(row)
        right = found.pop("milliseconds", [])
        for unit, wrong in found.items():
            looks = f"look like {unit}" if unit else "are more than 40 years off, in any unit"
            yield Finding(
                check="time_units",
                what=readings.topic(topic),
                expected="event times in milliseconds since 1970, at most 40 years before the arrival at the broker",
                found=f"{len(wrong):,} of {len(rows):,} sampled events have times that {looks}, such as {wrong[0].event_ms}: "
                f"they are dead letters. {who_sent([row.sent for row in wrong], [row.sent for row in right])}",
                cure="make that producer send `timestamp` as integer milliseconds (docs/producers.md)",
            )


def clocks(readings: Readings) -> Iterator[Finding]:
    """Event times lie after their arrival, or clicks come before their impressions."""
    for topic in ("impressions", "clicks"):
        rows = [row for row in _events(readings, topic) if row.event_ms >= 0 and row.unit == "milliseconds"]
        fast = [row for row in rows if row.ahead_ms > CLOCK_TOLERANCE_MS]
        if fast:
            others = [row.sent for row in rows if row.ahead_ms <= CLOCK_TOLERANCE_MS]
            rejected = sum(row.ahead_ms > readings.join_settings.max_future_ms for row in fast)
            yield Finding(
                check="clocks",
                what=readings.topic(topic),
                expected=f"event times at most {duration(CLOCK_TOLERANCE_MS)} after the arrival at the broker",
                found=f"{len(fast):,} of {len(rows):,} sampled events ahead, by up to "
                f"{duration(float(max(row.ahead_ms for row in fast)))}"
                f"{f', {rejected:,} of them dead letters (join.max_future_ms)' if rejected else ''}: their labels wait until "
                f"the watermark reaches them. {who_sent([row.sent for row in fast], others)}",
                cure="set that producer's clock (NTP)"
                if others
                else "set the brokers' clocks (NTP), or those of all producers: every sampled event is ahead",
            )
    yield from _backward(readings)


@dataclass(frozen=True, slots=True)
class _Event:
    """One sampled event; `unit` is the unit of its time, None where no unit fits."""

    event_ms: int
    ahead_ms: int
    unit: str | None
    sent: Sent


def _events(readings: Readings, topic: str) -> Iterator[_Event]:
    for (name, number), tail in readings.tails.items():
        if name == topic:
            headers = tail.headers or [()] * len(tail.keys)
            columns = (tail.offsets.tolist(), tail.keys, tail.arrived_ms.tolist(), tail.event_ms.tolist(), headers)
            for offset, key, arrived_ms, event_ms, each in zip(*columns, strict=True):
                sent = Sent(number, offset, key, each)
                yield _Event(event_ms, event_ms - arrived_ms, unit_of(event_ms, arrived_ms), sent)


def _backward(readings: Readings) -> Iterator[Finding]:
    """Clicks come before their impressions by event time; judged by the pairs of which both are in the sample."""
    skew, pairs, backward = readings.join_settings.negative_skew_ms, 0, list[int]()
    for (name, number), clicks in readings.tails.items():
        impressions = readings.tails.get(("impressions", number))
        if name != "clicks" or impressions is None:
            continue
        times = {key: time for key, time in zip(impressions.keys, impressions.event_ms.tolist(), strict=True) if time >= 0}
        for key, time in zip(clicks.keys, clicks.event_ms.tolist(), strict=True):
            if time >= 0 and key in times:
                pairs += 1
                if time - times[key] < -skew:
                    backward.append(times[key] - time)
    if pairs >= MIN_RECORDS and len(backward) > MAX_BACKWARD * pairs:
        yield Finding(
            check="clocks",
            what=f"{readings.topic('clicks')} against {readings.topic('impressions')}",
            expected=f"clicks at most {duration(skew)} (join.negative_skew_ms) before their impressions",
            found=f"{len(backward):,} of {pairs:,} sampled pairs the other way round, by up to {duration(max(backward))}: "
            "those clicks never count",
            cure="set the clocks of both producers (NTP); until then join.negative_skew_ms = "
            f"{int(np.percentile(backward, 99)) + 1} accepts 99 % of these clicks",
        )


def dead_letters(readings: Readings) -> Iterator[Finding]:
    """More of the sampled events became dead letters than in a healthy stream."""
    reasons = {(letter.partition, letter.offset): letter.reason for letter in readings.letters}
    for topic in ("impressions", "clicks"):
        settled, found = 0, Counter[str]()
        for (name, number), tail in readings.tails.items():
            if name == topic:
                offsets = tail.offsets[_settled(readings, name, number, tail)]
                settled += len(offsets)
                records = [((name, number), offset) for offset in offsets.tolist()]
                found.update(reasons[record] for record in records if record in reasons)
        for reason, count in sorted(found.items()):
            limit = MAX_ORPHANS if reason == "orphan_click" else MAX_UNUSABLE
            if settled >= MIN_RECORDS and count > limit * settled:
                yield Finding(
                    check="dead_letters",
                    what=f"{readings.topic(topic)}: {reason}",
                    expected=f"at most {limit:.0%} of the events",
                    found=f"{count:,} of {settled:,} sampled and settled ({count / settled:.1%})",
                    cure=_CURES.get(
                        reason,
                        f"`headrace dead-letters list --reason {reason}` lists them and says why; fix that producer "
                        "(docs/events.md)",
                    ),
                )


def _settled(readings: Readings, topic: str, number: int, tail: Tail) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which sampled events the join has read, (N,); of clicks, those old enough that an impression can't come any more."""
    committed = readings.committed.get(number)
    position = None if committed is None else getattr(committed, topic)
    if committed is None or position is None:
        return np.zeros(len(tail.offsets), bool)
    read = tail.offsets < position
    if topic == "clicks" and committed.progress is not None:
        read &= tail.event_ms + readings.join_settings.negative_skew_ms < committed.progress.watermark_ms
    return read
