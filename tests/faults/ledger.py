"""The ledger: what a `read_committed` reader finds in the topics, against what had to come of the events sent.

Every record that came in must be accounted for: an impression by its one first label, by name among those left out, as a
duplicate of one before, or by a dead letter; a click by the positive that it made, as a duplicate, or by a dead letter. Under
`fnw` the first label is a negative, and exactly where a click is in the window one correction follows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from deploy.settings import Settings
from stream.clients import aiokafka_options
from stream.join.events import WATERMARK_HEADER
from stream.join.examples import left_out_of
from stream.join.sampling import Sampling
from stream.offsets import committed_offsets
from stream.topics import TopicNames
from tests.stream.join.made_up import Events

__all__ = ["Ledger", "read_ledger"]

Place = tuple[str, int, int]  # topic, partition, offset
Id = tuple[int, bytes]  # partition, impression id


@dataclass(slots=True)
class Ledger:
    """The topics' records, and the group's offsets. `lost`, `doubled` and `wrong` are filled by `check`."""

    settings: Settings
    records: dict[str, list[Any]]
    committed: dict[TopicPartition, int]
    ends: dict[TopicPartition, int]
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)

    def check(self, events: Events) -> None:
        """Hold the topics against the events; what differs is counted and said."""
        names = TopicNames.of(self.settings.topics)
        impressions, clicks = self.records[names.impressions], self.records[names.clicks]
        dead = self._dead_letters({_place(record): record for record in (*impressions, *clicks)})
        accepted: dict[Id, Any] = {}  # the first of each id is the one that counts
        for record in impressions:
            if record.key is not None and _is_event(record):
                accepted.setdefault((record.partition, record.key), record)
        times = self._counting_clicks(clicks, accepted)
        self._labels(self.records[names.examples], accepted, events, times)
        expected = {_place(record): "malformed_json" for record in clicks if _is_event(record) and _time(record) is None}
        expected |= self._orphans(clicks, accepted)
        for place in expected.keys() - dead.keys():
            self._say("lost", f"{_name(place)} must be a dead letter ({expected[place]}) and is none")
        for place, reason in dead.items():
            if expected.get(place) != reason:
                self._say("wrong", f"{_name(place)} is a dead letter ({reason}), expected {expected.get(place, 'none')}")
        for tp, end in self.ends.items():
            if tp.topic in (names.impressions, names.clicks) and self.committed.get(tp, 0) != end:
                self._say("lost", f"{tp.topic}-{tp.partition}: committed up to {self.committed.get(tp, 0)} of {end}")
        self.problems.sort(key=lambda problem: problem.startswith("lost"))

    def _say(self, count: str, problem: str) -> None:
        setattr(self, count, getattr(self, count) + 1)
        self.problems.append(f"{count}: {problem}")

    def _dead_letters(self, sources: dict[Place, Any]) -> dict[Place, str]:
        found: dict[Place, str] = {}
        for letter in self.records[TopicNames.of(self.settings.topics).dead_letters]:
            headers = dict(letter.headers)
            place = (
                headers["source_topic"].decode(),
                int(headers["source_partition"]),
                int(headers["source_offset"]),
            )
            if place in found:
                self._say("doubled", f"{_name(place)} is twice in dead-letters")
            source = sources.get(place)
            if source is None or (source.key, source.value) != (letter.key, letter.value):
                self._say("wrong", f"{_name(place)}: its dead letter has other bytes")
            found[place] = headers["reason"].decode()
        return found

    def _counting_clicks(self, clicks: list[Any], accepted: dict[Id, Any]) -> dict[Id, set[int]]:
        """By impression, the times of its clicks that are in its window."""
        times: dict[Id, set[int]] = defaultdict(set)
        for click in clicks:
            impression, time_ms = accepted.get((click.partition, click.key)), _time(click)
            if impression is not None and time_ms is not None and self._in_window(time_ms, impression):
                times[click.partition, click.key].add(time_ms)
        return times

    def _in_window(self, click_ms: int, impression: Any) -> bool:
        join = self.settings.join
        return -join.negative_skew_ms <= click_ms - (_time(impression) or 0) <= join.window_ms

    def _orphans(self, clicks: list[Any], accepted: dict[Id, Any]) -> dict[Place, str]:
        """Clicks of nobody, and beyond the window; of two the same the second is a duplicate."""
        orphans, seen = {}, set()
        for click in clicks:
            time_ms, impression = _time(click), accepted.get((click.partition, click.key))
            if time_ms is None or (impression is not None and self._in_window(time_ms, impression)):
                continue
            if (click.key, time_ms) not in seen:
                orphans[_place(click)] = "orphan_click"
            seen.add((click.key, time_ms))
        return orphans

    def _labels(
        self,
        examples: list[Any],
        accepted: dict[Id, Any],
        events: Events,
        times: dict[Id, set[int]],
    ) -> None:
        for key in events.ids - {key for _, key in accepted}:
            self._say("lost", f"impression {key!r} never reached the topic: the sender lost it")
        by_offset = {(number, source.offset): (number, source.key) for (number, _), source in accepted.items()}
        found: dict[Id, list[tuple[str, int]]] = defaultdict(list)  # what was said of each impression, and where
        for example in examples:
            headers = {name: value.decode() for name, value in example.headers}
            if example.key is None:
                self._left_out(example, headers, by_offset, found)
                continue
            place = example.partition, example.key
            kind = headers.get("kind", "")
            found[place].append((kind, example.offset))
            expected = self._expected(place[1], place[1] in events.positives)
            if place in accepted and kind in expected:
                self._label(example, accepted[place], headers, expected[kind], times[place])
        for place in found.keys() - accepted.keys():
            self._say("wrong", f"impression {place[1]!r} is labelled, but never came in")
        for place in accepted:
            self._whole(place[1], found[place], self._expected(place[1], place[1] in events.positives))

    def _expected(self, key: bytes, positive: bool) -> dict[str, dict[str, str]]:
        """What must be said of an impression, in order: kind → headers, but those of the record itself."""
        join = self.settings.join
        fake, kept = join.label_policy == "fnw", Sampling(join.negative_rate).keeps(key)
        common = {"policy": "fnw"} if fake else {}
        if join.negative_rate < 1:
            common["rate"] = str(join.negative_rate)
        expected = {}
        if fake or not positive:
            kind = "first" if kept else "left_out"
            expected[kind] = {"kind": kind, **common, **({"label": "0", "weight": "1"} if kept else {})}
        if positive:
            kind = "correction" if fake else "first"
            expected[kind] = {"kind": kind, **common, "label": "1", "weight": "1"}
        return expected

    def _left_out(
        self,
        record: Any,
        headers: dict[str, str],
        by_offset: dict[tuple[int, int], Id],
        found: dict[Id, list[tuple[str, int]]],
    ) -> None:
        """A record that names impressions without a label: their offsets."""
        for offset in left_out_of(record) or []:
            place = by_offset.get((record.partition, offset))
            if place is None:
                self._say("wrong", f"offset {offset} of partition {record.partition} is left out, but is no impression's")
                continue
            found[place].append(("left_out", record.offset))
            expected = self._expected(place[1], positive=False).get("left_out")
            if expected is not None and headers != expected:
                self._say("wrong", f"impression {place[1]!r}: expected to be left out by {expected}, found {headers}")

    def _label(
        self, example: Any, source: Any, headers: dict[str, str], expected: dict[str, str], clicked_ms: set[int]
    ) -> None:
        clicked = headers.pop("click_ms", None)
        expected = {**expected, "source_offset": str(source.offset), "impression_ms": str(_time(source))}
        right_click = clicked is None if expected["label"] == "0" else clicked is not None and int(clicked) in clicked_ms
        if headers != expected or not right_click or example.value != source.value:
            self._say(
                "wrong",
                f"impression {example.key!r}: expected {expected}, found {headers}, click {clicked} of {sorted(clicked_ms)}",
            )

    def _whole(self, key: bytes, found: list[tuple[str, int]], expected: dict[str, dict[str, str]]) -> None:
        """Whether everything was said of an impression, once, and in order."""
        counts = Counter(kind for kind, _ in found)
        for kind in expected.keys() - counts.keys():
            self._say("lost", f"impression {key!r} has nothing of kind {kind}")
        for kind, count in counts.items():
            if kind not in expected:
                self._say("wrong", f"impression {key!r}: expected {list(expected)}, found {kind}")
            elif count > 1:
                self._say("doubled", f"impression {key!r} has {count} of kind {kind}")
        if counts.keys() == expected.keys() and counts.total() == len(expected):
            in_order = [kind for kind, _ in sorted(found, key=lambda row: row[1])]
            if in_order != list(expected):
                self._say("wrong", f"impression {key!r}: expected {list(expected)} in this order, found {in_order}")


def _is_event(record: Any) -> bool:
    return not any(name == WATERMARK_HEADER for name, _ in record.headers)


def _place(record: Any) -> Place:
    return record.topic, record.partition, record.offset


def _name(place: Place) -> str:
    return f"{place[0]}-{place[1]} offset {place[2]}"


def _time(record: Any) -> int | None:
    """Event time; None where the value can't be read."""
    try:
        return int(msgspec.json.decode(record.value)["timestamp"])
    except (msgspec.DecodeError, TypeError, KeyError):
        return None


async def read_ledger(settings: Settings) -> Ledger:
    """Read the four topics whole, as a `read_committed` reader, and what the join has committed."""
    names = TopicNames.of(settings.topics)
    topics = (names.impressions, names.clicks, names.examples, names.dead_letters)
    places = [TopicPartition(topic, number) for topic in topics for number in range(settings.topics.partitions)]
    records: dict[str, list[Any]] = {topic: [] for topic in topics}
    async with AIOKafkaConsumer(
        **aiokafka_options(settings.kafka), enable_auto_commit=False, isolation_level="read_committed"
    ) as consumer:
        consumer.assign(places)
        await consumer.seek_to_beginning()
        ends = await consumer.end_offsets(places)
        while waiting := [tp for tp, end in ends.items() if await consumer.position(tp) < end]:
            for tp, found in (await consumer.getmany(*waiting, timeout_ms=300, max_records=20_000)).items():
                records[tp.topic] += found
    group = f"{names.prefix}{settings.join.group}"
    committed = await committed_offsets(settings.kafka, group, [tp for tp in places if tp.topic in topics[:2]])
    return Ledger(settings, records, {tp: at.offset for tp, at in committed.items()}, dict(ends))
