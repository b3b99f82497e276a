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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.structs import TopicPartition

from state.errors import JoinStateError, StateDamaged, StateInUse
from state.join_folder import state_error
from state.join_state import JoinMeta, JoinState, StateOptions
from stream.errors import PositionError
from stream.formats import Formats
from stream.join.commit_metadata import Progress, decode_progress
from stream.join.partition import TakenOver
from stream.join.rebuild import Committed, Rebuild
from stream.join.rebuild_progress import RebuildProgress
from stream.join.settings_history import NEVER_MS
from stream.kafka.batches import BATCH_BYTES
from stream.kafka.clients import aiokafka_options, quietly_stopped, started
from stream.kafka.log_spans import high_watermarks
from stream.kafka.offsets import committed_offsets
from stream.letters.log import LetterLog, Wanted
from stream.records.dead_letter import Origin
from stream.settings import JoinSettings, KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["Takeover", "transactional_id"]

log = logging.getLogger(__name__)

# Local folders tried for one partition: a worker that hangs may still hold the lock of the first.
MAX_FOLDERS = 16


def transactional_id(names: TopicNames, settings: JoinSettings, number: int) -> str:
    """One a partition number: the producer epoch under it is the only fence between two owners."""
    return f"{names.prefix}{settings.group}-{number}"


