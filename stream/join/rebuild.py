"""Brings a partition's state from where it is to the committed offsets: the log is read again, nothing is written to it.

First `examples` is read (`rebuild_labels.py`): which impressions have their label, and which clicks wait for one. Then the
impressions, then the clicks; both are decided again and written into the state (`rebuild_state.py`).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from aiokafka.structs import TopicPartition

from state.join_state import LAYOUT, JoinMeta, JoinState
from stream.errors import Abandoned, PositionError
from stream.formats import Formats
from stream.join.commit_metadata import new_life
from stream.join.committed import STALL_S, Committed
from stream.join.events import Events, read_run
from stream.join.memory import EarlyClick, Memory
from stream.join.partition import Positions
from stream.join.rebuild_labels import Labels
from stream.join.rebuild_progress import RebuildProgress
from stream.join.rebuild_state import RebuiltState
from stream.join.settings_history import NEVER_MS, History, Terms
from stream.kafka.read_log import Span, read_spans
from stream.records.dead_letter import Origin
from stream.records.record import Record
from stream.settings import JoinSettings
from stream.topics.names import TopicNames

__all__ = ["Rebuild", "Rebuilt"]

log = logging.getLogger(__name__)

POLL_MS = 500  # one wait for records


async def _none_known(origins: set[Origin]) -> set[Origin]:
    return set()


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild ends with, beside the state."""

    memory: Memory
    positions: Positions
    pending: int  # impressions whose first label is not out yet
    impressions_read: int
    clicks_read: int


