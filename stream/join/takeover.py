"""Taking over a partition number: fence the old owner, read how far it came, bring the state there, and go on.

The order matters. The producer starts first: that fences the old owner and settles its open transaction, so what is read after
it cannot be overtaken by a commit in flight. Then the committed offsets with their metadata, then `examples` to its very end:
labels behind a transaction that a replay of dead letters has open there are waited for. Then the sources are read again,
silently, from where the local state stands (or from the low-water offsets when there is none) to the committed offsets: what
`examples` holds is resolved, what the watermark has not passed is pending. Below the committed offsets nothing is said again.
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
from state.join_state import Chunk, Entry, JoinMeta, JoinState, StateBatch, StateOptions
from stream.batches import BATCH_BYTES
from stream.clients import aiokafka_options
from stream.dead_letters import REPLAY_HEADER
from stream.errors import Abandoned, PositionError
from stream.join.events import read_run
from stream.join.examples import click_awaited, label_of, left_out_of, source_offset_of
from stream.join.logic import NEVER_MS, EarlyClick, Memory, packed_click
from stream.join.partition import Positions, TakenOver
from stream.join.progress import Progress, decode_progress
from stream.join.recovery import RebuildProgress
from stream.log_spans import high_watermarks
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
    examples_start: int
    examples_end: int  # of all that is written, open transactions of others included
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

    async def take(self, number: int, still_ours: Callable[[], bool], progress: RebuildProgress | None = None) -> TakenOver:
        """Take over one partition number; `progress` is told how far the rebuild is.

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
            fetch_max_wait_ms=20,  # a fetch in flight at one log's end holds back the next log's first, of the same broker
            retry_backoff_ms=20,  # the first question about each topic waits once for its metadata
        )
        state: JoinState | None = None
        try:
            await consumer.start()
            committed = await self._committed(consumer, number)
            destroyed = False
            while True:
                state = self._open(number, committed)
                rebuild = _Rebuild(
                    self._settings, self._names, number, self._identity, consumer, state, committed, still_ours, progress
                )
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
        examples = TopicPartition(self._names.examples, number)
        starts = await consumer.beginning_offsets([impressions, clicks, examples])
        end = (await high_watermarks(self._kafka, [examples]))[examples]
        at = starts[impressions], starts[clicks], starts[examples], end
        if not known:
            if await self._holds_records(consumer, examples, starts[examples], end):
                # Brokers forget the offsets of a group without members after a week (offsets.retention.minutes).
                raise PositionError(
                    f"group {self._group}, partition {number}: expected committed offsets, since {self._names.examples} holds "
                    "labels, found none: they have expired, or `join.group` has changed. Beginning at the head of the log "
                    "would label again what was labelled. Set the offsets of impressions and clicks with Kafka's "
                    "consumer-groups tool to begin anew from there."
                )
            return _Committed(starts[impressions], starts[clicks], *at, None)
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
        return _Committed(known[impressions].offset, known[clicks].offset, *at, progress)

    async def _holds_records(self, consumer: Any, tp: TopicPartition, start: int, end: int) -> bool:
        """Whether any was ever committed there; what a first transaction left when it was aborted doesn't count."""
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
                and meta.watermark_ms <= committed.progress.watermark_ms  # it moves without records, too
                and (
                    # An older one needs the labels given since; one that is up to date does not.
                    committed.examples_start <= meta.examples_position
                    or (meta.impressions_position, meta.clicks_position) == (committed.impressions, committed.clicks)
                )
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

    The first thing written takes the positions away, the last one puts the new ones there: what an unfinished rebuild leaves
    stands for no position of the log, and is thrown away when it is opened again.
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
        progress: RebuildProgress | None = None,
    ) -> None:
        self._told = progress or RebuildProgress(number)
        self._settings, self._names, self._number, self._identity = settings, names, number, identity
        self._consumer, self._state, self._committed, self._still_ours = consumer, state, committed, still_ours
        self._resolved: dict[int, bool] = {}  # source offset → clicked
        self._awaited: set[int] = set()  # source offsets whose first label is out, and a correction may follow
        self._matched: set[tuple[bytes, int]] = set()  # clicks that made a label: id and event time
        self.impressions_read = self.clicks_read = 0
        last = committed.progress
        self._watermark_ms = last.watermark_ms if last else NEVER_MS
        meta = state.meta()
        if meta is not None:
            self._from = Positions(meta.impressions_position, meta.clicks_position, meta.examples_position)
            self._from_watermark_ms = meta.watermark_ms
        elif last is not None:
            self._from = Positions(last.impressions_low, last.clicks_low, last.examples_low)
            self._from_watermark_ms = NEVER_MS
        else:
            self._from = Positions(committed.impressions, committed.clicks, 0)
            self._from_watermark_ms = NEVER_MS

    async def run(self) -> tuple[Memory, Positions, int]:
        names, committed = self._names, self._committed
        await self._check_start(names.impressions, self._from.impressions, committed.impressions)
        await self._check_start(names.clicks, self._from.clicks, committed.clicks)
        examples_end = committed.examples_end
        # Without anything to read again, labels have nothing to say, and retention may have taken them.
        older = self._from.impressions < committed.impressions or self._from.clicks < committed.clicks
        labels_from = self._from.examples if older and committed.progress is not None else examples_end
        await self._check_start(names.examples, labels_from, examples_end)
        spans = (
            (labels_from, examples_end),
            (self._from.impressions, committed.impressions),
            (self._from.clicks, committed.clicks),
        )
        self._told.begin(sum(max(until - start, 0) for start, until in spans))
        async for records in self._read(names.examples, labels_from, examples_end):
            self._resolve(records)
        async for records in self._read(names.impressions, self._from.impressions, committed.impressions):
            self._impressions(records)
        async for records in self._read(names.clicks, self._from.clicks, committed.clicks):
            self._clicks(records)
        return (
            self._memory(self._settle(examples_end)),
            Positions(committed.impressions, committed.clicks, examples_end),
            self._state.count_pending(),
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

    async def _read(self, topic: str, start: int, until: int) -> AsyncIterator[list[Any]]:
        """Committed records of `start <= offset < until`, as they are fetched."""
        if start >= until:
            return
        tp = TopicPartition(topic, self._number)
        self._consumer.assign([tp])
        self._consumer.seek(tp, start)
        position = start
        while position < until:
            if not self._still_ours():
                raise Abandoned(f"partition {self._number} went to another worker while its state was rebuilt")
            fetched = await self._consumer.getmany(tp, timeout_ms=500)
            records = [record for record in fetched.get(tp, ()) if record.offset < until]
            if records:
                yield records
            before, position = position, min(await self._consumer.position(tp), until)
            self._told.advance(position - before)

    def _batch(self) -> StateBatch:
        batch = self._state.batch()
        batch.drop_meta()
        return batch

    def _resolve(self, records: list[Any]) -> None:
        """Note which impressions have their label, and mark those of the local state that were clicked since.

        The others that were settled since have been passed by the watermark: `_settle` drops them all at once.
        """
        clicked: list[tuple[bytes, int, int]] = []
        for record in records:
            headers, left_out = dict(record.headers), left_out_of(record)
            if REPLAY_HEADER in headers:
                continue  # said before, by the record that became a dead letter; a correction may have followed
            if left_out is not None:
                self._resolved.update(dict.fromkeys(left_out, False))
                self._awaited.update(left_out if click_awaited(headers) else ())
                continue
            offset = source_offset_of(headers)
            self._resolved[offset] = label_of(headers)
            if click_awaited(headers):
                self._awaited.add(offset)
            if self._resolved[offset]:
                clicked.append((record.key, int(headers["impression_ms"]), offset))
                self._matched.add((record.key, int(headers["click_ms"])))
        entries = self._state.entries([key for key, _, _ in clicked])
        known = [row for row, entry in zip(clicked, entries, strict=True) if entry is not None and entry[:2] == row[1:]]
        batch = self._batch()
        batch.remember((key, (time_ms, offset, True)) for key, time_ms, offset in known)
        batch.drop_pending((time_ms, offset) for _, time_ms, offset in clicked)
        batch.write()

    def _impressions(self, records: list[Any]) -> None:
        """Remember what was accepted then: labelled since, or pending at the committed watermark. The rest came late."""
        self.impressions_read += len(records)
        settings = self._settings
        events = read_run(records, settings.max_future_ms, settings.max_watermark_future_ms)
        stored = self._state.entries(events.keys)
        remembered: dict[bytes, Entry] = {}
        pending: list[tuple[int, int, bytes, bytes]] = []
        labelled: list[tuple[int, int, bytes, bytes]] = []  # pending as well, but for a click only
        first_offset = -1  # not from `remembered`: an id used twice has only its later offset there
        for index, (key, time_ms, offset) in enumerate(zip(events.keys, events.times_ms, events.offsets, strict=True)):
            known = remembered.get(key) or stored[index]
            if known is not None and time_ms <= known[0] + settings.dedupe_horizon_ms:
                continue
            passed = time_ms + settings.window_ms < self._watermark_ms
            if offset not in self._resolved and passed:
                continue
            clicked = self._resolved.get(offset, False)
            remembered[key] = (time_ms, offset, clicked)
            first_offset = offset if first_offset < 0 else first_offset
            if offset not in self._resolved:
                pending.append((time_ms, offset, key, events.values[index]))
            elif offset in self._awaited and not clicked and not passed:
                labelled.append((time_ms, offset, key, events.values[index]))
        if remembered:
            batch = self._batch()
            batch.remember(remembered.items())
            batch.add_pending(pending)
            batch.add_pending(labelled, labelled=True)
            latest = max(time_ms for time_ms, _, _ in remembered.values())
            batch.add_chunk(Chunk(first_offset, latest, self._from.examples), list(remembered))
            batch.write()

    def _clicks(self, records: list[Any]) -> None:
        """Keep the clicks that still wait for their impression; the others have been accounted for."""
        self.clicks_read += len(records)
        events = read_run(records, self._settings.max_future_ms, self._settings.max_watermark_future_ms)
        entries = self._state.entries(events.keys)
        batch = self._batch()
        for key, time_ms, offset, record, entry in zip(
            events.keys, events.times_ms, events.offsets, events.records, entries, strict=True
        ):
            if self._waits(key, time_ms, entry):
                batch.add_early([(key, (time_ms, offset, packed_click(record)))])
        batch.write()

    def _waits(self, key: bytes, click_ms: int, entry: Entry | None) -> bool:
        """Whether a click is not accounted for yet. One that labelled an id's earlier use is outside the newer use's window."""
        settings = self._settings
        if (key, click_ms) in self._matched:
            return False
        in_window = entry is not None and -settings.negative_skew_ms <= click_ms - entry[0] <= settings.window_ms
        return not in_window and click_ms + settings.negative_skew_ms >= self._watermark_ms

    def _settle(self, examples_end: int) -> list[tuple[bytes, EarlyClick]]:
        """Drop what was settled since the older local state, and write the positions: the rebuild is done.

        The clicks that still wait, in order of offset.
        """
        batch, committed, window_ms = self._state.batch(), self._committed, self._settings.window_ms
        batch.drop_pending_before(self._from_watermark_ms - window_ms, self._watermark_ms - window_ms)
        early = list(self._state.early_clicks())
        entries = self._state.entries([key for key, _ in early])
        waiting: dict[tuple[bytes, int], tuple[bytes, EarlyClick]] = {}
        for (key, click), entry in sorted(zip(early, entries, strict=True), key=lambda row: row[0][1][1]):
            if not self._waits(key, click[0], entry) or (key, click[0]) in waiting:
                batch.drop_early([(key, click)])
            else:
                waiting[key, click[0]] = (key, click)
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
        return list(waiting.values())

    def _memory(self, early: list[tuple[bytes, EarlyClick]]) -> Memory:
        progress = self._committed.progress
        memory = Memory()
        if progress is not None:
            memory.watermark_ms = progress.watermark_ms
            memory.impressions_seen_ms, memory.clicks_seen_ms = progress.impressions_seen_ms, progress.clicks_seen_ms
        for key, click in early:
            memory.add_early(key, click)
        for chunk in self._state.all_chunks():
            memory.add_chunk(chunk)
        return memory
