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
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from state import alias_decisions, canary_decisions, decisions, gate_decisions, upkeep
from state.alias_decisions import AliasMoved, Tagged
from state.alias_records import Doomed
from state.canary import CanaryOutcome, Mode, Progress, Thresholds
from state.canary_decisions import CanaryChanged
from state.changes import Announcement, Cause, Change, Held, Moved, Rewinding
from state.errors import Refused, StaleEpoch
from state.gate_release import Released
from state.manifest import Manifest
from state.registry import KeyedRecord, RegistryState, encode_record
from state.rewind_decisions import rewound
from state.served_band import decision_of
from state.settings import SnapshotSettings
from state.upkeep import Reindexed, Retired
from stream.errors import Fenced, RegistryError
from stream.kafka.clients import aiokafka_options, unreachable
from stream.kafka.quick import started_quickly
from stream.kafka.transactional import dropped, is_fencing, retrieve
from stream.registry.log import ANSWER, RegistryLog
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

if TYPE_CHECKING:
    from aiokafka import AIOKafkaProducer

__all__ = ["RegistryWriter", "Written", "registry_transactional_id"]

logger = logging.getLogger(__name__)

# Attempts at one operation. An attempt fails when another writer's operation succeeded meanwhile, or Kafka is away.
ATTEMPTS = 8
# Longest wait before an attempt. The wait is random, so that two writers don't keep fencing each other in step.
MAX_BACKOFF_S = 1.0
# Limit for one attempt. The broker ends the open transaction of a dead process within TRANSACTION_TIMEOUT_MS.
ATTEMPT_TIMEOUT_S = 20.0
# A writer that is killed in the middle of a transaction holds back readers of the registry at most this long.
TRANSACTION_TIMEOUT_MS = 15_000

T = TypeVar("T")
Decide = Callable[[RegistryState, Cause], Change[T]]


@dataclass(frozen=True, slots=True)
class Written(Generic[T]):
    """A change that is in the log.

    `position` is the offset after its last record: a reader at that position has applied the change. `at_ms` is the timestamp
    of its last record: the broker's clock (ms since epoch), since the topic stamps records on arrival. When nothing had to be
    written, `position` is the end of the log and `at_ms` this machine's clock.
    """

    outcome: T
    position: int
    at_ms: int


