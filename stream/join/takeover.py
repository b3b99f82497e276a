"""Taking over a partition number: fence the old owner, read how far it came, bring the state there, and go on.

The order matters. The producer starts first: that fences the old owner and settles its open transaction, so what is read after
it cannot be overtaken by a commit in flight. Then the committed offsets with their metadata, then `examples` to its last stable
offset. Then the sources are read again, silently, from where the local state stands (or from the low-water offsets when there
is none) to the committed offsets: what `examples` holds is resolved, what the watermark has not passed is pending. Below the
committed offsets nothing is ever said again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.structs import TopicPartition

from state.errors import JoinStateError
from state.join_state import Chunk, Entry, JoinMeta, JoinState, StateOptions
from stream.batches import BATCH_BYTES
from stream.clients import aiokafka_options
from stream.errors import Abandoned, PositionError
from stream.join.events import read_run
from stream.join.examples import label_of, source_offset_of
from stream.join.logic import NEVER_MS, Memory
from stream.join.partition import Positions, TakenOver
from stream.join.progress import Progress, decode_progress
from stream.offsets import committed_offsets
from stream.settings import JoinSettings, KafkaSettings
from stream.topics import TopicNames

__all__ = ["Takeover", "transactional_id"]

log = logging.getLogger(__name__)

# Local folders tried for one partition: a worker that hangs may still hold the lock of the first.
MAX_FOLDERS = 16


def transactional_id(names: TopicNames, settings: JoinSettings, number: int) -> str:
    """One a partition number: the producer epoch under it is the only fence between two owners."""
    return f"{names.prefix}{settings.group}-{number}"


@dataclass(slots=True)
class _Committed:
    impressions: int
    clicks: int
    impressions_start: int  # of the log
    clicks_start: int
    progress: Progress | None  # None before the first transaction ever, and after the offsets were reset by hand


class Takeover:
    """Takes over partition numbers, one after another.

    Args:
        identity: of cluster and topics; local state of another one is thrown away.
        group: the consumer group whose offsets hold the progress.
    """

    def __init__(
        self,
        *,
        kafka: KafkaSettings,
        settings: JoinSettings,
        names: TopicNames,
        group: str,
        identity: str,
        state_dir: Path,
        options: StateOptions,
    ) -> None:
        self._kafka, self._settings, self._names, self._group = kafka, settings, names, group
        self._identity, self._state_dir, self._options = identity, state_dir, options

    async def take(self, number: int, still_ours: Callable[[], bool]) -> TakenOver:
        """Take over one partition number.

        Raises:
            Abandoned: `still_ours` said no on the way: another rebalance has begun.
            PositionError: the log lost records that were not read yet, or ends before what was committed.
        """
        began = time.monotonic()
        producer = AIOKafkaProducer(
            **aiokafka_options(self._kafka),
            transactional_id=transactional_id(self._names, self._settings, number),
            transaction_timeout_ms=self._settings.transaction_timeout_ms,
            max_batch_size=BATCH_BYTES,
            max_request_size=1 << 30,  # the broker's limits decide, topic by topic
        )
        await producer.start()
        consumer = AIOKafkaConsumer(
            **aiokafka_options(self._kafka),
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            max_partition_fetch_bytes=4 << 20,
        )
        state: JoinState | None = None
        try:
            await consumer.start()
            committed = await self._committed(consumer, number)
            destroyed = False
            while True:
                state = self._open(number, committed)
                rebuild = _Rebuild(self._settings, self._names, number, self._identity, consumer, state, committed, still_ours)
                try:
                    memory, positions, pending = await rebuild.run()
                    break
                except Exception as error:
                    # RocksDB finds most damage only when it reads, and the rebuild reads everything that is pending.
                    if destroyed or not str(error).startswith("Corruption"):
                        raise
                    log.warning("%s is damaged, it is rebuilt from the log: %s", state.path, error)
                    state.close()
                    JoinState.destroy(state.path)
                    destroyed = True
        except BaseException:
            if state is not None:
                state.close()
            await producer.stop()
            raise
        finally:
            await consumer.stop()
        log.info(
            "took over partition %d in %.2f s: %d impressions and %d clicks read again, %d pending",
            number,
            time.monotonic() - began,
            rebuild.impressions_read,
            rebuild.clicks_read,
            pending,
        )
        return TakenOver(producer, state, memory, positions, pending)

    async def _committed(self, consumer: Any, number: int) -> _Committed:
        """The committed offsets and their metadata; the start of the log before the first transaction."""
        impressions = TopicPartition(self._names.impressions, number)
        clicks = TopicPartition(self._names.clicks, number)
        known = await committed_offsets(self._kafka, self._group, [impressions, clicks])
        starts = await consumer.beginning_offsets([impressions, clicks])
        if not known:
            if await self._has_examples(consumer, number):
                # Brokers forget the offsets of a group without members after a week (offsets.retention.minutes).
                raise PositionError(
                    f"group {self._group}, partition {number}: expected committed offsets, since {self._names.examples} holds "
                    "labels, found none: they have expired, or `join.group` has changed. Beginning at the head of the log "
                    "would label again what was labelled. Set the offsets of impressions and clicks with Kafka's "
                    "consumer-groups tool to begin anew from there."
                )
            return _Committed(starts[impressions], starts[clicks], starts[impressions], starts[clicks], None)
        if len(known) != 2:
            raise PositionError(
                f"group {self._group}, partition {number}: expected committed offsets of impressions and clicks, found only "
                f"{', '.join(tp.topic for tp in known)}. Reset both with Kafka's consumer-groups tool."
            )
        ends = await consumer.end_offsets([impressions, clicks])
        for tp, offset in known.items():
            if offset.offset > ends[tp]:
                raise PositionError(
                    f"{tp.topic}, partition {number}: committed up to {offset.offset}, found the log ending at {ends[tp]}. "
                    "The topic was made anew or lost data: reset the group's offsets with Kafka's consumer-groups tool."
                )
            if offset.offset < starts[tp]:
                raise PositionError(
                    f"{tp.topic}, partition {number}: offsets {offset.offset} to {starts[tp] - 1} were deleted before they "
                    "were read. Retention is too short for how long the join stood still: raise `topics.retention_ms`, and "
                    "reset the group's offsets with Kafka's consumer-groups tool to go on without them."
                )
        try:
            metadata = known[impressions].metadata
            progress = decode_progress(metadata) if metadata else None
        except msgspec.DecodeError as error:
            raise PositionError(
                f"group {self._group}, partition {number}: expected the join's progress in the committed offsets' metadata, "
                f"found {metadata[:80]!r}. Something else commits in this group: give the join another `join.group`, or reset "
                "the offsets of both topics with Kafka's consumer-groups tool to begin anew from there."
            ) from error
        return _Committed(known[impressions].offset, known[clicks].offset, starts[impressions], starts[clicks], progress)

    async def _has_examples(self, consumer: Any, number: int) -> bool:
        """Whether any label was ever committed here; what a first transaction left when it was aborted doesn't count."""
        tp = TopicPartition(self._names.examples, number)
        start, end = (await consumer.beginning_offsets([tp]))[tp], (await consumer.end_offsets([tp]))[tp]
        if start == end:
            return False
        consumer.assign([tp])
        consumer.seek(tp, start)
        while await consumer.position(tp) < end:
            if (await consumer.getmany(tp, timeout_ms=500, max_records=1)).get(tp):
                return True
        return False

    def _open(self, number: int, committed: _Committed) -> JoinState:
        """The local state, thrown away where it can't be a prefix of this log."""
        for attempt in range(MAX_FOLDERS):
            path = self._state_dir / (f"partition-{number}" if not attempt else f"partition-{number}.{attempt}")
            try:
                state = JoinState(path, self._options)
            except JoinStateError as error:
                if any(mark in str(error) for mark in ("While lock file", "lock hold by")):  # RocksDB's own words
                    log.warning("%s is open in another process; trying the next folder", path)
                    continue
                log.warning("throwing away local state, it is rebuilt from the log: %s", error)
                JoinState.destroy(path)
                state = JoinState(path, self._options)
            meta = state.meta()
            if (
                meta is not None
                and committed.progress is not None
                and meta.identity == self._identity
                and committed.impressions_start <= meta.impressions_position <= committed.impressions
                and committed.clicks_start <= meta.clicks_position <= committed.clicks
            ):
                return state
            if meta is not None and (committed.progress is not None or meta.watermark_ms > NEVER_MS):
                log.warning(
                    "throwing away local state of partition %d: it is of another log, or not a part of this one", number
                )
            state.close()
            JoinState.destroy(path)
            return JoinState(path, self._options)
        raise JoinStateError(
            f"{self._state_dir}: expected a free folder for partition {number}, found {MAX_FOLDERS} held by other processes. "
            "End the join workers that hang, or set another `state_dir`."
        )


