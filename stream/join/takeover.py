"""Takes over a partition number: fence the previous owner, read how far it came, and bring the state there.

The order matters:

1. The transactional producer starts. That fences the previous owner and settles its open transaction, so no commit in flight
   can overtake what is read afterwards.
2. The committed offsets are read, with their metadata (`committed.py`).
3. The local state is opened (`local_state.py`).
4. The state is rebuilt (`rebuild.py`): `examples` is read to its very end, then the sources from where the local state is (or
   from the low-water offsets when there is none) to the committed offsets. Records below the committed offsets are read again
   but produce no output.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from state.errors import StateDamaged
from state.join_folder import state_error
from state.join_state import JoinState, StateOptions
from stream.formats import Formats
from stream.join.committed import Committed, CommittedReader
from stream.join.local_state import LocalState
from stream.join.partition import TakenOver
from stream.join.rebuild import Rebuild, Rebuilt
from stream.join.rebuild_progress import RebuildProgress
from stream.kafka.batches import BATCH_BYTES
from stream.kafka.clients import aiokafka_options, quietly_stopped, started
from stream.letters.log import LetterLog, Wanted
from stream.records.dead_letter import Origin
from stream.settings import JoinSettings, KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["Takeover", "transactional_id"]

log = logging.getLogger(__name__)


def transactional_id(names: TopicNames, settings: JoinSettings, number: int) -> str:
    """One id for each partition number: the producer epoch under it is the only fence between two owners."""
    return f"{names.prefix}{settings.group}-{number}"


class Takeover:
    """Takes over partition numbers, one after another.

    Args:
        identity: the ids of cluster and topics; local state of another log is moved aside.
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
        self._kafka, self._settings, self._names, self._identity = kafka, settings, names, identity
        self._formats = formats or Formats()
        self._committed = CommittedReader(kafka, names, group, identity)
        self._local = LocalState(state_dir, options, identity)

    async def take(self, number: int, still_ours: Callable[[], bool], progress: RebuildProgress | None = None) -> TakenOver:
        """Take over one partition number. `progress` is kept up to date with how far the takeover is.

        Raises:
            Abandoned: `still_ours` returned False on the way.
            PositionError: the log lost records that were not read yet, or ends before what was committed.
        """
        began = time.monotonic()
        progress = progress or RebuildProgress(number)
        progress.at("its transactional producer to start")
        producer = self._producer(number)
        await started(self._kafka, producer, f"the transactional producer of partition {number}")
        consumer = self._consumer()
        try:
            await started(self._kafka, consumer, f"the logs of partition {number}")
            progress.at("the committed offsets")
            committed = await self._committed.read(consumer, number)
            state, rebuilt = await self._opened(number, consumer, committed, still_ours, progress)
        except BaseException:
            await quietly_stopped(producer.stop)
            raise
        finally:
            await quietly_stopped(consumer.stop)
        log.info(
            "took over partition %d in %.2f s: %d impressions and %d clicks read again, %d pending",
            number,
            time.monotonic() - began,
            rebuilt.impressions_read,
            rebuilt.clicks_read,
            rebuilt.pending,
        )
        return TakenOver(producer, state, rebuilt.memory, rebuilt.positions, rebuilt.pending)

    async def _opened(
        self,
        number: int,
        consumer: Any,
        committed: Committed,
        still_ours: Callable[[], bool],
        progress: RebuildProgress,
    ) -> tuple[JoinState, Rebuilt]:
        """Open the local state and rebuild it. A folder that turns out to be damaged is moved aside, once."""
        moved_aside = False
        while True:
            progress.at("its state folder to open")
            state = self._local.open(number, committed)
            try:
                return state, await self._rebuild(number, consumer, state, committed, still_ours, progress)
            except StateDamaged as error:
                state.close()
                if moved_aside:
                    raise
                self._local.set_aside_damaged(state.path, error)
                moved_aside = True
            except BaseException:
                state.close()
                raise
            # The folder is opened again outside of `except`: the error's traceback refers to iterators of the damaged database,
            # and they keep its lock.

    async def _rebuild(
        self,
        number: int,
        consumer: Any,
        state: JoinState,
        committed: Committed,
        still_ours: Callable[[], bool],
        progress: RebuildProgress,
    ) -> Rebuilt:
        """Bring the state to the committed offsets.

        Raises:
            StateDamaged: RocksDB finds most damage only when it reads, and the rebuild reads everything that is pending.
        """
        rebuild = Rebuild(
            self._settings,
            self._names,
            number,
            self._identity,
            consumer=consumer,
            state=state,
            committed=committed,
            still_ours=still_ours,
            progress=progress,
            formats=self._formats,
            letters_of=self._letters_of,
        )
        try:
            return await rebuild.run()
        except Exception as error:
            if type(error) is Exception:  # what RocksDB raises
                raise state_error(state.path, "could not read it", error) from error
            raise

    def _producer(self, number: int) -> Any:
        return AIOKafkaProducer(
            **aiokafka_options(self._kafka),
            transactional_id=transactional_id(self._names, self._settings, number),
            transaction_timeout_ms=self._settings.transaction_timeout_ms,
            max_batch_size=BATCH_BYTES,
            max_request_size=1 << 30,  # the broker's limits decide, topic by topic
        )

    def _consumer(self) -> Any:
        return AIOKafkaConsumer(
            **aiokafka_options(self._kafka),
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            max_partition_fetch_bytes=4 << 20,
            # A fetch that waits at the end of one log delays the first fetch of the next log from the same broker.
            fetch_max_wait_ms=20,
            # The first request about each topic waits this long once, for the topic's metadata.
            retry_backoff_ms=20,
        )

    async def _letters_of(self, origins: set[Origin]) -> set[Origin]:
        """Which of these records became dead letters because the schema registry did not have their schema."""
        async with LetterLog(self._kafka, self._names) as letters:
            wanted = Wanted(reasons=("unknown_schema",), sources={origin.topic for origin in origins})
            return {letter.origin async for letter in letters.letters(wanted)} & origins
