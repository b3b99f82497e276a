"""Bringing a partition's state from where it stands to the committed offsets: the log is read again, nothing is written to it.

First `examples`: which impressions have their label, and which clicks wait for one. Then the sources: an impression that
nothing in `examples` accounts for is pending, or came late; a click that nothing accounts for waits for its impression. Each
record is decided under the settings that it was decided under then (`terms.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import msgspec
from aiokafka.structs import TopicPartition

from state.join_state import LAYOUT, Chunk, Entry, JoinMeta, JoinState, StateBatch, TimeOffset
from stream.errors import Abandoned, NoAnswer, PositionError
from stream.formats import Formats
from stream.join.commit_metadata import Progress, new_life
from stream.join.events import Events, read_run
from stream.join.memory import EarlyClick, Memory
from stream.join.partition import Positions
from stream.join.rebuild_progress import RebuildProgress
from stream.join.settings_history import NEVER_MS, History, Terms
from stream.records.dead_letter import Origin
from stream.records.example import FIRST, REPLAY, Example, read_example
from stream.records.join_notes import read_left_out, read_matched
from stream.records.record import Record
from stream.records.replay import is_replayed
from stream.settings import JoinSettings
from stream.topics.names import TopicNames

__all__ = ["Committed", "Rebuild"]

log = logging.getLogger(__name__)

# Longest wait for a record that is there: a replay's open transaction ends within its timeout of 60 s.
STALL_S = 90.0

_END = (1 << 63, 0)  # behind every impression


async def _none_known(origins: set[Origin]) -> set[Origin]:
    return set()


@dataclass(slots=True)
class Committed:
    """What the join's group has committed for a partition number, and where the logs begin and end."""

    impressions: int
    clicks: int
    impressions_start: int  # of the log
    clicks_start: int
    examples_start: int
    examples_end: int  # of all that is written, open transactions of others included
    progress: Progress | None  # None before the first transaction ever, and after the offsets were reset by hand