class _Rebuild:
    """Brings a state from where it stands to the committed offsets.

    Writing is idempotent and the positions are written last, so a crash in between only means doing it again: over what an
    unfinished rebuild has left, which knew less of the log. What it left pending may have its label by now.
    """

    def __init__(
        self,
        settings: JoinSettings,
        names: TopicNames,
        number: int,
        identity: str,
        consumer: Any,
        state: JoinState,
        committed: _Committed,
        still_ours: Callable[[], bool],
    ) -> None:
        self._settings, self._names, self._number, self._identity = settings, names, number, identity
        self._consumer, self._state, self._committed, self._still_ours = consumer, state, committed, still_ours
        self._resolved: dict[int, bool] = {}  # source offset → clicked
        self._matched: set[tuple[bytes, int]] = set()  # clicks that made a label: id and event time
        self.impressions_read = self.clicks_read = 0
        progress = committed.progress
        self._watermark_ms = progress.watermark_ms if progress else NEVER_MS
        meta = state.meta()
        if meta is not None:
            self._from = Positions(meta.impressions_position, meta.clicks_position, meta.examples_position)
            self._from_watermark_ms = meta.watermark_ms
        elif progress is not None:
            self._from = Positions(progress.impressions_low, progress.clicks_low, progress.examples_low)
            self._from_watermark_ms = NEVER_MS
        else:
            self._from = Positions(committed.impressions, committed.clicks, 0)
            self._from_watermark_ms = NEVER_MS

    async def run(self) -> tuple[Memory, Positions, int]:
        names, number, committed = self._names, self._number, self._committed
        await self._check_start(names.impressions, self._from.impressions, committed.impressions)
        await self._check_start(names.clicks, self._from.clicks, committed.clicks)
        examples = TopicPartition(names.examples, number)
        examples_end = (await self._consumer.end_offsets([examples]))[examples]
        examples_start = (await self._consumer.beginning_offsets([examples]))[examples]
        if committed.progress is not None:
            async for records in self._read(names.examples, max(self._from.examples, examples_start), examples_end):
                self._resolve(records)
        async for records in self._read(names.impressions, self._from.impressions, committed.impressions):
            self._impressions(records)
        async for records in self._read(names.clicks, self._from.clicks, committed.clicks):
            self._clicks(records)
        self._settle(examples_end)
        return self._memory(), Positions(committed.impressions, committed.clicks, examples_end), self._state.count_pending()

    async def _check_start(self, topic: str, start: int, until: int) -> None:
        tp = TopicPartition(topic, self._number)
        first = (await self._consumer.beginning_offsets([tp]))[tp]
        if start < min(first, until):
            raise PositionError(
                f"{topic}, partition {self._number}: rebuilding needs offsets from {start}, found the log starting at {first}. "
                "Retention is shorter than what is pending: raise `topics.retention_ms`. The state folder of the worker that "
                "had this partition last, put in `state_dir`, still allows to go on."
            )

    async def _read(self, topic: str, start: int, until: int) -> AsyncIterator[list[Any]]:
        """Committed records of `start <= offset < until`, as they are fetched."""
        if start >= until:
            return
        tp = TopicPartition(topic, self._number)
        self._consumer.assign([tp])
        self._consumer.seek(tp, start)
        while await self._consumer.position(tp) < until:
            if not self._still_ours():
                raise Abandoned(f"partition {self._number} went to another worker while its state was rebuilt")
            fetched = await self._consumer.getmany(tp, timeout_ms=500)
            records = [record for record in fetched.get(tp, ()) if record.offset < until]
            if records:
                yield records

    def _resolve(self, records: list[Any]) -> None:
        """Note which impressions have their label, and mark those of the local state that were clicked since.

        The others that were settled since have been passed by the watermark: `_settle` drops them all at once.
        """
        clicked: list[tuple[bytes, int, int]] = []
        for record in records:
            offset = source_offset_of(record)
            self._resolved[offset] = label_of(record)
            if self._resolved[offset]:
                headers = dict(record.headers)
                clicked.append((record.key, int(headers["impression_ms"]), offset))
                self._matched.add((record.key, int(headers["click_ms"])))
        entries = self._state.entries([key for key, _, _ in clicked])
        known = [row for row, entry in zip(clicked, entries, strict=True) if entry is not None and entry[:2] == row[1:]]
        batch = self._state.batch()
        batch.remember((key, (time_ms, offset, True)) for key, time_ms, offset in known)
        batch.drop_pending((time_ms, offset) for _, time_ms, offset in clicked)
        batch.write()

    def _impressions(self, records: list[Any]) -> None:
        """Remember what was accepted then: labelled since, or pending at the committed watermark. The rest came late."""
        self.impressions_read += len(records)
        settings = self._settings
        events = read_run(records, settings.max_future_ms)
        stored = self._state.entries(events.keys)
        remembered: dict[bytes, Entry] = {}
        pending: list[tuple[int, int, bytes, bytes]] = []
        first_offset = -1  # not from `remembered`: an id used twice has only its later offset there
        for index, (key, time_ms, offset) in enumerate(zip(events.keys, events.times_ms, events.offsets, strict=True)):
            known = remembered.get(key) or stored[index]
            if known is not None and known[1] < offset and time_ms <= known[0] + settings.dedupe_horizon_ms:
                continue
            if offset not in self._resolved and time_ms + settings.window_ms < self._watermark_ms:
                continue
            remembered[key] = (time_ms, offset, self._resolved.get(offset, False))
            first_offset = offset if first_offset < 0 else first_offset
            if offset not in self._resolved:
                pending.append((time_ms, offset, key, events.values[index]))
        if remembered:
            batch = self._state.batch()
            batch.remember(remembered.items())
            batch.add_pending(pending)
            latest = max(time_ms for time_ms, _, _ in remembered.values())
            batch.add_chunk(Chunk(first_offset, latest, self._from.clicks, self._from.examples), list(remembered))
            batch.write()

    def _clicks(self, records: list[Any]) -> None:
        """Keep the clicks that still wait for their impression; the others have been accounted for."""
        self.clicks_read += len(records)
        events = read_run(records, self._settings.max_future_ms)
        entries = self._state.entries(events.keys)
        batch = self._state.batch()
        for key, time_ms, offset, value, entry in zip(
            events.keys, events.times_ms, events.offsets, events.values, entries, strict=True
        ):
            if self._waits(key, time_ms, entry):
                batch.add_early([(key, (time_ms, offset, value))])
        batch.write()

    def _waits(self, key: bytes, click_ms: int, entry: Entry | None) -> bool:
        """Whether a click is not accounted for yet. One that labelled an id's earlier use is outside the newer use's window."""
        settings = self._settings
        if (key, click_ms) in self._matched:
            return False
        in_window = entry is not None and -settings.negative_skew_ms <= click_ms - entry[0] <= settings.window_ms
        return not in_window and click_ms + settings.negative_skew_ms >= self._watermark_ms

    def _settle(self, examples_end: int) -> None:
        """Drop what was settled since the older local state, and write the positions: the rebuild is done."""
        batch, committed, window_ms = self._state.batch(), self._committed, self._settings.window_ms
        batch.drop_pending_before(self._from_watermark_ms - window_ms, self._watermark_ms - window_ms)
        early = list(self._state.early_clicks())
        entries = self._state.entries([key for key, _ in early])
        seen: set[tuple[bytes, int]] = set()
        for (key, click), entry in sorted(zip(early, entries, strict=True), key=lambda row: row[0][1][1]):
            if not self._waits(key, click[0], entry) or (key, click[0]) in seen:
                batch.drop_early([(key, click)])
            seen.add((key, click[0]))
        progress = committed.progress
        batch.set_meta(
            JoinMeta(
                identity=self._identity,
                impressions_position=committed.impressions,
                clicks_position=committed.clicks,
                examples_position=examples_end,
                watermark_ms=self._watermark_ms,
                impressions_seen_ms=progress.impressions_seen_ms if progress else NEVER_MS,
                clicks_seen_ms=progress.clicks_seen_ms if progress else NEVER_MS,
            )
        )
        batch.write()

    def _memory(self) -> Memory:
        progress = self._committed.progress
        memory = Memory()
        if progress is not None:
            memory.watermark_ms = progress.watermark_ms
            memory.impressions_seen_ms, memory.clicks_seen_ms = progress.impressions_seen_ms, progress.clicks_seen_ms
        for key, click in sorted(self._state.early_clicks(), key=lambda row: row[1][1]):
            memory.add_early(key, click)
        for chunk in self._state.all_chunks():
            memory.add_chunk(chunk)
        return memory