class Takeover:
    """Takes over partition numbers, one after another.

    Args:
        identity: of cluster and topics; local state of another one is thrown away.
        group: the consumer group whose offsets hold the progress.
        formats: opens events that aren't plain JSON.
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
        formats: Formats | None = None,
    ) -> None:
        self._formats = formats or Formats()
        self._kafka, self._settings, self._names, self._group = kafka, settings, names, group
        self._identity, self._state_dir, self._options = identity, state_dir, options

    async def take(self, number: int, still_ours: Callable[[], bool], progress: RebuildProgress | None = None) -> TakenOver:
        """Take over one partition number; `progress` is told how far the rebuild is.

        Raises:
            Abandoned: `still_ours` said no on the way: another rebalance has begun.
            PositionError: the log lost records that were not read yet, or ends before what was committed.
        """
        began = time.monotonic()
        told = progress or RebuildProgress(number)
        told.at("its transactional producer to start")
        producer = AIOKafkaProducer(
            **aiokafka_options(self._kafka),
            transactional_id=transactional_id(self._names, self._settings, number),
            transaction_timeout_ms=self._settings.transaction_timeout_ms,
            max_batch_size=BATCH_BYTES,
            max_request_size=1 << 30,  # the broker's limits decide, topic by topic
        )
        await started(self._kafka, producer, f"the transactional producer of partition {number}")
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
            await started(self._kafka, consumer, f"the logs of partition {number}")
            told.at("the committed offsets")
            committed = await self._committed(consumer, number)
            given_up = False
            while True:
                told.at("its state folder to open")
                state = self._open(number, committed)
                rebuild = Rebuild(
                    self._settings,
                    self._names,
                    number,
                    self._identity,
                    consumer,
                    state,
                    committed,
                    still_ours,
                    told,
                    self._formats,
                    self._letters_of,
                )
                try:
                    memory, positions, pending = await rebuild.run()
                    break
                except Exception as error:
                    # RocksDB finds most damage only when it reads, and the rebuild reads everything that is pending. What it
                    # finds is a plain Exception.
                    if type(error) is Exception:
                        error = state_error(state.path, "could not read it", error)
                    if given_up or not isinstance(error, StateDamaged):
                        raise error
                    state.close()
                    self._give_up(state.path, error)
                    given_up = True
        except BaseException:
            if state is not None:
                state.close()
            await quietly_stopped(producer.stop)
            raise
        finally:
            await quietly_stopped(consumer.stop)
        log.info(
            "took over partition %d in %.2f s: %d impressions and %d clicks read again, %d pending",
            number,
            time.monotonic() - began,
            rebuild.impressions_read,
            rebuild.clicks_read,
            pending,
        )
        return TakenOver(producer, state, memory, positions, pending)

    async def _letters_of(self, origins: set[Origin]) -> set[Origin]:
        """Which of these records became dead letters because the schema registry did not have their schema."""
        async with LetterLog(self._kafka, self._names) as letters:
            wanted = Wanted(reasons=("unknown_schema",), sources={origin.topic for origin in origins})
            return {letter.origin async for letter in letters.letters(wanted)} & origins

    async def _committed(self, consumer: Any, number: int) -> Committed:
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
            return Committed(starts[impressions], starts[clicks], *at, None)
        if len(known) != 2:
            raise PositionError(
                f"group {self._group}, partition {number}: expected committed offsets of impressions and clicks, found only "
                f"{', '.join(tp.topic for tp in known)}: the other topic was deleted and made anew, which takes its offsets "
                "away, or they were reset alone. To begin anew, reset those of both topics with Kafka's consumer-groups tool."
            )
        if len(alone := [tp.topic for tp, offset in known.items() if not offset.metadata]) == 1:
            raise PositionError(
                f"group {self._group}, partition {number}: expected the join's progress with the committed offsets of "
                f"impressions and clicks, found none with those of {alone[0]}: they were reset alone. What has its label can't "
                "be told from what is pending then. To begin anew, reset those of both topics with Kafka's consumer-groups "
                "tool."
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
        if progress is not None and progress.identity not in ("", self._identity):
            raise PositionError(
                f"group {self._group}, partition {number}: expected the topics that its progress is of, found others of the "
                f"same names: {self._made_anew(progress.identity)}. What has its label can't be told from what is pending. To "
                "begin anew, reset the offsets of impressions and clicks with Kafka's consumer-groups tool: to the ends of "
                "their logs, where no impression may be labelled a second time."
            )
        return Committed(known[impressions].offset, known[clicks].offset, *at, progress)

    def _made_anew(self, then: str) -> str:
        """What has changed since an identity of before (`JoinWorker._take`)."""
        names = ("the cluster", self._names.impressions, self._names.clicks, self._names.examples)
        pairs = zip(names, then.split("/"), self._identity.split("/"), strict=False)
        return ", ".join(f"{name} was made anew (id {new}, before {old})" for name, old, new in pairs if old != new)

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

    def _open(self, number: int, committed: Committed) -> JoinState:
        """The local state; moved aside where it is damaged, or can't be a prefix of this log.

        Raises:
            JoinStateError: it can't be opened, and what it holds may be good.
        """
        for attempt in range(MAX_FOLDERS):
            path = self._state_dir / (f"partition-{number}" if not attempt else f"partition-{number}.{attempt}")
            try:
                state, meta = self._opened(path)
            except StateInUse:
                log.warning("%s is open in another process; trying the next folder", path)
                continue
            except StateDamaged as error:
                self._give_up(path, error)
                return JoinState(path, self._options)
            if (
                meta is not None
                and committed.progress is not None
                and meta.life == committed.progress.life
                and meta.identity.removesuffix("/layout 3") == self._identity  # version 0.1.0 had its layout in there
                and committed.impressions_start <= meta.impressions_position <= committed.impressions
                and committed.clicks_start <= meta.clicks_position <= committed.clicks
                # It moves without records, too.
                and (meta.watermark_ms, meta.cut) <= (committed.progress.watermark_ms, committed.progress.cut)
                and (
                    # An older one needs the labels given since; one that is up to date does not.
                    committed.examples_start <= meta.examples_position
                    or (meta.impressions_position, meta.clicks_position) == (committed.impressions, committed.clicks)
                )
                and self._terms_known(state, meta, committed.progress)
            ):
                return state
            state.close()
            # New, what an unfinished rebuild has left, or a start after which no event came.
            if meta is None or max(meta.watermark_ms, meta.impressions_seen_ms, meta.clicks_seen_ms) == NEVER_MS:
                JoinState.destroy(path)
            elif committed.progress is not None or meta.watermark_ms > NEVER_MS:
                aside = JoinState.set_aside(path, "other")
                log.warning(
                    "local state of partition %d is of another log, not a part of this one, from before offsets were reset, or "
                    "from before settings that are not known any more: moved it aside to %s",
                    *(number, aside),
                )
            else:
                JoinState.destroy(path)
            return JoinState(path, self._options)
        raise JoinStateError(
            f"{self._state_dir}: expected a free folder for partition {number}, found {MAX_FOLDERS} held by other processes. "
            "End the join workers that hang, or set another `state_dir`."
        )

    @staticmethod
    def _terms_known(state: JoinState, meta: JoinMeta, progress: Progress) -> bool:
        """Whether the progress still says under which settings everything was read: in the state, and behind its positions.

        It doesn't about what is forgotten by now. An old state may remember that, or lie before it and read it again: it would
        be decided under the settings of today.
        """
        if not progress.terms:
            return True
        oldest = progress.terms[0]
        if meta.impressions_position < oldest.impressions_from or meta.clicks_position < oldest.clicks_from:
            return False
        first = next(state.all_chunks(), None) if oldest.impressions_from else None
        return first is None or first.first_offset >= oldest.impressions_from

    def _opened(self, path: Path) -> tuple[JoinState, JoinMeta | None]:
        state = JoinState(path, self._options)
        try:
            return state, state.meta()
        except BaseException:
            state.close()
            raise

    @staticmethod
    def _give_up(path: Path, error: StateDamaged) -> None:
        aside = JoinState.set_aside(path, "damaged")
        log.warning("%s Moved it aside to %s; the state is rebuilt from the log.", error, aside)
