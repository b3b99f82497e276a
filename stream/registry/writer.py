"""Changes of the snapshot registry, one after another across all processes.

Every writer uses the same transactional id. That is the lock: a writer starts its producer, reads the log to its end,
decides, and writes its records in one transaction. Why nothing is decided on an old state:

1. Starting a producer (InitProducerId) raises the id's epoch at the coordinator, after it has committed or aborted
   whatever the former producer had open. From then on no commit of the former one succeeds. So the end of the log, read
   after that, holds every change that anybody but us has made or ever will, until somebody else starts a producer.
2. While our commits succeed, nobody has: a producer started by somebody else would have made our commit fail, and with it
   the change. So the log's end moves by our own commits only, and it is enough to have read up to the last of those.
3. A decision *not* to write commits nothing, so 2 doesn't cover it: it is only believed right after 1.

So the producer is kept between operations, and an operation costs one transaction. When a commit fails we can't know
whether it happened (the answer may be what got lost). The operation starts over with 1, looks for its own id in the log,
and only decides again when it isn't there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from state import decisions
from state.decisions import Announcement, Cause, Change, Held, Moved
from state.errors import Refused, StaleEpoch
from state.manifest import Manifest
from state.registry import Record, RegistryState, encode_record
from state.settings import SnapshotSettings
from stream.errors import Fenced, RegistryError
from stream.kafka.clients import aiokafka_options
from stream.registry.log import RegistryLog, unreachable
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["RegistryWriter", "Written", "registry_transactional_id"]

logger = logging.getLogger(__name__)

# Attempts at one operation. Each failed one means that somebody else got theirs done (or that Kafka is away).
ATTEMPTS = 8
# Longest wait before an attempt; the wait is random, so that two writers don't fence each other in step.
MAX_BACKOFF_S = 1.0
# One attempt: an open transaction of a dead process is settled by the broker within TRANSACTION_TIMEOUT_MS.
ATTEMPT_TIMEOUT_S = 20.0
# A writer killed in the middle of a transaction holds back readers of the registry at most this long.
TRANSACTION_TIMEOUT_MS = 15_000
# Saying goodbye to a broker that doesn't answer.
CLOSE_TIMEOUT_S = 5.0

T = TypeVar("T")
Decide = Callable[[RegistryState, Cause], Change[T]]


@dataclass(frozen=True, slots=True)
class Written(Generic[T]):
    """A change that is in the log.

    `position` is the offset after its last record: who has read that far has applied it. `at_ms` is the broker's clock (ms
    since epoch) where the topic stamps records on arrival. When nothing had to be written, both are those of the last
    change that this writer knows.
    """

    outcome: T
    position: int
    at_ms: int


class RegistryWriter:
    """Announces versions, moves the champion, holds auto-promotion.

    ```python
    writer = RegistryWriter(settings.kafka, names, who="trainer@host")
    epoch = await writer.take_trainer_epoch()
    announcement = await writer.announce(manifest, gate=settings.snapshots)
    await writer.close()
    ```

    Every method raises `Fenced` when other writers came in between at every attempt, or another trainer has taken over;
    `RegistryError` when the rules refuse the change or Kafka can't be reached; `TopicError` when the topic isn't there.
    """

    def __init__(self, kafka: KafkaSettings, names: TopicNames, *, who: str) -> None:
        self._kafka = kafka
        self._topic = names.snapshots
        self._who = who
        self._transactional_id = registry_transactional_id(names)
        self._log = RegistryLog(kafka, names, follow=False)
        self._log_is_open = False
        self._producer: Any = None
        self._read_to = 0  # the position after our own last change
        self._at_ms = 0
        self._lock = asyncio.Lock()

    async def take_trainer_epoch(self) -> int:
        """The next trainer epoch; whoever holds an older one can announce no more."""
        written = await self._change(lambda state, cause: decisions.take_epoch(state, who=cause.who, now_ms=cause.now_ms))
        return written.outcome

    async def next_version(self) -> int:
        """One above every version announced. The store has its own answer: take the larger."""

        def look(state: RegistryState, cause: Cause) -> Change[int]:
            return Change((), state.newest + 1)

        return (await self._change(look)).outcome

    async def announce(self, manifest: Manifest, *, gate: SnapshotSettings) -> Announcement:
        """Enter a version that is whole in the store, and promote it if the gate lets it through."""

        def decide(state: RegistryState, cause: Cause) -> Change[Announcement]:
            return decisions.announce(
                state, manifest, settings=gate, who=cause.who, now_ms=cause.now_ms, operation=cause.operation
            )

        return (await self._change(decide)).outcome

    async def promote(self, version: int, reason: str, *, hold: bool | None = None, hold_reason: str = "") -> Written[Moved]:
        """Make a version champion; `hold` also stops (True) or restarts (False) auto-promotion."""
        return await self._change(
            lambda state, cause: decisions.promote(state, version, cause, hold=hold, hold_reason=hold_reason), reason
        )

    async def rollback(
        self,
        reason: str,
        *,
        to: int | None = None,
        back_ms: int | None = None,
        before_ms: int | None = None,
    ) -> Written[Moved]:
        """Put an older version back and hold auto-promotion; by default the newest older one tagged good."""

        def decide(state: RegistryState, cause: Cause) -> Change[Moved]:
            target = decisions.rollback_target(state, to=to, back_ms=back_ms, before_ms=before_ms, now_ms=cause.now_ms)
            return decisions.rollback(state, target, cause)

        return await self._change(decide, reason)

    async def hold(self, reason: str) -> Written[Held]:
        """Stop auto-promotion."""
        return await self._change(decisions.hold, reason)

    async def resume(self, reason: str = "") -> Written[Held]:
        """Let auto-promotion go on."""
        return await self._change(decisions.resume, reason)

    async def tag_good(self, *versions: int) -> tuple[int, ...]:
        """Tag versions as good: a rollback without a target goes to the newest of them. Returns those newly tagged."""
        return (await self._change(lambda state, cause: decisions.tag_good(state, versions, now_ms=cause.now_ms))).outcome

    async def tag_due(self, gate: SnapshotSettings) -> tuple[int, ...]:
        """Tag every version whose time has come, as far as this writer knows: writes nothing when none is due."""
        from aiokafka.errors import KafkaError

        async with self._lock:
            if self._log_is_open:
                try:
                    async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                        await self._log.read_to(self._read_to)
                except (KafkaError, TimeoutError) as error:
                    raise unreachable(self._kafka, error) from error
            due = decisions.due_good(self._log.state, _now_ms(), gate)
        return await self.tag_good(*due) if due else ()

    async def close(self) -> None:
        """Disconnect."""
        async with self._lock:
            await self._drop_producer()
            await self._log.close()
            self._log_is_open = False

    async def _change(self, decide: Decide[T], reason: str = "") -> Written[T]:
        """Run one operation to its end."""
        from aiokafka.errors import KafkaError

        cause = Cause(self._who, _now_ms(), reason, uuid.uuid4().hex)
        attempted: T | None = None
        failure: BaseException = TimeoutError()
        async with self._lock:
            for attempt in range(ATTEMPTS):
                if attempt:
                    await asyncio.sleep(random.uniform(0, min(MAX_BACKOFF_S, 0.05 * 2**attempt)))
                try:
                    async with asyncio.timeout(ATTEMPT_TIMEOUT_S):
                        change = await self._decided(decide, cause)
                        if change is None:
                            # An attempt that seemed to fail was committed after all.
                            assert attempted is not None
                            return Written(attempted, self._log.position, _now_ms())
                        if not change.records:
                            # Nothing is left to write. What an attempt that failed would have come to doesn't count: another
                            # writer may have come in between, and what is in the log is what is reported.
                            return Written(change.outcome, self._log.position, _now_ms())
                        attempted = change.outcome
                        await self._commit(change.records)
                        return Written(change.outcome, self._read_to, self._at_ms)
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
        if _is_fencing(failure):
            raise Fenced(
                f"{self._topic}: expected to change the registry within {ATTEMPTS} attempts, found another writer in "
                "between each time. Nothing was changed; run it again."
            ) from failure
        raise unreachable(self._kafka, failure) from failure

    async def _decided(self, decide: Decide[T], cause: Cause) -> Change[T] | None:
        """What to write, on a state that is certain to be the newest; None when it has been written already."""
        if self._producer is not None:
            await self._log.read_to(self._read_to)
            with contextlib.suppress(Refused):  # refused on a state that may be old: see 3 above
                change = decide(self._log.state, cause)
                if change.records:
                    return change
            await self._drop_producer()
        await self._take_over()
        if self._log.state.done(cause.operation) is not None:
            return None
        return decide(self._log.state, cause)

    async def _take_over(self) -> None:
        """Fence every other writer, then read what they have written. The order is what makes it right."""
        from aiokafka import AIOKafkaProducer

        producer = AIOKafkaProducer(
            **aiokafka_options(self._kafka),
            transactional_id=self._transactional_id,
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
        )
        self._producer = producer
        await producer.start()
        if not self._log_is_open:
            await self._log.open()
            self._log_is_open = True
        await self._log.catch_up()
        self._read_to = self._log.position

    async def _commit(self, records: Iterable[tuple[str, Record]]) -> None:
        """One transaction. Every send is awaited: aiokafka commits even when one has failed."""
        try:
            await self._producer.begin_transaction()
            sent = []
            for key, record in records:
                value = encode_record(record)
                future = await self._producer.send(self._topic, key=key.encode(), value=value, partition=0)
                future.add_done_callback(_retrieve)
                sent.append(future)
            written = [await future for future in sent]
            await self._producer.commit_transaction()
        except Exception as error:
            # Whatever it was, whether it was committed shows in the log once the producer is started again.
            raise _CommitFailed from error
        self._read_to = written[-1].offset + 1
        self._at_ms = written[-1].timestamp

    async def _drop_producer(self) -> None:
        """Let go of the producer; a transaction left open would hold back every reader until it times out."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        # What fails here is a producer that is fenced or cut off: the next one to start settles its transaction.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await producer.abort_transaction()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await producer.stop()
        _quieten(producer)


class _CommitFailed(Exception):
    """A transaction failed, or seemed to; the cause is aiokafka's error."""


def registry_transactional_id(names: TopicNames) -> str:
    """The one transactional id of all writers of one registry: `<prefix>headrace-registry`."""
    return f"{names.snapshots.removesuffix('snapshots')}headrace-registry"


def _is_fencing(error: BaseException) -> bool:
    from aiokafka import errors

    return isinstance(error, errors.ProducerFenced | errors.InvalidProducerEpoch | errors.InvalidTxnState)


def _quieten(producer: Any) -> None:
    """A fenced producer leaves its error in futures of its own that nobody can await; asyncio would print each of them."""
    batches = [batch for queue in producer._message_accumulator._batches.values() for batch in queue]
    for future in (producer._txn_manager._transaction_waiter, *(batch._drain_waiter for batch in batches)):
        if future is not None and future.done():
            _retrieve(future)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Look at a future's error, which asyncio would otherwise report as never retrieved."""
    if not future.cancelled():
        future.exception()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