class Rebuild:
    """Brings a state from where it stands to the committed offsets.

    The first thing written takes the positions away, the last one puts the new ones there: what an unfinished rebuild leaves
    stands for no position of the log, and is thrown away when it is opened again.

    Args:
        formats: opens events that aren't plain JSON, as they were opened then.
        letters_of: which of some records became dead letters because the schema registry did not have their schema.
    """

    def __init__(
        self,
        settings: JoinSettings,
        names: TopicNames,
        number: int,
        identity: str,
        consumer: Any,
        state: JoinState,
        committed: Committed,
        still_ours: Callable[[], bool],
        progress: RebuildProgress | None = None,
        formats: Formats | None = None,
        letters_of: Callable[[set[Origin]], Awaitable[set[Origin]]] = _none_known,
    ) -> None:
        self._formats, self._letters_of = formats or Formats(), letters_of
        self._without_schema: set[Origin] = set()  # records whose schema the registry does not have
        self._told = progress or RebuildProgress(number)
        self._settings, self._names, self._number, self._identity = settings, names, number, identity
        self._consumer, self._state, self._committed, self._still_ours = consumer, state, committed, still_ours
        self._resolved: dict[int, bool] = {}  # source offset → clicked
        self._held: dict[TimeOffset, int] = {}  # by what `examples` says: the earliest click that waited for a label
        self._matched: set[tuple[bytes, int]] = set()  # clicks that are accounted for by it: id and event time
        self._foreign = 0  # records in `examples` that the join has not written
        self.impressions_read = self.clicks_read = 0
        last = committed.progress
        self._watermark_ms, self._cut = (last.watermark_ms, last.cut) if last else (NEVER_MS, 0)
        self._life = last.life if last else new_life()
        self._history = self._terms_then()
        meta = state.meta()
        if meta is not None:
            self._from = Positions(meta.impressions_position, meta.clicks_position, meta.examples_position)
        elif last is not None:
            self._from = Positions(last.impressions_low, last.clicks_low, last.examples_low)
        else:
            self._from = Positions(committed.impressions, committed.clicks, 0)

    def _terms_then(self) -> History:
        """What all below the committed offsets was decided under. Version 0.1.0 did not say: then it was today's settings."""
        last = self._committed.progress
        if last is None:
            return History().with_settings(self._settings, impressions=0, clicks=0, watermark_ms=NEVER_MS)
        if not last.terms:
            return History((Terms.of(self._settings, impressions=0, clicks=0, legacy=True),))
        return History(last.terms)

    async def run(self) -> tuple[Memory, Positions, int]:
        names, committed = self._names, self._committed
        await self._check_start(names.impressions, self._from.impressions, committed.impressions)
        await self._check_start(names.clicks, self._from.clicks, committed.clicks)
        examples_end = committed.examples_end
        # Without anything to read again, labels have nothing to say, and retention may have taken them.
        older = self._from.impressions < committed.impressions or self._from.clicks < committed.clicks
        labels_from = self._from.examples if older and committed.progress is not None else examples_end
        await self._check_start(names.examples, labels_from, examples_end)
        if not older and committed.progress is not None:
            # Nothing to say, but for one thing: none of them may be beyond what was committed.
            labels_from = min(max(self._from.examples, committed.examples_start), examples_end)
        spans = (
            (labels_from, examples_end),
            (self._from.impressions, committed.impressions),
            (self._from.clicks, committed.clicks),
        )
        self._told.begin(sum(max(until - start, 0) for start, until in spans))
        async for records in self._read(names.examples, labels_from, examples_end):
            self._resolve(records, apply=older)
        self._check_beyond()
        if not older:
            for noted in (self._resolved, self._held, self._matched):
                noted.clear()
        if self._foreign:
            self._told.pass_over(self._foreign)
            log.warning(
                "%s, partition %d: passed over %d records that the join has not written",
                names.examples,
                self._number,
                self._foreign,
            )
        async for records in self._read(names.impressions, self._from.impressions, committed.impressions):
            await self._prepare(records, self._history.of)
            self._impressions(records)
        self._hold()
        async for records in self._read(names.clicks, self._from.clicks, committed.clicks):
            await self._prepare(records, self._history.of_click)
            self._clicks(records)
        await self._check_schemas()
        return (
            self._memory(self._settle(examples_end)),
            Positions(committed.impressions, committed.clicks, examples_end),
            self._count_pending(),
        )

    async def _check_start(self, topic: str, start: int, until: int) -> None:
        tp = TopicPartition(topic, self._number)
        first = (await self._consumer.beginning_offsets([tp]))[tp]
        if start < min(first, until):
            raise PositionError(
                f"{topic}, partition {self._number}: rebuilding needs offsets from {start}, found the log starting at {first}. "
                f"Retention of {topic} is shorter than what is pending: raise `topics.retention_ms`. The state folder of the "
                "worker that had this partition last, put in `state_dir`, still allows to go on. Without it, what is pending "
                "can't be told from what has its label: resetting the offsets of both sources with Kafka's consumer-groups "
                "tool gives up the former (offsets beyond it) or repeats the latter (offsets before it)."
            )

    async def _read(self, topic: str, start: int, until: int) -> AsyncIterator[list[Record]]:
        """Committed records of `start <= offset < until`, as they are fetched."""
        if start >= until:
            return
        tp = TopicPartition(topic, self._number)
        self._consumer.assign([tp])
        self._consumer.seek(tp, start)
        position, moved_at = start, time.monotonic()
        while position < until:
            if not self._still_ours():
                raise Abandoned(f"partition {self._number} went to another worker while its state was rebuilt")
            fetched = await self._consumer.getmany(tp, timeout_ms=500)
            records = [record for record in fetched.get(tp, ()) if record.offset < until]
            if records:
                yield records
            before, position = position, min(await self._consumer.position(tp), until)
            self._told.advance(position - before)
            if position > before:
                moved_at = time.monotonic()
            elif time.monotonic() - moved_at > STALL_S:
                raise NoAnswer(
                    f"{topic}, partition {self._number}: expected to read up to offset {until}, found nothing after {position} "
                    f"for {STALL_S:.0f} s. A transaction is open there, or no broker leads the partition: `headrace doctor`."
                )

    def _batch(self) -> StateBatch:
        batch = self._state.batch()
        batch.drop_meta()
        return batch

    def _first_is_out(self, place: TimeOffset) -> bool:
        """Whether the committed watermark has passed the hold of an impression."""
        return (place[0] + self._history.of(place[1]).hold_ms, place[1]) < (self._watermark_ms, self._cut)

    def _resolve(self, records: list[Record], *, apply: bool = True) -> None:
        """Note which impressions have their label, and mark those of the local state that were clicked since.

        Without `apply` the state stays as it is.
        """
        clicked: list[Example] = []
        for record in records:
            if is_replayed(record):
                continue  # written before, as the record that became a dead letter; a correction may have followed
            try:
                left_out, matched = read_left_out(record), read_matched(record)
                if left_out is not None:
                    self._resolved.update(dict.fromkeys(left_out, False))
                elif matched is not None:
                    for offset, time_ms, click_ms in matched:
                        place = _storable(time_ms), _storable(offset)
                        self._held[place] = min(click_ms, self._held.get(place, click_ms))
                else:
                    example = read_example(record)
                    if self._label(example):
                        clicked.append(example)
            except (KeyError, TypeError, ValueError, msgspec.DecodeError):
                self._foreign += 1
        if not apply:
            return
        entries = self._state.entries([example.key for example in clicked])
        batch = self._batch()
        batch.remember(
            (example.key, (example.impression_ms, example.source_offset, True))
            for example, entry in zip(clicked, entries, strict=True)
            if entry is not None and entry[:2] == (example.impression_ms, example.source_offset)
        )
        batch.drop_pending((example.impression_ms, example.source_offset) for example in clicked)
        batch.write()

    def _check_beyond(self) -> None:
        """Labels, and the offsets of the impressions that they are for, are committed together: none may be beyond."""
        furthest = max(max(self._resolved, default=-1), max((offset for _, offset in self._held), default=-1))
        if self._committed.progress is not None and furthest >= self._committed.impressions:
            raise PositionError(
                f"{self._names.examples}, partition {self._number}: expected nothing about impressions at or after offset "
                f"{self._committed.impressions}, which is what the group has committed, found something about offset "
                f"{furthest}. Brokers before Kafka 2.5 answer with an older offset while a transaction ends: start the worker "
                "again. If that doesn't help, the group's offsets were set back: reset both sources' with Kafka's "
                "consumer-groups tool, and labels of what lies between are given again."
            )

    def _label(self, example: Example) -> bool:
        """Note one label; whether it is of a clicked impression.

        Raises:
            ValueError: the record isn't one of the join's.
        """
        if example.kind == REPLAY:
            raise ValueError(example.kind)  # without the header of a replay
        if example.click_ms < 0:
            if example.kind == FIRST:
                self._resolved[example.source_offset] = False
            return False  # a correction to 0 is somebody else's, and its impression stays clicked
        self._matched.add((example.key, example.click_ms))
        self._resolved[example.source_offset] = True
        return True

    async def _prepare(self, records: list[Record], of: Callable[[int], Terms]) -> None:
        """Fetch the schemas of a run. It waits while the registry is away."""
        for form, group in groupby(records, key=lambda record: of(record.offset).form):
            await self._formats.prepare(list(group), form)

    async def _check_schemas(self) -> None:
        """Records whose schema isn't there must have been dead letters then: otherwise the schema was deleted since.

        They can't be taken for dead letters: what is pending among them would lose its label without a trace.
        """
        if not self._without_schema:
            return
        lost = sorted(self._without_schema - await self._letters_of(self._without_schema))
        if lost:
            raise PositionError(
                f"partition {self._number}: rebuilding reads {len(lost)} records again whose schema the registry does not have "
                f"any more, such as {lost[0]} (TOPIC/PARTITION/OFFSET): register it again under its id. The state folder of "
                "the worker that had this partition last, put in `state_dir`, still allows to go on without it."
            )

    def _by_terms(self, records: list[Record], of: Callable[[int], Terms]) -> Iterator[tuple[Terms, Events]]:
        """The events of a run, apart by the settings that they were read under then."""
        settings = self._settings
        for terms, group in groupby(records, key=lambda record: of(record.offset)):
            events = read_run(list(group), terms.max_future_ms, settings.max_watermark_future_ms, self._formats, terms.form)
            self._without_schema.update(
                Origin(letter.topic, letter.partition, letter.offset)
                for letter in events.dead
                if letter.reason == "unknown_schema"
            )
            yield terms, events

    def _impressions(self, records: list[Record]) -> None:
        """Remember what was accepted then: labelled since, or pending at the committed watermark. The rest came late."""
        self.impressions_read += len(records)
        for terms, events in self._by_terms(records, self._history.of):
            self._accept(terms, events)

    def _accept(self, terms: Terms, events: Events) -> None:
        stored = self._state.entries(events.keys)
        remembered: dict[bytes, Entry] = {}
        pending: list[tuple[int, int, bytes, bytes]] = []
        labelled: list[tuple[int, int, bytes, bytes]] = []  # by version 0.1.0, before the watermark had passed them
        first_offset = -1  # not from `remembered`: an id used twice has only its later offset there
        for index, (key, time_ms, offset) in enumerate(zip(events.keys, events.times_ms, events.offsets, strict=True)):
            known = remembered.get(key) or stored[index]
            if known is not None and time_ms <= known[0] + self._history.of(known[1]).horizon_ms:
                continue
            clicked, is_out = self._resolved.get(offset), self._first_is_out((time_ms, offset))
            if clicked is False and (time_ms, offset) in self._held:  # its positive label was too large
                clicked = True
                self._matched.add((key, self._held[time_ms, offset]))
            if clicked is None and (is_out or time_ms < terms.late_floor_ms):
                continue
            remembered[key] = (time_ms, offset, bool(clicked))
            first_offset = offset if first_offset < 0 else first_offset
            if not clicked and time_ms + terms.window_ms >= self._watermark_ms:
                rows = pending if clicked is None or is_out else labelled
                rows.append((time_ms, offset, key, events.values[index]))
        if remembered:
            batch = self._batch()
            batch.remember(remembered.items())
            batch.add_pending(pending)
            batch.add_pending(labelled, labelled=True)
            latest = max(time_ms for time_ms, _, _ in remembered.values())
            batch.add_chunk(Chunk(first_offset, latest, self._from.examples), list(remembered))
            batch.write()

    def _hold(self) -> None:
        """Keep the clicks that wait for a label; the impressions of these are clicked.

        So are those whose positive label was too large.
        """
        batch = self._batch()
        places = [place for place in self._held if place[1] not in self._resolved and not self._first_is_out(place)]
        set_aside = [place for place in self._held.keys() - set(places) if not self._resolved.get(place[1])]
        found = [row for row in self._state.pending(set_aside) if row is not None]
        for row, entry in zip(found, self._state.entries([row[2] for row in found]), strict=True):
            place = row[:2]
            self._matched.add((row[2], self._held[place]))
            batch.drop_pending([place])
            if entry is not None and entry[:2] == place:
                batch.remember([(row[2], (*place, True))])
        rows, stored = self._state.pending(places), self._state.held(places)
        waiting = [(place, row, held) for place, row, held in zip(places, rows, stored, strict=True) if row is not None]
        entries = self._state.entries([row[2] for _, row, _ in waiting])
        for (place, row, held_ms), entry in zip(waiting, entries, strict=True):
            click_ms = self._held[place]
            self._matched.add((row[2], click_ms))
            batch.hold([(place, click_ms if held_ms is None else min(click_ms, held_ms))])
            if entry is not None and entry[:2] == place:
                batch.remember([(row[2], (*place, True))])
        batch.write()

    def _clicks(self, records: list[Record]) -> None:
        """Keep the clicks that still wait for their impression; the others have been accounted for."""
        self.clicks_read += len(records)
        batch = self._batch()
        for _, events in self._by_terms(records, self._history.of_click):
            entries = self._state.entries(events.keys)
            for key, time_ms, offset, record, entry in zip(
                events.keys, events.times_ms, events.offsets, events.records, entries, strict=True
            ):
                if self._waits(key, time_ms, offset, entry):
                    batch.add_early([(key, EarlyClick.of(record, time_ms))])
        batch.write()

    def _waits(self, key: bytes, click_ms: int, offset: int, entry: Entry | None) -> bool:
        """Whether a click is not accounted for yet. One that labelled an id's earlier use is outside the newer use's window."""
        history = self._history
        if (key, click_ms) in self._matched or click_ms + history.max_skew_ms < self._watermark_ms:
            return False
        if history.was_orphan(offset, click_ms):
            return False
        if entry is None:
            return True
        terms = history.of(entry[1])
        # What may be forgotten was none to the clicks that are in question still.
        remembered = entry[0] >= history.late_before(self._watermark_ms) - terms.horizon_ms
        return not (remembered and terms.counts(click_ms, entry[0]))

    def _settle(self, examples_end: int) -> list[tuple[bytes, EarlyClick]]:
        """Drop what was settled since the older local state, and write the positions: the rebuild is done.

        The clicks that still wait for their impression, in order of offset.
        """
        batch, committed = self._state.batch(), self._committed
        batch.drop_pending_before(0, self._watermark_ms - self._history.max_window_ms)
        labelled = [place for place in self._state.held_between((0, 0), _END) if self._first_is_out(place)]
        batch.drop_held(labelled)
        batch.drop_pending(labelled)
        early = [(key, EarlyClick(*click)) for key, click in self._state.early_clicks()]
        entries = self._state.entries([key for key, _ in early])
        waiting: dict[tuple[bytes, int], tuple[bytes, EarlyClick]] = {}
        for (key, click), entry in sorted(zip(early, entries, strict=True), key=lambda row: row[0][1][1]):
            if not self._waits(key, click[0], click[1], entry) or (key, click[0]) in waiting:
                batch.drop_early([(key, click)])
            else:
                waiting[key, click[0]] = (key, click)
        progress = committed.progress
        batch.set_meta(
            JoinMeta(
                identity=self._identity,
                layout=LAYOUT,
                impressions_position=committed.impressions,
                clicks_position=committed.clicks,
                examples_position=examples_end,
                watermark_ms=self._watermark_ms,
                cut=self._cut,
                impressions_seen_ms=progress.impressions_seen_ms if progress else NEVER_MS,
                clicks_seen_ms=progress.clicks_seen_ms if progress else NEVER_MS,
                life=self._life,
            )
        )
        batch.write()
        return list(waiting.values())

    def _count_pending(self) -> int:
        """Impressions whose first label is not out yet."""
        if any(terms.legacy for terms in self._history.terms):
            rows = self._state.pending_between((0, 0), _END)
            return sum(not labelled and not self._first_is_out((time_ms, offset)) for time_ms, offset, _, _, labelled in rows)
        return sum(not self._first_is_out(place) for place in self._state.pending_impressions())

    def _memory(self, early: list[tuple[bytes, EarlyClick]]) -> Memory:
        """The memory to go on with. What is read from here on comes under the settings of today."""
        committed, progress = self._committed, self._committed.progress
        history = self._history.with_settings(
            self._settings, impressions=committed.impressions, clicks=committed.clicks, watermark_ms=self._watermark_ms
        )
        memory = Memory(history, life=self._life)
        if progress is not None:
            memory.watermark_ms, memory.cut = progress.watermark_ms, progress.cut
            memory.impressions_seen_ms, memory.clicks_seen_ms = progress.impressions_seen_ms, progress.clicks_seen_ms
            memory.expired_ms = max(self._watermark_ms - history.max_window_ms, 0)  # from here on rows come that live longer
        for key, click in early:
            memory.add_early(key, click)
        for chunk in self._state.all_chunks():
            memory.add_chunk(chunk)
        return memory


def _storable(number: int) -> int:
    """Raises ValueError for what no event time and no offset can be."""
    if not 0 <= number < 1 << 63:
        raise ValueError(number)
    return number
