"""The ledger: what a `read_committed` reader finds in the topics, against what had to come of the records sent.

It has the rules of docs/join.md and docs/events.md a second time, in its own words, and shares no code with the join: it reads
with another client (`logs.py`), and takes headers and values apart itself. Every record that came in must be accounted for:
an impression by its one first label, by name among those left out, as a duplicate of one before, or by a dead letter; a click
by the label that it made, as a duplicate, or by a dead letter. A correction follows exactly where the first counting click is
later than the hold.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from tests.faults.stream import CLICKS, IMPRESSIONS, Sent

__all__ = ["Found", "Ledger", "Life", "Use"]

Place = tuple[str, int, int]  # impressions or clicks, partition, offset
FOREVER_MS = 1 << 62


@dataclass(frozen=True, slots=True)
class Life:
    """Settings, and from which offsets on records were read and labels written under them, by partition; the first from 0."""

    window_ms: int
    hold_ms: int
    horizon_ms: int
    skew_ms: int
    rate: float
    impressions_from: Mapping[int, int] = field(default_factory=dict)
    examples_from: Mapping[int, int] = field(default_factory=dict)

    def counts(self, click_ms: int, impression_ms: int) -> bool:
        return -self.skew_ms <= click_ms - impression_ms <= self.window_ms

    def keeps(self, key: bytes) -> bool:
        """Whether a negative goes out: the hash of its id as a number of 64 bits, below that share of them."""
        return self.rate >= 1 or int.from_bytes(blake2b(key, digest_size=8).digest(), "big") < self.rate * (1 << 64)


@dataclass(slots=True)
class Found:
    """What the log holds: records by topic (`logs.NAMES`), the group's offsets and the ends of the sources' partitions."""

    records: dict[str, list[Any]]
    committed: dict[tuple[str, int], int] = field(default_factory=dict)
    ends: dict[tuple[str, int], int] = field(default_factory=dict)


@dataclass(slots=True)
class Use:
    """An impression that counts, and what is expected and found of it."""

    record: Any
    life: Life
    time_ms: int
    oversize: bool = False  # larger than `examples` takes: named as left out, and a letter for each label that the rate keeps
    clicks: list[Sent] = field(default_factory=list)  # that count, and came before the window had passed
    clicks_read: bool = False  # whether the join has committed that it read one of them
    found: list[tuple[str, int]] = field(default_factory=list)  # kind, offset in examples
    labelled_at: int = -1  # offset in examples of its first label; not of a record that leaves it out among others

    @property
    def name(self) -> str:
        return f"impression {self.record.key!r} at {self.record.partition}/{self.record.offset}"

    @property
    def due_ms(self) -> int:
        return self.time_ms + self.life.hold_ms

    @property
    def early_ms(self) -> list[int]:
        """Times of the clicks that make the first label positive."""
        return sorted(click.time_ms for click in self.clicks if click.time_ms <= self.due_ms and click.after_ms <= self.due_ms)

    @property
    def left_out(self) -> bool:
        """Whether its first label is a negative that the rate leaves out, under the settings that it came by."""
        return not self.early_ms and not self.life.keeps(self.record.key)

    @property
    def labels(self) -> dict[str, tuple[str, list[int]]]:
        """What has to come in order: kind → label and the times of the clicks that it may name."""
        if self.oversize:
            return {"first": ("0", [])}  # named as left out
        if not self.clicks:
            return {"first": ("0", [])}
        if self.early_ms:
            return {"first": ("1", self.early_ms[:1])}
        return {"first": ("0", []), "correction": ("1", [click.time_ms for click in self.clicks])}


class Ledger:
    """Holds what was found against what was sent; `lost`, `doubled` and `wrong` are counted, and said in `problems`.

    Args:
        until_ms: the watermark that is known; what it doesn't settle may still be missing.
    """

    def __init__(self, lives: Sequence[Life], found: Found, sent: Sequence[Sent], *, until_ms: int = FOREVER_MS) -> None:
        self._lives, self._found, self._until_ms = lives, found, until_ms
        self._sent = Counter((row.source, row.key, row.value) for row in sent)
        self._in_time = Counter((row.source, row.key, row.value) for row in sent if row.after_ms < 0)
        self._meant = {(row.source, row.key, row.value, row.after_ms >= 0): row for row in sent}
        self.lost = self.doubled = self.wrong = 0
        self.problems: list[str] = []
        self.uses: dict[tuple[int, int], Use] = {}  # by partition and offset
        self._by_key: dict[tuple[int, bytes], list[Use]] = defaultdict(list)
        self._dead: dict[Place, str] = {}  # expected
        self._not_due: set[Place] = set()
        self._impressions(self._incoming(IMPRESSIONS))
        self._clicks(self._incoming(CLICKS))
        for (partition, offset), use in self.uses.items():
            if use.oversize and (use.clicks or not use.left_out):  # a correction has a letter, too
                self._dead[IMPRESSIONS, partition, offset] = "too_large"
                if use.due_ms >= until_ms:
                    self._not_due.add((IMPRESSIONS, partition, offset))
        self._letters()
        self._examples()
        for use in self.uses.values():
            self._whole(use)
        self._order()
        self._positions()
        self.problems.sort(key=lambda problem: problem.startswith("lost"))

    def _say(self, count: str, problem: str) -> None:
        setattr(self, count, getattr(self, count) + 1)
        self.problems.append(f"{count}: {problem}")

    # What came in

    def _incoming(self, source: str) -> Iterator[tuple[Any, Sent]]:
        """Records of a source in the order of each partition, with what they are meant to be."""
        unseen = Counter({row: count for row, count in self._sent.items() if row[0] == source})
        seen: Counter[tuple[str, bytes, bytes]] = Counter()
        for record in sorted(self._found.records[source], key=lambda record: (record.partition, record.offset)):
            if any(name == "headrace-watermark" for name, _ in record.headers):
                continue
            row = source, record.key, record.value or b""
            # Of a record that was sent in time and again late the first are those in time.
            meant = self._meant.get((*row, seen[row] >= self._in_time[row]))
            seen[row] += 1
            unseen[row] -= 1
            if meant is None or unseen[row] < 0:
                self._say("wrong", f"{source} {record.partition}/{record.offset} {record.key!r}: nobody sent it")
                continue
            yield record, meant
        for (_, key, _), count in unseen.items():
            if count > 0:
                self._say("lost", f"{source} {key!r} never reached the topic: the sender lost it")

    def _life(self, partition: int, offset: int, where: str) -> Life:
        for life in reversed(self._lives[1:]):
            if offset >= getattr(life, where).get(partition, FOREVER_MS):
                return life
        return self._lives[0]

    def _impressions(self, incoming: Iterable[tuple[Any, Sent]]) -> None:
        last: dict[tuple[int, bytes], Use] = {}
        for record, meant in incoming:
            place, id_ = (IMPRESSIONS, record.partition, record.offset), (record.partition, record.key)
            life = self._life(record.partition, record.offset, "impressions_from")
            known = last.get(id_)
            if meant.reason and not meant.oversize:
                self._dead[place] = meant.reason
            elif meant.time_ms < meant.after_ms - life.window_ms - life.horizon_ms:
                self._dead[place] = "late_impression"
            elif known is None or meant.time_ms > known.time_ms + known.life.horizon_ms:
                use = last[id_] = Use(record, life, meant.time_ms, oversize=meant.oversize)
                self.uses[record.partition, record.offset] = use
                self._by_key[id_].append(use)

    def _clicks(self, incoming: Iterable[tuple[Any, Sent]]) -> None:
        waited: dict[tuple[int, bytes, int], bool] = {}
        for record, meant in incoming:
            place = CLICKS, record.partition, record.offset
            if meant.reason:
                self._dead[place] = meant.reason
                continue
            uses = [use for use in self._by_key[record.partition, record.key] if use.life.counts(meant.time_ms, use.time_ms)]
            # An id is forgotten two horizons after its window.
            uses = [use for use in uses if use.time_ms >= meant.after_ms - use.life.window_ms - 2 * use.life.horizon_ms]
            if uses:
                if uses[-1].time_ms + uses[-1].life.window_ms >= meant.after_ms:
                    uses[-1].clicks.append(meant)
                    uses[-1].clicks_read |= record.offset < self._found.committed.get((CLICKS, record.partition), 0)
                continue
            # Of two equal ones that wait the second is a duplicate; one that comes when time is up has nothing to wait for.
            wait = record.partition, record.key, meant.time_ms
            skew_ms = max(life.skew_ms for life in self._lives)
            if meant.time_ms + skew_ms < meant.after_ms or wait not in waited:
                self._dead[place] = "orphan_click"
                waited[wait] = True
                if meant.time_ms + skew_ms >= self._until_ms:
                    self._not_due.add(place)

    # What came out

    def _letters(self) -> None:
        sources = {
            (source, record.partition, record.offset): record
            for source in (IMPRESSIONS, CLICKS)
            for record in self._found.records[source]
        }
        found: dict[Place, str] = {}
        for letter in self._found.records["dead_letters"]:
            headers = dict(letter.headers)
            topic = headers["source_topic"].decode()
            source = next((name for name in (IMPRESSIONS, CLICKS) if topic.endswith(name)), topic)
            place = source, int(headers["source_partition"]), int(headers["source_offset"])
            reason = headers["reason"].decode()
            use = self.uses.get(place[1:]) if source == IMPRESSIONS else None
            corrected = use is not None and use.oversize and bool(use.clicks) and not use.early_ms
            if place in found and not corrected:
                self._say("doubled", f"{_name(place)} is twice in dead-letters")
            record = sources.get(place)
            value = None if record is None else b"" if reason == "too_large" else record.value or b""
            if record is None or (record.key, value) != (letter.key, letter.value or b""):
                self._say("wrong", f"{_name(place)}: its dead letter has other bytes")
            found[place] = reason
        for place in self._dead.keys() - found.keys() - self._not_due:
            self._say("lost", f"{_name(place)} must be a dead letter ({self._dead[place]}) and is none")
        for place, reason in found.items():
            if self._dead.get(place) != reason:
                self._say("wrong", f"{_name(place)} is a dead letter ({reason}), expected {self._dead.get(place, 'none')}")

    def _examples(self) -> None:
        for record in sorted(self._found.records["examples"], key=lambda record: (record.partition, record.offset)):
            headers = {name: value.decode() for name, value in record.headers}
            kind, life = headers.get("kind", ""), self._life(record.partition, record.offset, "examples_from")
            if kind == "left_out" and record.key is None:
                self._left_out(record, headers, life)
            elif kind == "matched" and record.key is None:
                self._matched(record, headers)
            elif record.key is None:
                self._say("wrong", f"examples {record.partition}/{record.offset}: no key, and headers {headers}")
            else:
                self._label(record, headers, life)

    def _use(self, partition: int, offset: int, what: str) -> Use | None:
        use = self.uses.get((partition, offset))
        if use is None:
            self._say("wrong", f"impressions {partition}/{offset} is {what}, but no impression that counts")
        return use

    def _left_out(self, record: Any, headers: dict[str, str], life: Life) -> None:
        expected = {"kind": "left_out", **_rate(life)}
        for offset in json.loads(record.value):
            use = self._use(record.partition, offset, "left out")
            if use is None:
                continue
            use.found.append(("first", record.offset))
            if headers != expected or use.labels["first"][0] != "0" or (life.keeps(use.record.key) and not use.oversize):
                self._say("wrong", f"{use.name}: left out by {headers}, expected {use.labels} under a rate of {life.rate}")

    def _matched(self, record: Any, headers: dict[str, str]) -> None:
        """A click that waits for the first label of its impression, for the join's own use."""
        for offset, impression_ms, click_ms in json.loads(record.value):
            use = self._use(record.partition, offset, "matched")
            if use is None:
                continue
            clicks = {click.time_ms for click in use.clicks}
            if headers != {"kind": "matched"} or impression_ms != use.time_ms or click_ms not in clicks:
                self._say("wrong", f"{use.name}: matched by {headers} at {impression_ms} with {click_ms}, clicks {clicks}")

    def _label(self, record: Any, headers: dict[str, str], life: Life) -> None:
        offset, kind, click = headers.pop("source_offset", "none"), headers["kind"], headers.pop("click_ms", None)
        use = self._use(record.partition, int(offset) if offset.isdigit() else -1, f"labelled ({kind})")
        if use is None:
            return
        use.found.append((kind, record.offset))
        if kind == "first":
            use.labelled_at = record.offset
        label, clicks_ms = use.labels.get(kind, ("none", []))
        expected = {"kind": kind, "label": label, "weight": "1", "impression_ms": str(use.time_ms), **_rate(life)}
        right_click = click is None if not clicks_ms else click is not None and int(click) in clicks_ms
        kept = label != "0" or life.keeps(use.record.key)
        if label == "none":
            return  # said by `_whole`
        same = (record.key, record.value) == (use.record.key, use.record.value)
        if headers != expected or not right_click or not kept or not same or use.oversize:
            said = f"{headers}, click {click}" if kept else "sent, though left out"
            self._say("wrong", f"{use.name}: expected {expected}, click {clicks_ms}, found {said}")

    def _whole(self, use: Use) -> None:
        """Whether everything was said of an impression, once, and in order."""
        counts, expected = Counter(kind for kind, _ in use.found), list(use.labels)
        for kind in expected:
            if not counts[kind] and use.due_ms < self._until_ms:
                self._say("lost", f"{use.name} has no {kind}")
        for kind, count in counts.items():
            if kind not in expected:
                self._say("wrong", f"{use.name}: expected {expected}, found a {kind}")
            elif count > 1:
                self._say("doubled", f"{use.name} has {count} of kind {kind}")
        said = [kind for kind, _ in sorted(use.found, key=lambda row: row[1])]
        if counts.keys() == set(expected) and len(said) == len(expected) and said != expected:
            self._say("wrong", f"{use.name}: expected {expected} in this order, found {said}")

    def _order(self) -> None:
        """First labels of one life leave by their due time, whatever they say."""
        last: dict[tuple[int, int], tuple[int, Use]] = {}
        rows = [
            (use.record.partition, use.labelled_at, use)
            for use in self.uses.values()
            if use.labelled_at >= 0 and self._meant_in_time(use)
        ]
        for partition, offset, use in sorted(rows, key=lambda row: row[:2]):
            where = partition, id(use.life)
            before = last.get(where)
            if before is not None and before[1].due_ms > use.due_ms and before[0] < offset:
                self._say("wrong", f"{use.name}: labelled behind {before[1].name}, which is due later")
            else:
                last[where] = offset, use

    def _meant_in_time(self, use: Use) -> bool:
        record = use.record
        return (IMPRESSIONS, record.key, record.value, True) not in self._meant

    def _positions(self) -> None:
        for (source, partition), end in self._found.ends.items():
            committed = self._found.committed.get((source, partition), 0)
            if committed != end:
                self._say("lost", f"{source}-{partition}: committed up to {committed} of {end}")


def _rate(life: Life) -> dict[str, str]:
    return {"rate": str(life.rate)} if life.rate < 1 else {}


def _name(place: Place) -> str:
    return f"{place[0]} {place[1]}/{place[2]}"