class Rebuild:
    """Brings the state of one partition number to the committed offsets.

    Args:
        still_ours: asked before each fetch; False gives the rebuild up.
        formats: opens events that aren't plain JSON, in the form that they were read in then.
        letters_of: returns which of some records became dead letters because the schema registry did not have their schema.
    """

    def __init__(
        self,
        settings: JoinSettings,
        names: TopicNames,
        number: int,
        identity: str,
        *,
        consumer: Any,
        state: JoinState,
        committed: Committed,
        still_ours: Callable[[], bool],
        progress: RebuildProgress | None = None,
        formats: Formats | None = None,
        letters_of: Callable[[set[Origin]], Awaitable[set[Origin]]] = _none_known,
    ) -> None:
        self._settings, self._names, self._number, self._identity = settings, names, number, identity
        self._consumer, self._committed, self._still_ours = consumer, committed, still_ours
        self._progress = progress or RebuildProgress(number)
        self._formats, self._letters_of = formats or Formats(), letters_of
        self._form = self._formats.form(settings.envelope)
        self._without_schema: set[Origin] = set()  # records whose schema the registry does not have
        last, meta = committed.progress, state.meta()
        self._watermark_ms, self._cut = (last.watermark_ms, last.cut) if last else (NEVER_MS, 0)
        self._life = last.life if last else new_life()
        self._history = self._terms_then()
        if meta is not None:
            self._from = Positions(meta.impressions_position, meta.clicks_position, meta.examples_position)
        elif last is not None:
            self._from = Positions(last.impressions_low, last.clicks_low, last.examples_low)
        else:
            self._from = Positions(committed.impressions, committed.clicks, 0)
        self._labels, self._state = Labels(), state
        self._rebuilt = RebuiltState(
            state,
            self._labels,
            self._history,
            watermark_ms=self._watermark_ms,
            cut=self._cut,
            examples_from=self._from.examples,
        )

    def _terms_then(self) -> History:
        """The settings of all records below the committed offsets. Version 0.1.0 did not record them: then today's are used."""
        last, settings = self._committed.progress, self._settings
        if last is None:
            return History().with_settings(settings, form=self._form, impressions=0, clicks=0, watermark_ms=NEVER_MS)
        if not last.terms:
            return History((Terms.of(settings, form="", impressions=0, clicks=0, legacy=True),))
        return History(last.terms)

    async def run(self) -> Rebuilt:
        """Read what lies between the state and the committed offsets.

        Raises:
            Abandoned: `still_ours` returned False.
            PositionError: records that are needed were deleted, or what is read doesn't fit what was committed.
            NoAnswer: the log could not be read to the committed offsets.
        """
        names, committed, start = self._names, self._committed, self._from
        await self._check_start(names.impressions, start.impressions, committed.impressions)
        await self._check_start(names.clicks, start.clicks, committed.clicks)
        examples_end = committed.examples_end
        # If no source is read again, labels say nothing new about the state, and retention may have deleted them.
        older = start.impressions < committed.impressions or start.clicks < committed.clicks
        labels_from = start.examples if older and committed.progress is not None else examples_end
        await self._check_start(names.examples, labels_from, examples_end)
        if not older and committed.progress is not None:
            # The labels are read only to check that none of them is beyond what was committed.
            labels_from = min(max(start.examples, committed.examples_start), examples_end)
        spans = (
            (labels_from, examples_end),
            (start.impressions, committed.impressions),
            (start.clicks, committed.clicks),
        )
        self._progress.begin(sum(max(until - begin, 0) for begin, until in spans))
        await self._read_labels(labels_from, examples_end, older=older)
        impressions_read = clicks_read = 0
        async for records in self._read(names.impressions, start.impressions, committed.impressions):
            await self._prepare(records, self._history.of)
            self._impressions(records)
            impressions_read += len(records)
        self._rebuilt.hold()
        async for records in self._read(names.clicks, start.clicks, committed.clicks):
            await self._prepare(records, self._history.of_click)
            self._clicks(records)
            clicks_read += len(records)
        await self._check_schemas()
        memory = self._memory(self._settle(examples_end))
        positions = Positions(committed.impressions, committed.clicks, examples_end)
        return Rebuilt(memory, positions, self._rebuilt.count_pending(), impressions_read, clicks_read)

    # Reading back

    async def _check_start(self, topic: str, start: int, until: int) -> None:
        tp = TopicPartition(topic, self._number)
        first = (await self._consumer.beginning_offsets([tp]))[tp]
        if start < min(first, until):
            raise PositionError(
                f"{topic}, partition {self._number}: rebuilding needs offsets from {start}, found the log starting at {first}. "
                f"Retention of {topic} is shorter than what is pending: raise `topics.retention_ms`. To go on, put the state "
                "folder of the worker that had this partition last into `state_dir`. Without it, pending impressions can't be "
                "told apart from labelled ones. If you reset the offsets of both sources with Kafka's consumer-groups tool, "
                "pending impressions before the new offsets get no label, and labelled ones after them get a second."
            )

    async def _read(self, topic: str, start: int, until: int) -> AsyncIterator[list[Record]]:
        """Committed records of `start <= offset < until`, as they are fetched."""
        if start >= until:
            return
        tp = TopicPartition(topic, self._number)
        position = start

        def on_round(positions: Mapping[TopicPartition, int]) -> None:
            nonlocal position
            before, position = position, min(positions[tp], until)
            self._progress.advance(position - before)
            if position < until and not self._still_ours():
                raise Abandoned(f"partition {self._number} went to another worker while its state was rebuilt")

        spans = {tp: Span(start, until)}
        async for _, records in read_spans(self._consumer, spans, stall_s=STALL_S, poll_ms=POLL_MS, on_round=on_round):
            yield records

    async def _read_labels(self, start: int, end: int, *, older: bool) -> None:
        """Read `examples`. Unless the state is `older` than the committed offsets, it stays as it is."""
        async for records in self._read(self._names.examples, start, end):
            self._resolve(records, apply=older)
        self._check_beyond()
        if not older:
            self._labels.clear()
        if foreign := self._labels.foreign:
            self._progress.pass_over(foreign)
            log.warning(
                "%s, partition %d: passed over %d records that the join has not written",
                *(self._names.examples, self._number, foreign),
            )

    def _resolve(self, records: list[Record], *, apply: bool) -> None:
        clicked = self._labels.note(records)
        if apply:
            self._rebuilt.mark_clicked(clicked)

    def _check_beyond(self) -> None:
        """Check that no label is for an impression beyond the committed offset: labels and offsets are committed together."""
        furthest = self._labels.furthest
        if self._committed.progress is not None and furthest >= self._committed.impressions:
            raise PositionError(
                f"{self._names.examples}, partition {self._number}: expected nothing about impressions at or after offset "
                f"{self._committed.impressions}, which is what the group has committed, found something about offset "
                f"{furthest}. Brokers before Kafka 2.5 answer with an older offset while a transaction ends: start the worker "
                "again. If that doesn't help, the group's offsets were set back: reset both sources' with Kafka's "
                "consumer-groups tool, and the impressions in between are labelled again."
            )

    # Deciding again

    async def _prepare(self, records: list[Record], of: Callable[[int], Terms]) -> None:
        """Fetch the schemas of a run. This waits while the schema registry is away."""
        for form, group in groupby(records, key=lambda record: of(record.offset).form):
            await self._formats.prepare(list(group), form)

    def _by_terms(self, records: list[Record], of: Callable[[int], Terms]) -> Iterator[tuple[Terms, Events]]:
        """The events of a run, split by the settings that they were first read under."""
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
        for terms, events in self._by_terms(records, self._history.of):
            self._rebuilt.accept(terms, events)

    def _clicks(self, records: list[Record]) -> None:
        self._rebuilt.keep_clicks(events for _, events in self._by_terms(records, self._history.of_click))

    async def _check_schemas(self) -> None:
        """Check that records whose schema the registry doesn't have became dead letters when they were first read.

        If one did not, its schema was deleted since. Such records can't be skipped like dead letters: the pending impressions
        among them would lose their labels without a trace.
        """
        if not self._without_schema:
            return
        lost = sorted(self._without_schema - await self._letters_of(self._without_schema))
        if lost:
            raise PositionError(
                f"partition {self._number}: rebuilding reads {len(lost)} records again whose schema the registry does not have "
                f"any more, such as {lost[0]} (TOPIC/PARTITION/OFFSET): register it again under its id. To go on without it, "
                "put the state folder of the worker that had this partition last into `state_dir`."
            )

    # The end

    def _settle(self, examples_end: int) -> list[tuple[bytes, EarlyClick]]:
        """Write the positions. Returns the clicks that still wait for their impression, in order of offset."""
        committed, progress = self._committed, self._committed.progress
        return self._rebuilt.settle(
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

    def _memory(self, early: list[tuple[bytes, EarlyClick]]) -> Memory:
        """The memory to go on with. Records read from here on are decided under the settings of today."""
        committed, progress = self._committed, self._committed.progress
        history = self._history.with_settings(
            self._settings,
            form=self._form,
            impressions=committed.impressions,
            clicks=committed.clicks,
            watermark_ms=self._watermark_ms,
        )
        memory = Memory(history, life=self._life)
        if progress is not None:
            memory.watermark_ms, memory.cut = progress.watermark_ms, progress.cut
            memory.impressions_seen_ms, memory.clicks_seen_ms = progress.impressions_seen_ms, progress.clicks_seen_ms
            # By the largest window, with today's settings included: rows that are added from here on may live longer.
            memory.expired_ms = max(self._watermark_ms - history.max_window_ms, 0)
        for key, click in early:
            memory.add_early(key, click)
        for chunk in self._state.all_chunks():
            memory.add_chunk(chunk)
        return memory
