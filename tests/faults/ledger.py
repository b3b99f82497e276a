"""The ledger: compares what a `read_committed` reader finds in the topics with what must become of the records that were sent.

It implements the rules of docs/join.md and docs/events.md a second time and shares no code with the join: it reads with another
client (`logs.py`) and parses headers and values itself. Every record that was sent must be accounted for:

- an impression, by exactly one first label, by a record that names it as left out, as a duplicate of an earlier impression, or
  by a dead letter;
- a click, by the label that it made, as a duplicate, or by a dead letter.

There must be a correction if and only if the first click that counts is later than the hold.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

from tests.faults.stream import CLICKS, IMPRESSIONS, Sent

__all__ = ["Found", "Ledger", "Life", "Use"]

FOREVER_MS = 1 << 62


class Position(NamedTuple):
    """A record of a source."""

    source: str  # impressions or clicks
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.source} {self.partition}/{self.offset}"


@dataclass(frozen=True, slots=True)
class Life:
    """The settings of a span of the join's life, and the first offsets that were read and written with them, by partition."""

    window_ms: int
    hold_ms: int
    horizon_ms: int
    skew_ms: int
    rate: float
    impressions_from: Mapping[int, int] = field(default_factory=dict)
    examples_from: Mapping[int, int] = field(default_factory=dict)

    def counts(self, click_ms: int, impression_ms: int) -> bool:
        """Whether a click belongs to an impression, by their event times."""
        return -self.skew_ms <= click_ms - impression_ms <= self.window_ms

    def keeps(self, key: bytes) -> bool:
        """Whether a negative is sent: if the 64-bit hash of its id is below this share of all numbers."""
        return self.rate >= 1 or int.from_bytes(blake2b(key, digest_size=8).digest(), "big") < self.rate * (1 << 64)


@dataclass(slots=True)
class Found:
    """Contents of the log: records by topic (`logs.NAMES`), the group's offsets, and the ends of the sources' partitions."""

    records: dict[str, list[Any]]
    committed: dict[tuple[str, int], int] = field(default_factory=dict)
    ends: dict[tuple[str, int], int] = field(default_factory=dict)


class Label(NamedTuple):
    """A label that must come."""

    label: str
    clicks_ms: list[int]  # times of the clicks, one of which it must name


@dataclass(slots=True)
class Use:
    """An impression that isn't a duplicate or a dead letter, with the labels that are expected and found."""

    record: Any
    life: Life
    time_ms: int
    oversize: bool = False  # too large for `examples`: named as left out, with a dead letter for each label that the rate keeps
    clicks: list[Sent] = field(default_factory=list)  # clicks that count and came before the watermark passed the window
    clicks_read: bool = False  # whether the join has committed that it read one of them
    found: list[tuple[str, int]] = field(default_factory=list)  # labels found: kind, offset in examples
    labelled_at: int = -1  # offset in examples of its first label; -1 without, also if it is named as left out

    @property
    def name(self) -> str:
        return f"impression {self.record.key!r} at {self.record.partition}/{self.record.offset}"

    @property
    def due_ms(self) -> int:
        return self.time_ms + self.life.hold_ms

    @property
    def early_ms(self) -> list[int]:
        """Times of the clicks that make the first label positive, sorted."""
        return sorted(click.time_ms for click in self.clicks if click.time_ms <= self.due_ms and click.after_ms <= self.due_ms)

    @property
    def left_out(self) -> bool:
        """Whether its first label is a negative that the rate leaves out, with the settings when it was read."""
        return not self.early_ms and not self.life.keeps(self.record.key)

    @property
    def labels(self) -> dict[str, Label]:
        """The labels that must come, in order: by kind, the label and the times of the clicks that it may name."""
        if self.oversize:
            return {"first": Label("0", [])}  # named as left out
        if not self.clicks:
            return {"first": Label("0", [])}
        if self.early_ms:
            return {"first": Label("1", self.early_ms[:1])}
        return {"first": Label("0", []), "correction": Label("1", [click.time_ms for click in self.clicks])}