class RegistryWriter:
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

    async def take_trainer_epoch(self, *, above: int = 0) -> int:
        """Take the next trainer epoch, and one above `above`. A trainer with an older one can no longer announce."""

        def decide(state: RegistryState, cause: Cause) -> Change[int]:
            return decisions.take_epoch(state, who=cause.who, now_ms=cause.now_ms, above=above)

        return (await self._change(decide)).outcome

    async def announce(self, manifest: Manifest, *, gate: SnapshotSettings) -> Announcement:
        """Enter a version, which must be whole in the store, and promote it if the gate lets it through."""

        def decide(state: RegistryState, cause: Cause) -> Change[Announcement]:
            return decisions.announce(
                state, manifest, settings=gate, who=cause.who, now_ms=cause.now_ms, operation=cause.operation
            )

        return (await self._change(decide)).outcome

    async def promote(self, version: int, reason: str, *, hold: bool | None = None, hold_reason: str = "") -> Written[Moved]:
        """Make a version champion. `hold` also holds auto-promotion (True) or lets it go on (False)."""
        return await self._change(
            lambda state, cause: decisions.promote(state, version, cause, hold=hold, hold_reason=hold_reason), reason
        )

    async def rollback(self, target: int, reason: str, rewinding: Rewinding | None = None) -> Written[Moved]:
        """Put an older version back and hold auto-promotion. With `rewinding`, send the trainer back, too."""

        def decide(state: RegistryState, cause: Cause) -> Change[Moved]:
            skipped = () if rewinding is None else rewinding.signed(cause)
            return decisions.rollback(state, target, cause, rewind=rewinding is not None, skipped=skipped)

        return await self._change(decide, reason)

    async def rollback_by_itself(self, target: int, reason: str, *, under: str) -> Moved | None:
        """Put an older version back, unless somebody has decided already: then None is returned.

        That is so if auto-promotion is held, or if `under` isn't the last decision any more (`state.served_band.decision_of`).
        """

        def decide(state: RegistryState, cause: Cause) -> Change[Moved | None]:
            if state.champion.hold or decision_of(state.champion) != under:
                return Change((), None)
            change = decisions.rollback(state, target, cause)
            return Change(change.records, change.outcome)

        return (await self._change(decide, reason)).outcome

    async def rewound(self, operation: str, *, epoch: int, chain: str, up_to: int | None = None) -> bool:
        """Say that this trainer has gone back, as an operation asked for. Returns whether that was still to be done."""

        def decide(state: RegistryState, cause: Cause) -> Change[bool]:
            return rewound(state, operation, epoch=epoch, chain=chain, up_to=up_to, who=cause.who, now_ms=cause.now_ms)

        return (await self._change(decide)).outcome

    async def hold(self, reason: str) -> Written[Held]:
        """Stop auto-promotion."""
        return await self._change(decisions.hold, reason)

    async def resume(self, reason: str = "") -> Written[Held]:
        """Let auto-promotion go on."""
        return await self._change(decisions.resume, reason)

    async def release(self, reason: str) -> Written[Released]:
        """Release what the gate withholds."""
        return await self._change(gate_decisions.release, reason)

    async def set_alias(self, name: str, version: int, reason: str) -> Written[AliasMoved]:
        """Point an alias other than `champion` at a version."""
        return await self._change(lambda state, cause: alias_decisions.set_alias(state, name, version, cause), reason)

    async def remove_alias(self, name: str, reason: str) -> Written[AliasMoved]:
        """Remove an alias; its history stays."""
        return await self._change(lambda state, cause: alias_decisions.remove_alias(state, name, cause), reason)

    async def tag(
        self, version: int, values: Mapping[str, str], reason: str, *, remove: Collection[str] = ()
    ) -> Written[Tagged]:
        """Put tags on a version, or change or remove them."""

        def decide(state: RegistryState, cause: Cause) -> Change[Tagged]:
            return alias_decisions.tag(state, version, values, cause, remove=remove)

        return await self._change(decide, reason)

    async def begin_canary(
        self, mode: Mode, version: int, share: float, thresholds: Thresholds, reason: str
    ) -> Written[CanaryChanged]:
        """Give a version a share of the requests."""

        def decide(state: RegistryState, cause: Cause) -> Change[CanaryChanged]:
            return canary_decisions.begin_canary(state, mode, version, share, thresholds, cause)

        return await self._change(decide, reason)

    async def end_canary(self, outcome: CanaryOutcome, reason: str, *, of: str = "") -> Written[CanaryChanged]:
        """End the shadow or canary, if it is the one that the operation `of` began. Promoted, its version becomes champion."""
        return await self._change(lambda state, cause: canary_decisions.end_canary(state, outcome, cause, of=of), reason)

    async def note_canary(self, of: str, progress: Progress) -> Written[CanaryChanged]:
        """Note what is known of the shadow or canary that the operation `of` began."""
        return await self._change(lambda state, _: canary_decisions.note_progress(state, of, progress))

    async def retire(
        self,
        choose: upkeep.Choose,
        reason: str,
        *,
        rests: Collection[Doomed] = (),
        ended: str = "",
    ) -> Written[Retired]:
        """Take away the records of versions whose files are then to be deleted; see `stream.registry.collect`."""

        def decide(state: RegistryState, cause: Cause) -> Change[Retired]:
            return upkeep.retire(state, choose, cause, rests=rests, ended=ended)

        return await self._change(decide, reason)

    async def reindex(
        self, manifests: Mapping[int, Manifest], reason: str, *, champion: int | None = None
    ) -> Written[Reindexed]:
        """Enter versions of the store that the registry doesn't know."""
        return await self._change(lambda state, cause: upkeep.reindex(state, manifests, cause, champion=champion), reason)

    async def tag_good(self, *versions: int) -> tuple[int, ...]:
        """Tag versions as good: a rollback that names no version goes to the newest of them. Returns those newly tagged."""
        return (await self._change(lambda state, cause: decisions.tag_good(state, versions, now_ms=cause.now_ms))).outcome

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

    async def _change(self, decide: Decide[T], reason: str = "") -> Written[T]:
        """Run one operation to its end."""
        from aiokafka.errors import KafkaError

        cause = Cause(self._who, self._now_ms(), reason, uuid.uuid4().hex)
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
                            # An attempt that seemed to fail did take effect.
                            assert attempted is not None
                            return Written(attempted, self._log.position, self._now_ms())
                        if not change.records:
                            # There is nothing to write. The outcome is that of the log as it is, not that of an earlier,
                            # failed attempt: another writer may have come in between.
                            return Written(change.outcome, self._log.position, self._now_ms())
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
        if is_fencing(failure):
            raise Fenced(
                f"{self._topic}: expected to change the registry within {ATTEMPTS} attempts, found another writer in "
                "between each time. Nothing was changed; run it again."
            ) from failure
        raise unreachable(self._kafka, ANSWER, failure) from failure

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

    async def _commit(self, records: Iterable[KeyedRecord]) -> None:
        """Write records in one transaction. Every send is awaited, since aiokafka also commits when one has failed."""
        try:
            await self._producer.begin_transaction()
            sent = []
            for key, record in records:
                value = encode_record(record)
                future = await self._producer.send(self._topic, key=key.encode(), value=value, partition=0)
                future.add_done_callback(retrieve)
                sent.append(future)
            written = [await future for future in sent]
            await self._producer.commit_transaction()
        except Exception as error:
            # Whatever the error is: once the producer is started again, the log shows whether the commit took effect.
            raise _CommitFailed from error
        self._read_to = written[-1].offset + 1
        self._at_ms, self._at_s = written[-1].timestamp, time.monotonic()

    def _now_ms(self) -> int:
        """Now by the broker's clock, as this writer's last change showed it; before the first change by this machine's.

        So a writer that lives long, a trainer's, tags and promotes by the clock that all share, also when its own one jumps.
        """
        if not self._at_ms:
            return time.time_ns() // 1_000_000
        return self._at_ms + round((time.monotonic() - self._at_s) * 1_000)

    async def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await dropped(producer)


class _CommitFailed(Exception):
    """A transaction failed, or seemed to. The cause is aiokafka's error."""


def registry_transactional_id(names: TopicNames) -> str:
    """The transactional id that all writers of one registry share: `<prefix>headrace-registry`."""
    return f"{names.snapshots.removesuffix('snapshots')}headrace-registry"
