"""Each of the doctor's checks, over readings that are made up: what is wrong is found, and a healthy system is left alone."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.doctor.event_checks import _fnv1a
from deploy.doctor.examination import CHECKS, examine
from deploy.doctor.finding import Finding
from deploy.doctor.kafka_readings import _event_ms
from deploy.doctor.readings import Committed, LogReading, Partition, Readings, SampledLetter, Tail
from deploy.feeding.partitions import partitions_of
from stream.join.commit_metadata import Progress
from stream.join.settings_history import NEVER_MS
from stream.records.times import MAX_TIMESTAMP_MS
from stream.settings import JoinSettings
from stream.topics.admin import Difference

NOW = 1_700_000_000_000
WEEK = 7 * 86_400_000
ROOT = Path(__file__).resolve().parents[3]


def tail(keys: Sequence[bytes], event_ms: Sequence[int], arrived_ms: Sequence[int] | None = None, first: int = 0) -> Tail:
    arrived = [time + 50 for time in event_ms] if arrived_ms is None else arrived_ms
    offsets = np.arange(first, first + len(keys), dtype=np.int64)
    return Tail(
        offsets=offsets,
        keys=keys,
        arrived_ms=np.array(arrived, np.int64),
        event_ms=np.array(event_ms, np.int64),
    )


def ids(count: int, number: int) -> list[bytes]:
    """Keys that belong into partition `number` of two."""
    keys = [b"i%d" % index for index in range(count * 3)]
    return [key for key, right in zip(keys, partitions_of(keys, 2).tolist(), strict=True) if right == number][:count]


def progress(**changed: int) -> Progress:
    settled = NOW - 10_000
    fields = dict(watermark_ms=settled, impressions_seen_ms=settled, clicks_seen_ms=settled)
    return Progress(**(fields | dict(impressions_low=50, clicks_low=50, examples_low=50) | changed))


def healthy(**changed: Any) -> Readings:
    """Two partitions, 200 impressions and clicks of them each, read to the end; three workers."""
    partitions = [(topic, number) for topic in ("impressions", "clicks", "examples", "score-requests") for number in (0, 1)]
    times = list(range(NOW - 40_000, NOW - 20_000, 100))
    tails = {(topic, number): tail(ids(200, number), times) for topic, number in partitions[:4]}
    return Readings(
        **{
            **dict(
                now_ms=NOW,
                join_settings=JoinSettings(),
                prefix="shop-",
                partitions=dict.fromkeys(("impressions", "clicks", "examples", "dead-letters"), 2),
                configs={
                    name: {"retention.ms": str(WEEK), "retention.bytes": "-1"} for name in ("impressions", "clicks", "examples")
                },
                offsets_retention_ms=WEEK,
                logs=dict.fromkeys(partitions, LogReading(0, 200, 200)),
                tails=tails,
                committed={number: Committed(200, 200, progress()) for number in (0, 1)},
                members={"join": 1, "trainer": 1, "scorer": 1},
                trainer={0: 200, 1: 200},
                scorer={0: 200, 1: 200},
                arrivals={(topic, number, 50): NOW - 600_000 for topic, number in partitions},
            ),
            **changed,
        }
    )


def only(readings: Readings) -> Finding:
    [finding] = examine(readings)
    return finding


def test_a_healthy_system_and_an_empty_one() -> None:
    assert examine(healthy()) == []
    assert examine(Readings(now_ms=NOW, join_settings=JoinSettings())) == []


def test_topics_and_co_partitioning() -> None:
    found = only(healthy(differences=[Difference("shop-clicks", "topic", "present", "absent", "headrace topics create")]))
    assert (found.check, found.what, found.cure) == ("topics", "shop-clicks: topic", "headrace topics create")
    found = only(healthy(partitions=dict.fromkeys(("impressions", "clicks", "examples"), 2) | {"dead-letters": 1}))
    assert found.check == "co_partitioning" and found.found.endswith("shop-examples 2, shop-dead-letters 1")


def kept(**retention_ms: int) -> dict[str, dict[str, str]]:
    return {name: {"retention.ms": str(retention_ms.get(name, WEEK))} for name in ("impressions", "clicks", "examples")}


@pytest.mark.parametrize(
    ("changed", "what", "found"),
    [
        (dict(configs=kept(clicks=1_264_999)), "shop-clicks: retention.ms", "21.1 m"),
        (dict(configs=kept(examples=WEEK // 2)), "shop-examples: retention.ms", "3.5 d"),
        (dict(configs=kept(impressions=-1), offsets_retention_ms=None), "shop-examples: retention.ms", "7 d"),
        (dict(configs=kept(impressions=-1, examples=-1)), "brokers: offsets.retention.minutes", "7 d"),
        (dict(configs={"clicks": {"retention.bytes": "1000"}}), "shop-clicks: retention.bytes", "1,000"),
    ],
)
def test_retention(changed: dict[str, Any], what: str, found: str) -> None:
    finding = only(healthy(**changed))
    assert (finding.check, finding.what, finding.found) == ("retention", what, found)


def test_brokers_that_forget_offsets_stop_the_join() -> None:
    """As `Takeover` does: labels without committed offsets are no position to start from."""
    finding = only(healthy(configs=kept(impressions=-1, examples=-1)))
    assert "its offsets are forgotten, and the next one stops when it takes over" in finding.expected


def test_retention_that_is_just_enough() -> None:
    # window 60 s + 2 × horizon 600 s + lateness 5 s
    assert examine(healthy(configs=kept(clicks=1_265_000))) == []


def crc32(key: bytes) -> int:
    return zlib.crc32(key) % 2


@pytest.mark.parametrize(
    ("partition_of", "guess", "cure"),
    [
        (crc32, "CRC32, librdkafka's default", "murmur2_random"),
        (lambda key: _fnv1a(key, 2), "FNV-1a, sarama's default", "sarama"),
        (lambda key: int(key[1:]) % 2, "", "find the producer of these keys"),
    ],
)
def test_a_wrong_partitioner(partition_of: Callable[[bytes], int], guess: str, cure: str) -> None:
    keys = [b"i%d" % index for index in range(100)]
    tails: dict[Partition, Tail] = {}
    for number in (0, 1):
        there = [key for key in keys if partition_of(key) == number]
        tails["clicks", number] = tail(there, [NOW - 10_000] * len(there))
    finding = only(healthy(tails=tails))
    wrong = [key for key, right in zip(keys, partitions_of(keys, 2).tolist(), strict=True) if partition_of(key) != right]
    assert (finding.check, finding.what) == ("partitioner", "shop-clicks")
    assert finding.found.startswith(f"{len(wrong)} of 100 sampled records ({len(wrong)} keys) elsewhere")
    assert guess in finding.found and ("default" in finding.found) == bool(guess) and cure in finding.cure
    assert any(f"'{key.decode()}' in {partition_of(key)}" in finding.found for key in wrong)


@given(st.binary(max_size=30))
def test_fnv1a_is_gos(key: bytes) -> None:
    state = 2_166_136_261
    for byte in key:
        state = (state ^ byte) * 16_777_619 % (1 << 32)
    signed = int(np.array(state, np.uint32).view(np.int32))
    assert _fnv1a(key, 7) == abs(int(np.fmod(signed, 7)))


def test_clocks_ahead() -> None:
    times, arrived = [NOW - 40_000] * 199 + [NOW + 60_000], [NOW - 40_000] * 200
    found = only(healthy(tails={("impressions", 0): tail(ids(200, 0), times, arrived)}))
    assert (found.check, found.what) == ("clocks", "shop-impressions")
    assert found.found.startswith("1 of 200 sampled events ahead, by up to 1.67 m")
    assert examine(healthy(tails={("impressions", 0): tail(ids(200, 0), arrived, arrived)})) == []


def test_who_is_ahead_is_named_by_what_only_these_events_have() -> None:
    wrong = [b"app-%d" % index for index in range(100)]
    wrong = [key for key, right in zip(wrong, partitions_of(wrong, 2).tolist(), strict=True) if right == 0][:9]
    keys, times, arrived = [*ids(191, 0), *wrong], [NOW - 40_000] * 191 + [NOW + 7_200_000] * 9, [NOW - 40_000] * 200
    headers = [[("source", b"web"), ("v", b"1")]] * 191 + [[("source", b"app"), ("v", b"1"), ("x", None)]] * 9
    sampled = replace(tail(keys, times, arrived), headers=headers)
    found = only(healthy(tails={("clicks", 0): sampled}))
    assert "9 of 200 sampled events ahead, by up to 2.01 h, 9 of them dead letters (join.max_future_ms)" in found.found
    shown = ", ".join(f"'{key.decode()}' at 0/{191 + index}" for index, key in enumerate(wrong[:3]))
    assert found.found.endswith(f"They come from header source = 'app', ids that begin with 'app-'; such as {shown}")
    assert "set that producer's clock" in found.cure
    # Nobody stands out where all are ahead: then it is the brokers' clock, or everybody's.
    found = only(healthy(tails={("clicks", 0): replace(tail(keys, [NOW] * 200, arrived), headers=headers)}))
    assert "200 of 200" in found.found
    assert "set the brokers' clocks" in found.cure


@pytest.mark.parametrize(
    ("time", "looks"),
    [
        (NOW // 1_000, "look like seconds"),
        (NOW * 1_000, "look like microseconds"),
        (NOW * 1_000_000, "look like nanoseconds"),
        (77, "are more than 40 years off, in any unit"),
    ],
)
def test_times_in_another_unit(time: int, looks: str) -> None:
    times, arrived = [NOW - 40_000] * 195 + [time] * 5, [NOW - 40_000] * 200
    headers = [[("source", b"web")]] * 195 + [[("source", b"job")]] * 5
    found = only(healthy(tails={("impressions", 1): replace(tail(ids(200, 1), times, arrived), headers=headers)}))
    assert (found.check, found.what) == ("time_units", "shop-impressions")
    assert found.found.startswith(f"5 of 200 sampled events have times that {looks}, such as {time}: they are dead letters.")
    assert "They come from header source = 'job'; such as" in found.found
    assert "integer milliseconds" in found.cure


@pytest.mark.parametrize(
    ("timestamp", "found"),
    [(77, 77), (2**62, 2**62), (2**62 + 1, -1), (2**63, -1), (2**64, -1), (10**40, -1), (-1, -1), (-(2**63) - 1, -1)],
)
def test_a_time_is_read_as_far_as_it_can_be_compared(timestamp: int, found: int) -> None:
    read = np.array([_event_ms(b'{"timestamp":%d}' % timestamp)], np.int64)
    assert read.tolist() == [found]
    keys, times = ids(1, 0), [int(read[0])]
    tails = {("impressions", 0): tail(keys, times, [NOW]), ("clicks", 0): tail(keys, times, [NOW])}
    assert {each.check for each in examine(healthy(tails=tails))} <= {"time_units"}


def test_clicks_before_their_impressions() -> None:
    keys, times = ids(200, 1), [NOW - 30_000] * 200
    tails = {("impressions", 1): tail(keys, times), ("clicks", 1): tail(keys, [time - 700 for time in times])}
    found = only(healthy(tails=tails))
    assert (found.check, found.what) == ("clocks", "shop-clicks against shop-impressions")
    assert found.found.startswith("200 of 200 sampled pairs the other way round, by up to 700 ms")
    assert "join.negative_skew_ms = 701" in found.cure
    assert examine(healthy(tails=tails, join_settings=JoinSettings(negative_skew_ms=700))) == []


def test_orphans_and_other_dead_letters() -> None:
    def letters(count: int, topic: str, reason: str) -> list[SampledLetter]:
        return [SampledLetter(reason, (topic, 0), offset) for offset in range(count)]

    assert examine(healthy(letters=letters(20, "clicks", "orphan_click"))) == []  # 20 of 400, and no more than 5 %
    found = only(healthy(letters=letters(21, "clicks", "orphan_click")))
    assert (found.check, found.what, found.found) == (
        "dead_letters",
        "shop-clicks: orphan_click",
        "21 of 400 sampled and settled (5.2%)",
    )
    found = only(healthy(letters=letters(5, "impressions", "wrong_type")))
    assert found.what == "shop-impressions: wrong_type" and "headrace dead-letters list --reason wrong_type" in found.cure
    for reason, named in (("framed", "set schema_registry.url"), ("enveloped", "set join.envelope")):
        found = only(healthy(letters=letters(5, "impressions", reason)))
        assert named in found.cure and f"headrace dead-letters replay --reason {reason}" in found.cure
    # Clicks that the watermark has not passed may still find their impression, and don't dilute the rate.
    half = {number: Committed(200, 200, progress(watermark_ms=NOW - 30_000)) for number in (0, 1)}
    found = only(healthy(letters=letters(20, "clicks", "orphan_click"), committed=half))
    assert found.found == "20 of 200 sampled and settled (10.0%)"


def test_lag() -> None:
    behind = {0: Committed(150, 200, progress()), 1: Committed(200, 200, progress())}
    arrivals = {("impressions", 0, 150): NOW - 300_000, ("impressions", 0, 50): NOW - 600_000}
    found = only(healthy(committed=behind, arrivals=arrivals))
    assert (found.check, found.what) == ("lag", "join: shop-impressions-0")
    assert found.found == "about 50 records waiting, the oldest for 5 m; 1 workers in the group"
    assert "start another one: `headrace run join`" in found.cure
    arrivals["impressions", 0, 150] = NOW - 59_000
    assert examine(healthy(committed=behind, arrivals=arrivals)) == []


def test_a_worker_that_never_ran() -> None:
    arrivals = {("examples", 0, 0): NOW - 90_000, ("score-requests", 1, 0): NOW - 90_000}
    nobody = {"join": 0, "trainer": 0, "scorer": 0}
    trainer, scorer = examine(healthy(trainer={}, scorer={0: 200}, members=nobody, arrivals=arrivals))
    assert trainer.what == "trainer: shop-examples-0" and trainer.cure == "start one: `headrace run trainer`"
    assert scorer.what == "scorer: shop-score-requests-1" and "about 200 records" in scorer.found


def test_a_worker_whose_position_or_members_are_unknown() -> None:
    """That is not one that never ran, nor one that nobody runs."""
    arrivals = {("examples", 0, 0): NOW - 90_000, ("score-requests", 1, 0): NOW - 90_000}
    unknown = healthy(trainer={}, scorer={0: 200}, members={}, arrivals=arrivals, unread_positions={"trainer"})
    scorer = only(unknown)
    assert scorer.what == "scorer: shop-score-requests-1"
    assert scorer.found.endswith("; an unknown number of workers in the group")
    assert scorer.cure.startswith("check whether one runs, else start one: `headrace run scorer`")
    everything = {"join", "trainer", "scorer"}
    behind = {("impressions", 0, 0): NOW - 90_000}
    assert examine(healthy(committed={}, arrivals=arrivals | behind, scorer={}, unread_positions=everything)) == []


def test_deleted_before_it_was_read() -> None:
    logs = dict(healthy().logs) | {("examples", 0): LogReading(210, 300, 300), ("clicks", 1): LogReading(201, 201, 201)}
    found = examine(healthy(logs=logs))
    assert [(each.check, each.what) for each in found] == [
        ("deleted", "join: shop-clicks-1"),
        ("deleted", "trainer: shop-examples-0"),
        ("low_water", "shop-examples-0"),
        ("low_water", "shop-clicks-1"),
    ]
    assert "LOST_EXAMPLES=skip" in found[1].cure


def test_low_water() -> None:
    logs = dict(healthy().logs) | {("impressions", 0): LogReading(51, 200, 200)}
    found = only(healthy(logs=logs))
    assert (found.check, found.what) == ("low_water", "shop-impressions-0")
    assert found.found.startswith("a log that begins at 51: the state can't be rebuilt")
    near = {("clicks", 1, 50): NOW - int(WEEK * 0.81)}
    found = only(healthy(arrivals=near))
    assert found.what == "shop-clicks-1" and found.found == "that record is 5.67 d old, and retention is 7 d"
    assert examine(healthy(arrivals={("clicks", 1, 50): NOW - int(WEEK * 0.79)})) == []
    # Nothing is remembered: low water is the position, and the log's start may pass both.
    nothing = {0: Committed(200, 200, progress(impressions_low=200, clicks_low=200, examples_low=200))}
    assert examine(healthy(committed=nothing, arrivals={("clicks", 0, 200): 0})) == []


def test_a_watermark_that_one_source_holds_back() -> None:
    held = progress(watermark_ms=NOW - 700_000, clicks_seen_ms=NOW - 700_000)
    found = only(healthy(committed={1: Committed(200, 200, held)}))
    assert found.check == "watermark" and found.what.startswith("partition 1: 2023-11-14T")
    assert "11.5 m ahead: labels wait for shop-clicks" in found.found
    never = progress(watermark_ms=NEVER_MS, clicks_seen_ms=NEVER_MS)
    found = only(healthy(committed={1: Committed(200, 200, never)}))
    assert found.found.startswith("shop-clicks stands at no event yet, shop-impressions is far ahead")
    # An idle source holds nothing back.
    idle = progress(clicks_seen_ms=NOW - 700_000)
    assert examine(healthy(committed={1: Committed(200, 200, idle)})) == []


def test_a_watermark_that_nothing_moves() -> None:
    held = {number: Committed(200, 200, progress(watermark_ms=NOW - 40_000)) for number in (0, 1)}
    later = healthy(now_ms=NOW + 300_000, committed=held)
    found = examine(later)
    assert [each.check for each in found] == ["watermark", "watermark"]
    assert "a quiet partition, no event for 5.33 m" in found[0].found and "`headrace watermarks`" in found[0].cure
    assert examine(healthy(now_ms=NOW + 30_000, committed=held)) == []
    # Its label is out when the hold is over, whatever the window.
    assert examine(healthy(now_ms=NOW + 300_000)) == []
    wider = healthy(now_ms=NOW + 300_000, join_settings=JoinSettings(hold_ms=60_000))
    assert [each.check for each in examine(wider)] == ["watermark", "watermark"]
    passed = progress(watermark_ms=NOW + 60_000, impressions_seen_ms=NOW + 60_000, clicks_seen_ms=NOW + 60_000)
    assert examine(replace(later, committed={number: Committed(200, 200, passed) for number in (0, 1)})) == []


@pytest.mark.parametrize(
    "event_ms",
    [
        NOW * 1_000,  # microseconds: no date has so many years
        MAX_TIMESTAMP_MS,
        NOW - 30_000 + 50 + JoinSettings().max_future_ms + 1,  # a clock that is ahead by a little too much
    ],
)
def test_a_watermark_waits_for_no_impression_that_the_join_refuses(event_ms: int) -> None:
    """Everything that it accepted has its label; the refused one never gets one."""
    arrived = [NOW - 30_000 + 50] * 201
    tails = {("impressions", 0): tail(ids(201, 0), [NOW - 30_000] * 200 + [event_ms], arrived)}
    passed = progress(watermark_ms=NOW + 60_000, impressions_seen_ms=NOW + 60_000, clicks_seen_ms=NOW + 60_000)
    quiet = healthy(now_ms=NOW + 300_000, tails=tails, committed={0: Committed(201, 201, passed)})
    check = "time_units" if event_ms > NOW * 100 else "clocks"
    assert only(quiet).check == check
    # It doesn't hide the others either.
    found = examine(replace(quiet, committed={0: Committed(201, 201, progress(watermark_ms=NOW - 40_000))}))
    assert [each.check for each in found] == [check, "watermark"]
    assert found[1].expected.endswith("the newest impression, 2023-11-14T22:13:00Z")


def test_open_transactions() -> None:
    found = only(healthy(open_since_ms={("clicks", 0): NOW - 120_000, ("clicks", 1): NOW - 1_000}))
    assert (found.check, found.what, found.found) == (
        "open_transactions",
        "shop-clicks-0",
        "a transaction that has been open for 2 m",
    )


def test_every_check_is_documented() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    table = page.split("| check | what it finds |")[1].split("\n\n")[0]
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == list(CHECKS)