class Ledger:
    """Compares what was found with what was sent. Counts problems as `lost`, `doubled` or `wrong` and lists them.

    Args:
        lives: the settings so far, in order.
        until_ms: the join's watermark. Outputs that it doesn't settle may still be missing.
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
        self._dead: dict[Position, str] = {}  # reasons of the dead letters that are expected
        self._not_due: set[Position] = set()  # records whose dead letter may still be missing
        self._arrivals: dict[tuple[int, bytes, int], set[str]] = defaultdict(set)  # of clicks: by partition, key and time
        self._impressions(self._incoming(IMPRESSIONS))
        self._clicks(self._incoming(CLICKS))
        for (partition, offset), use in self.uses.items():
            if use.oversize and (use.clicks or not use.left_out):  # a correction has a letter, too
                position = Position(IMPRESSIONS, partition, offset)
                self._dead[position] = "too_large"
                if use.due_ms >= until_ms:
                    self._not_due.add(position)
        self._letters()
        self._examples()
        for use in self.uses.values():
            self._whole(use)
        self._order()
        self._positions()
        self.problems.sort(key=lambda problem: problem.startswith("lost"))

    def _report(self, count: str, problem: str) -> None:
        setattr(self, count, getattr(self, count) + 1)
        self.problems.append(f"{count}: {problem}")

    # Inputs

    def _incoming(self, source: str) -> Iterator[tuple[Any, Sent]]:
        """Records of a source in the order of each partition, with their descriptions from the sender."""
        unseen = Counter({row: count for row, count in self._sent.items() if row[0] == source})
        seen: Counter[tuple[str, bytes, bytes]] = Counter()
        for record in sorted(self._found.records[source], key=lambda record: (record.partition, record.offset)):
            if any(name == "headrace-watermark" for name, _ in record.headers):
                continue
            row = source, record.key, record.value or b""
            # If a record was sent in time and again late, the first copies are those that were in time.
            meant = self._meant.get((*row, seen[row] >= self._in_time[row]))
            seen[row] += 1
            unseen[row] -= 1
            if meant is None or unseen[row] < 0:
                self._report("wrong", f"{source} {record.partition}/{record.offset} {record.key!r}: nobody sent it")
                continue
            yield record, meant
        for (_, key, _), count in unseen.items():
            if count > 0:
                self._report("lost", f"{source} {key!r} never reached the topic: the sender lost it")

    def _life(self, partition: int, offset: int, where: str) -> Life:
        """The life at an offset; `where` is `impressions_from` or `examples_from`."""
        for life in reversed(self._lives[1:]):
            if offset >= getattr(life, where).get(partition, FOREVER_MS):
                return life
        return self._lives[0]

    def _impressions(self, incoming: Iterable[tuple[Any, Sent]]) -> None:
        last: dict[tuple[int, bytes], Use] = {}
        for record, meant in incoming:
            position, id_ = Position(IMPRESSIONS, record.partition, record.offset), (record.partition, record.key)
            life = self._life(record.partition, record.offset, "impressions_from")
            known = last.get(id_)
            if meant.reason and not meant.oversize:
                self._dead[position] = meant.reason
            elif meant.time_ms < meant.after_ms - life.window_ms - life.horizon_ms:
                self._dead[position] = "late_impression"
            elif known is None or meant.time_ms > known.time_ms + known.life.horizon_ms:
                use = last[id_] = Use(record, life, meant.time_ms, oversize=meant.oversize)
                self.uses[record.partition, record.offset] = use
                self._by_key[id_].append(use)

    def _clicks(self, incoming: Iterable[tuple[Any, Sent]]) -> None:
        waited: dict[tuple[int, bytes, int], bool] = {}
        for record, meant in incoming:
            position = Position(CLICKS, record.partition, record.offset)
            if meant.reason:
                self._dead[position] = meant.reason
                continue
            self._arrivals[record.partition, record.key, meant.time_ms].add(str(record.timestamp))
            uses = [use for use in self._by_key[record.partition, record.key] if use.life.counts(meant.time_ms, use.time_ms)]
            # The join forgets an id two horizons after its window.
            uses = [use for use in uses if use.time_ms >= meant.after_ms - use.life.window_ms - 2 * use.life.horizon_ms]
            if uses:
                if uses[-1].time_ms + uses[-1].life.window_ms >= meant.after_ms:
                    uses[-1].clicks.append(meant)
                    uses[-1].clicks_read |= record.offset < self._found.committed.get((CLICKS, record.partition), 0)
                continue
            # An early click waits for its impression, and a second one with the same time is a duplicate. A click that comes
            # when its impression could no longer come doesn't wait.
            wait = record.partition, record.key, meant.time_ms
            skew_ms = max(life.skew_ms for life in self._lives)
            if meant.time_ms + skew_ms < meant.after_ms or wait not in waited:
                self._dead[position] = "orphan_click"
                waited[wait] = True
                if meant.time_ms + skew_ms >= self._until_ms:
                    self._not_due.add(position)

    # Outputs

    def _letters(self) -> None:
        sources = {
            Position(source, record.partition, record.offset): record
            for source in (IMPRESSIONS, CLICKS)
            for record in self._found.records[source]
        }
        found: dict[Position, str] = {}
        for letter in self._found.records["dead_letters"]:
            headers = dict(letter.headers)
            topic = headers["source_topic"].decode()
            source = next((name for name in (IMPRESSIONS, CLICKS) if topic.endswith(name)), topic)
            position = Position(source, int(headers["source_partition"]), int(headers["source_offset"]))
            reason = headers["reason"].decode()
            use = self.uses.get((position.partition, position.offset)) if source == IMPRESSIONS else None
            corrected = use is not None and use.oversize and bool(use.clicks) and not use.early_ms
            if position in found and not corrected:
                self._report("doubled", f"{position} has two dead letters")
            record = sources.get(position)
            value = None if record is None else b"" if reason == "too_large" else record.value or b""
            if record is None or (record.key, value) != (letter.key, letter.value or b""):
                self._report("wrong", f"{position}: its dead letter has other bytes")
            found[position] = reason
        for position in self._dead.keys() - found.keys() - self._not_due:
            self._report("lost", f"{position}: expected a dead letter ({self._dead[position]}), found none")
        for position, reason in found.items():
            if self._dead.get(position) != reason:
                self._report(
                    "wrong", f"{position}: found a dead letter ({reason}), expected {self._dead.get(position, 'none')}"
                )

    def _examples(self) -> None:
        for record in sorted(self._found.records["examples"], key=lambda record: (record.partition, record.offset)):
            headers = {name: value.decode() for name, value in record.headers}
            kind, life = headers.get("kind", ""), self._life(record.partition, record.offset, "examples_from")
            if kind == "left_out" and record.key is None:
                self._left_out(record, headers, life)
            elif kind == "matched" and record.key is None:
                self._matched(record, headers)
            elif record.key is None:
                self._report("wrong", f"examples {record.partition}/{record.offset}: no key, and headers {headers}")
            else:
                self._label(record, headers, life)

    def _use(self, partition: int, offset: int, what: str) -> Use | None:
        use = self.uses.get((partition, offset))
        if use is None:
            self._report("wrong", f"impressions {partition}/{offset} is {what}, but no impression that counts")
        return use

    def _left_out(self, record: Any, headers: dict[str, str], life: Life) -> None:
        expected = {"kind": "left_out", **_rate(life)}
        for offset in json.loads(record.value):
            use = self._use(record.partition, offset, "left out")
            if use is None:
                continue
            use.found.append(("first", record.offset))
            if headers != expected or use.labels["first"][0] != "0" or (life.keeps(use.record.key) and not use.oversize):
                self._report("wrong", f"{use.name}: left out by {headers}, expected {use.labels} under a rate of {life.rate}")

    def _matched(self, record: Any, headers: dict[str, str]) -> None:
        """A record for the join's own use: clicks that wait for the first label of their impression."""
        arrivals = json.loads(headers.pop("click_arrived_ms", "[]"))
        matched = json.loads(record.value)
        if len(arrivals) != len(matched):
            self._report("wrong", f"examples {record.partition}/{record.offset}: {len(matched)} clicks, arrivals {arrivals}")
            return
        for (offset, impression_ms, click_ms), arrived_ms in zip(matched, arrivals, strict=True):
            use = self._use(record.partition, offset, "matched")
            if use is None:
                continue
            clicks = {click.time_ms for click in use.clicks}
            right = click_ms in clicks and str(arrived_ms) in self._arrivals[record.partition, use.record.key, click_ms]
            if headers != {"kind": "matched"} or impression_ms != use.time_ms or not right:
                self._report("wrong", f"{use.name}: matched by {headers} at {impression_ms} with {click_ms}, clicks {clicks}")

    def _label(self, record: Any, headers: dict[str, str], life: Life) -> None:
        offset, kind, click = headers.pop("source_offset", "none"), headers["kind"], headers.pop("click_ms", None)
        arrived_ms = headers.pop("click_arrived_ms", None)
        use = self._use(record.partition, int(offset) if offset.isdigit() else -1, f"labelled ({kind})")
        if use is None:
            return
        use.found.append((kind, record.offset))
        if kind == "first":
            use.labelled_at = record.offset
        label, clicks_ms = use.labels.get(kind, Label("none", []))
        expected = {"kind": kind, "label": label, "weight": "1", "impression_ms": str(use.time_ms), **_rate(life)}
        right_click = click is None if not clicks_ms else click is not None and int(click) in clicks_ms
        arrivals = {None} if click is None else self._arrivals[record.partition, use.record.key, int(click)]
        right_click &= arrived_ms in arrivals
        kept = label != "0" or life.keeps(use.record.key)
        if label == "none":
            return  # `_whole` reports this
        same = (record.key, record.value) == (use.record.key, use.record.value)
        if headers != expected or not right_click or not kept or not same or use.oversize:
            found = f"{headers}, click {click}, arrived {arrived_ms}" if kept else "a negative that the rate leaves out"
            self._report("wrong", f"{use.name}: expected {expected}, click {clicks_ms}, arrived {arrivals}, found {found}")

    def _whole(self, use: Use) -> None:
        """Check that an impression has each of its labels, once and in order."""
        counts, expected = Counter(kind for kind, _ in use.found), list(use.labels)
        for kind in expected:
            if not counts[kind] and use.due_ms < self._until_ms:
                self._report("lost", f"{use.name} has no {kind}")
        for kind, count in counts.items():
            if kind not in expected:
                self._report("wrong", f"{use.name}: expected {expected}, found a {kind}")
            elif count > 1:
                self._report("doubled", f"{use.name} has {count} of kind {kind}")
        found = [kind for kind, offset in sorted(use.found, key=lambda label: label[1])]
        if counts.keys() == set(expected) and len(found) == len(expected) and found != expected:
            self._report("wrong", f"{use.name}: expected {expected} in this order, found {found}")

    def _order(self) -> None:
        """Check that the first labels of one life are in the order in which they are due."""
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
                self._report("wrong", f"{use.name}: labelled after {before[1].name}, which is due later")
            else:
                last[where] = offset, use

    def _meant_in_time(self, use: Use) -> bool:
        record = use.record
        return (IMPRESSIONS, record.key, record.value, True) not in self._meant

    def _positions(self) -> None:
        """Check that the join has committed all of its sources."""
        for (source, partition), end in self._found.ends.items():
            committed = self._found.committed.get((source, partition), 0)
            if committed != end:
                self._report("lost", f"{source}-{partition}: committed up to {committed} of {end}")


def _rate(life: Life) -> dict[str, str]:
    """The header of a label that was sent with a rate below 1."""
    return {"rate": str(life.rate)} if life.rate < 1 else {}
