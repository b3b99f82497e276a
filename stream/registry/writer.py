"""Changes of the registry of versions, one after another across all processes.

Every writer uses the same transactional id, which works as the lock. A writer starts its producer, reads the log to its end,
decides, and writes its records in one transaction. No writer decides on an old state:

1. Starting a producer (InitProducerId) raises the id's epoch at the coordinator, after the coordinator has committed or aborted
   the former producer's open transaction. From then on no commit of the former producer succeeds. So the log's end, read after
   the start, holds every change of all other writers, until another one starts its producer.
2. While a writer's commits succeed, no other writer has started: the start would have made the commit fail, and the change with
   it. So the log's end moves by this writer's commits only, and it is enough to have read up to the last of them.
3. A decision *not* to write commits nothing, so 2 says nothing about it. Such a decision only counts right after 1.

So a writer keeps its producer between operations, and an operation costs one transaction. After a commit that failed, the
writer can't know whether it took effect: perhaps only the answer was lost. The operation starts again with 1, looks for its
own id in the log, and decides again only when the id isn't there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from state import decisions
from state.changes import Cause, Change
from state.errors import Refused, StaleEpoch
from state.registry import KeyedRecord, RegistryState, encode_record
from state.settings import SnapshotSettings
from stream.errors import Fenced, NoAnswer, RegistryError, StreamError, Unsettled
from stream.kafka.clients import aiokafka_options, unreachable
from stream.kafka.quick import started_quickly
from stream.kafka.transactional import dropped, is_fencing, retrieve
from stream.records.times import duration
from stream.registry.log import ANSWER, RegistryLog
from stream.registry.writes import Decide, RegistryWrites, Written
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

if TYPE_CHECKING:
    from aiokafka import AIOKafkaProducer

__all__ = ["RegistryWriter", "Written", "registry_transactional_id"]

logger = logging.getLogger(__name__)

# Attempts at one operation. An attempt fails when another writer's operation succeeded meanwhile, or Kafka is away.
ATTEMPTS = 8
# Attempts to find out whether the last one took effect, if nobody knows.
LOOKS = 2
# Longest wait before an attempt.
MAX_BACKOFF_S = 1.0
# Difference of this machine's clock from the broker's beyond which the broker's is used instead. Clocks that are kept by NTP
# differ by less, and a record is on its way for less, also on a machine whose cores are all busy.
CLOCK_MS = 2_000
# Of the record that is written for its timestamp, and never committed.
CLOCK_KEY = b"alias/clock"
# Limit for one attempt. The broker ends the open transaction of a dead process within TRANSACTION_TIMEOUT_MS.
ATTEMPT_TIMEOUT_S = 20.0
# A writer that is killed in the middle of a transaction holds back readers of the registry at most this long.
TRANSACTION_TIMEOUT_MS = 15_000

T = TypeVar("T")


class RegistryWriter(RegistryWrites):
    """Announces versions, moves champion and aliases, tags, takes versions away. Nothing else writes to `snapshots`.

    ```python
    writer = RegistryWriter(settings.kafka, names, who="trainer@host")
    epoch = await writer.take_trainer_epoch()
    announcement = await writer.announce(manifest, gate=settings.snapshots)
    await writer.close()
    ```

    Every method raises:

    - `Fenced` when other writers came in between at every attempt, or another trainer has taken over;
    - `RegistryError` when the rules don't allow the change;
    - `NoAnswer` when Kafka can't be reached, and `TopicError` when the topic doesn't exist.

    Nothing was changed then, but for `Unsettled`, a `NoAnswer`: whether the change took effect isn't known.
    """

    def __init__(self, kafka: KafkaSettings, names: TopicNames, *, who: str) -> None:
        self._kafka = kafka
        self._topic = names.snapshots
        self._who = who
        self._transactional_id = registry_transactional_id(names)
        self._log = RegistryLog(kafka, names, follow=False)
        self._producer: AIOKafkaProducer = None
        self._read_to = 0  # the position after this writer's own last change
        self._at_ms, self._at_s = 0, 0.0
        self._lock = asyncio.Lock()

    @property
    def state(self) -> RegistryState:
        """The registry, as far as this writer has read it."""
        return self._log.state

    async def connect(self) -> None:
        """Fence other writers and read the registry. The first operation does so by itself; after this, it takes less time."""
        from aiokafka.errors import KafkaError

        async with self._lock:
            try:
                async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                    await self._take_over()
            except BaseException as error:
                await self._drop_producer()
                if isinstance(error, KafkaError | TimeoutError):
                    raise unreachable(self._kafka, ANSWER, error) from error
                raise

    async def tag_due(self, gate: SnapshotSettings) -> tuple[int, ...]:
        """Tag every version that is due, as far as this writer has read. Writes nothing when none is due."""
        from aiokafka.errors import KafkaError

        async with self._lock:
            if self._log.is_open:
                try:
                    async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                        await self._log.read_to(self._read_to)
                except (KafkaError, TimeoutError) as error:
                    raise unreachable(self._kafka, ANSWER, error) from error
            due = decisions.due_good(self._log.state, self._now_ms(), gate)
        return await self.tag_good(*due) if due else ()

    async def close(self) -> None:
        """Disconnect."""
        async with self._lock:
            await self._drop_producer()
            await self._log.close()

    async def kafka_ms(self) -> int:
        """Now by the broker's clock, for an operation that goes by time: this machine's clock may be wrong.

        Until this writer's first change has shown it, a record is written for its timestamp, in a transaction that is aborted.
        """
        from aiokafka.errors import KafkaError

        failure: BaseException = TimeoutError()
        async with self._lock:
            for attempt in range(ATTEMPTS):
                if self._at_ms:
                    return self._now_ms()
                await _wait_before(attempt)
                try:
                    async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                        if self._producer is None:
                            await self._take_over()
                        await self._producer.begin_transaction()
                        sent = await self._producer.send_and_wait(self._topic, key=CLOCK_KEY, partition=0)
                        await self._producer.abort_transaction()
                        self._at_ms, self._at_s = sent.timestamp, time.monotonic()
                except (KafkaError, TimeoutError) as error:
                    failure = error
                    await self._drop_producer()
                except BaseException:
                    await self._drop_producer()
                    raise
        raise unreachable(self._kafka, "its time", failure) from failure

    async def _change(self, decide: Decide[T], reason: str = "") -> Written[T]:
        """Run one operation to its end."""
        from aiokafka.errors import KafkaError

        cause = Cause(self._who, self._now_ms(), reason, uuid.uuid4().hex)
        began_s = time.monotonic()
        attempted: T | None = None
        in_doubt = False  # whether an attempt has failed of which nobody knows yet whether it took effect
        failure: BaseException = TimeoutError()
        async with self._lock:
            for attempt in range(ATTEMPTS + LOOKS):
                if attempt >= ATTEMPTS and not in_doubt:
                    break
                await _wait_before(attempt)
                try:
                    async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                        change = await self._decided(decide, cause)
                        if change is None:
                            # An attempt that seemed to fail did take effect.
                            assert attempted is not None
                            return Written(attempted, self._log.position, None)
                        in_doubt = False
                        if not change.records:
                            # There is nothing to write. The outcome is that of the log as it is, not that of an earlier,
                            # failed attempt: another writer may have come in between.
                            return Written(change.outcome, self._log.position, None)
                        if attempt >= ATTEMPTS:
                            break
                        attempted, in_doubt = change.outcome, True
                        await self._commit(change.records, cause.now_ms + round((time.monotonic() - began_s) * 1_000))
                        # Kafka answers a commit before its marker is in the log. Whoever reads from now on finds the change.
                        await self._log.read_to(self._read_to)
                        return Written(change.outcome, self._read_to, self._at_ms)
                except _ClockIsOff as off:
                    logger.warning("%s. Kafka's clock is used", off)
                    cause, began_s, in_doubt = replace(cause, now_ms=self._now_ms()), time.monotonic(), False
                except StaleEpoch as error:
                    raise Fenced(str(error)) from error
                except Refused as error:
                    raise RegistryError(str(error)) from error
                except (KafkaError, TimeoutError, _CommitFailed) as error:
                    failure = error.__cause__ or error
                    logger.info("registry: attempt %d failed, starting over: %r", attempt + 1, failure)
                    await self._drop_producer()
                except BaseException:
                    await self._drop_producer()
                    raise
        raise self._gave_up(failure, in_doubt=in_doubt) from failure

    def _gave_up(self, failure: BaseException, *, in_doubt: bool) -> StreamError:
        """The error of an operation whose attempts have all failed."""
        if in_doubt:
            return Unsettled(
                f"{unreachable(self._kafka, ANSWER, failure)} The last of {ATTEMPTS} attempts to change the registry was sent, "
                "and whether it took effect isn't known: `headrace snapshot list` shows it once Kafka answers."
            )
        if is_fencing(failure):
            return Fenced(
                f"{self._topic}: expected to change the registry within {ATTEMPTS} attempts, found another writer in "
                "between each time. Nothing was changed; run it again."
            )
        return NoAnswer(f"{unreachable(self._kafka, ANSWER, failure)} Nothing was changed.")

    async def _decided(self, decide: Decide[T], cause: Cause) -> Change[T] | None:
        """The change, decided on a state that is certain to be the newest. None when it has been written already."""
        if self._producer is not None:
            await self._log.read_to(self._read_to)
            with contextlib.suppress(Refused):  # the state may be old, so this doesn't count: see 3 at the top of this module
                change = decide(self._log.state, cause)
                if change.records:
                    return change
            await self._drop_producer()
        await self._take_over()
        if self._log.state.has_done(cause.operation):
            return None
        return decide(self._log.state, cause)

    async def _take_over(self) -> None:
        """Fence every other writer, then read what they have written, in this order: see 1 at the top of this module.

        What is in the log already is read while the producer starts.
        """
        from aiokafka import AIOKafkaProducer

        self._producer = AIOKafkaProducer(
            **aiokafka_options(self._kafka),
            transactional_id=self._transactional_id,
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
        )
        starting = started_quickly(self._producer, [self._topic])
        for found in await asyncio.gather(starting, self._open_log(), return_exceptions=True):
            if isinstance(found, BaseException):
                raise found
        await self._log.catch_up()
        self._read_to = self._log.position

    async def _open_log(self) -> None:
        if not self._log.is_open:
            await self._log.open()

    async def _commit(self, records: Iterable[KeyedRecord], decided_ms: int) -> None:
        """Write records in one transaction. Every send is awaited, since aiokafka also commits when one has failed.

        Args:
            decided_ms: now by the clock that the records' times are of.

        Raises:
            _ClockIsOff: that clock differs from the broker's. The transaction is aborted, and this writer knows the time now.
        """
        began_s = time.monotonic()
        try:
            await self._producer.begin_transaction()
            sent = []
            for key, record in records:
                value = encode_record(record)
                future = await self._producer.send(self._topic, key=key.encode(), value=value, partition=0)
                future.add_done_callback(retrieve)
                sent.append(future)
            written = [await future for future in sent]
            arrived_ms, at_s = written[-1].timestamp, time.monotonic()
            latest_ms = decided_ms + (at_s - began_s) * 1_000
            if arrived_ms > 0 and not decided_ms - CLOCK_MS <= arrived_ms <= latest_ms + CLOCK_MS:
                await self._producer.abort_transaction()
                self._at_ms, self._at_s = arrived_ms, at_s
                raise _ClockIsOff(arrived_ms - decided_ms)
            await self._producer.commit_transaction()
        except _ClockIsOff:
            raise
        except Exception as error:
            # Whatever the error is: once the producer is started again, the log shows whether the commit took effect.
            raise _CommitFailed from error
        if min(each.offset for each in written) < 0:  # a batch that was sent twice, and of which the broker forgot the offset
            raise _CommitFailed
        self._read_to = written[-1].offset + 1
        self._at_ms, self._at_s = arrived_ms, at_s

    def _now_ms(self) -> int:
        """Now by the broker's clock, as this writer's last change showed it; before that by this machine's.

        So a writer that lives long, a trainer's, tags and promotes by the clock that all share, also when its own one jumps.
        """
        if not self._at_ms:
            return max(time.time_ns() // 1_000_000, self._log.arrived_ms)
        return self._at_ms + round((time.monotonic() - self._at_s) * 1_000)

    async def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await dropped(producer)


class _CommitFailed(Exception):
    """A transaction failed, or seemed to. The cause is aiokafka's error."""


class _ClockIsOff(Exception):
    """This machine's clock differs from the broker's."""

    def __init__(self, behind_ms: int) -> None:
        how = "behind" if behind_ms > 0 else "ahead of"
        super().__init__(f"this machine's clock is {duration(abs(behind_ms))} {how} Kafka's")


async def _wait_before(attempt: int) -> None:
    """Wait for a random time before all attempts but the first, so that two writers don't keep fencing each other in step."""
    if attempt:
        await asyncio.sleep(random.uniform(0, min(MAX_BACKOFF_S, 0.05 * 2**attempt)))


def registry_transactional_id(names: TopicNames) -> str:
    """The transactional id that all writers of one registry share: `<prefix>headrace-registry`, and the track's name."""
    return f"{names.prefix}headrace-registry{names.suffix}"
