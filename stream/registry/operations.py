"""What an operator does to a running system: look, plan, promote, roll back, hold, resume, undo; aliases, tags, upkeep.

The command line, the demo and other programs use `Operations` for all of it:

```python
operations = Operations(settings.kafka, names, who="ann@host", store=SnapshotStore(settings.snapshots))
plan = await operations.plan(RollbackRequest(reason="CTR fell", back_ms=600_000))    # writes nothing
done = await operations.rollback(plan)                                               # exactly what was planned
done.undo.command                                                                    # headrace snapshot promote 41 …
await operations.undo(done)                                                          # the same, from a program
```
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar, overload

from state import decisions
from state.alias_decisions import AliasMoved, Tagged
from state.changes import Cause, Held, Moved, Rewinding
from state.errors import Refused
from state.gate_release import Released
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.errors import RegistryError, Unsettled
from stream.records.heartbeat import Heartbeat
from stream.registry.checking import Check, check_store, checked_meanwhile, require_right_clock
from stream.registry.collect import Collected, CollectionPlan, collect, plan_collection
from stream.registry.gone_back import gone_back_in_time
from stream.registry.heartbeat import Confirmations, HeartbeatReader, Silent
from stream.registry.log import read_registry
from stream.registry.reindex import Reindexing, plan_reindexing, reindex
from stream.registry.requests import ChampionMoved, Goal, Plan, PromoteRequest, Resumed, RollbackRequest, Seen, When
from stream.registry.skipping import resolve_rewinding
from stream.registry.writer import RegistryWriter
from stream.registry.writes import Written
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["ChampionMoved", "Operations", "Plan", "PromoteRequest", "RollbackRequest", "Seen"]

log = logging.getLogger(__name__)

T = TypeVar("T")


class Operations:
    """Operations on one registry. Each computes its target once: an automatic promotion meanwhile can't move the target.

    Every method raises `NoAnswer` when Kafka can't be reached, `TopicError` when a topic is missing, and `RegistryError` when
    the rules don't allow the change. Methods that write also raise `Fenced` when other writers came in between at every
    attempt. Nothing was changed then, unless the error says otherwise, as `Unsettled` does.

    Args:
        who: who asks, for the registry: user@host.
        store: before anything is written, the version must be whole in this store: by names and sizes of its files, and before
            a rollback also by the hashes of those that scorers read, where there is time (`stream.registry.checking`). None:
            don't check.
    """

    def __init__(self, kafka: KafkaSettings, names: TopicNames, who: str, *, store: SnapshotStore | None = None) -> None:
        self._kafka, self._names, self._who, self._store = kafka, names, who, store

    async def look(self) -> Seen:
        """The registry, and what every live scorer reports. Writes nothing."""

        async def scorers() -> tuple[list[Heartbeat], list[Silent], int]:
            async with HeartbeatReader(self._kafka, self._names) as reader:
                live, now_ms = await reader.live(), await reader.now_ms()
                return live, reader.silent(now_ms), now_ms

        state, seen = await asyncio.gather(read_registry(self._kafka, self._names), scorers())
        return Seen(state, *seen)

    async def plan(self, request: RollbackRequest | PromoteRequest) -> Plan:
        """Find out what a request would do. Writes nothing.

        Raises:
            SnapshotError: the version isn't whole in the store.
        """
        if isinstance(request, PromoteRequest) and request.timeout_ms is None:  # no scorer is waited for
            seen = Seen(await read_registry(self._kafka, self._names), [], [], time.time_ns() // 1_000_000)
        else:
            seen = await self.look()
        made = When(seen.now_ms, time.monotonic())
        cause = Cause(self._who, seen.now_ms, request.reason, operation="plan")
        rewinding = None
        try:
            if isinstance(request, PromoteRequest):
                moved = decisions.promote(
                    seen.state, request.version, cause, hold=request.hold, hold_reason=request.hold_reason
                ).outcome
            else:
                target = request.target(seen.state, seen.now_ms)
                rewinding = await self._rewinding(target, request, seen.now_ms)
                moved = decisions.rollback(seen.state, target, cause, rewind=request.rewind).outcome
        except Refused as error:
            raise RegistryError(str(error)) from error
        checked = await check_store(self._store, moved.version, hashes=isinstance(request, RollbackRequest))
        held_already = seen.state.champion.hold
        return Plan(
            request,
            moved.version,
            moved.previous,
            moved.held,
            held_already,
            moved.undo,
            seen.live,
            skipped=None if rewinding is None else rewinding.skipped,
            offsets=await self._offsets(moved.version) if rewinding is not None else {},
            checked=checked,
            made=made,
        )

    async def promote(self, request: PromoteRequest, *, began: float | None = None) -> ChampionMoved:
        """Make a version champion.

        Args:
            began: `time.monotonic()` of the command, from which `took_ms` counts; now when not given.

        Raises:
            SnapshotError: the version isn't whole in the store.
        """
        began = time.monotonic() if began is None else began
        await check_store(self._store, request.version)

        def promoted(writer: RegistryWriter) -> Awaitable[Written[Moved]]:
            return writer.promote(request.version, request.reason, hold=request.hold, hold_reason=request.hold_reason)

        if request.timeout_ms is not None:
            async with self._connected(_nothing) as here:
                return await self._moved(promoted(here.writer), began, here.scorers, request.timeout_ms)
        async with self._writer() as writer:
            return await self._moved(promoted(writer), began)

    async def rollback(self, what: RollbackRequest | Plan, *, began: float | None = None) -> ChampionMoved:
        """Put an older version back, hold auto-promotion, and wait until every live scorer serves that version.

        Args:
            what: a request, or the plan that was made of one: then the planned version is put back, whatever has become
                champion since.
            began: `time.monotonic()` of the command, from which `took_ms` counts; now when not given.

        Raises:
            SnapshotError: the version isn't whole in the store.
        """
        began = time.monotonic() if began is None else began
        request = what.request if isinstance(what, Plan) else what
        if not isinstance(request, RollbackRequest):
            raise TypeError(f"expected a plan of a RollbackRequest, found one of {request!r}. Call promote with the request.")
        known = what.version if isinstance(what, Plan) else request.to
        async with (
            checked_meanwhile(self._store, known) as check,
            self._connected(lambda writer: self._goal(writer, what, request, check)) as here,
        ):
            goal = here.answer
            written = here.writer.rollback(goal.target, request.reason, goal.rewinding)
            try:
                done = await self._moved(written, began, here.scorers, request.timeout_ms)
            except Unsettled as error:
                raise Unsettled(f"{error} Then run `{goal.command}`: it does no harm if it did take effect.") from error
        return done if goal.rewinding is None else replace(done, skipped=goal.rewinding.skipped)

    async def _goal(self, writer: RegistryWriter, what: RollbackRequest | Plan, request: RollbackRequest, check: Check) -> Goal:
        """Where a rollback goes, checked in the store."""
        now_ms = await writer.kafka_ms() if request.goes_by_time else 0
        if isinstance(what, Plan):
            require_right_clock(what, now_ms)
            goal = Goal(what.version, Rewinding(what.skipped or ()) if request.rewind else None)
        else:
            try:
                target = request.target(writer.state, now_ms)
                goal = Goal(target, await self._rewinding(target, request, now_ms))
            except Refused as error:
                raise RegistryError(str(error)) from error
        await check(goal.target)
        return goal

    async def hold(self, reason: str) -> Held:
        """Stop auto-promotion: new versions stay candidates."""
        async with self._writer() as writer:
            return (await writer.hold(reason)).outcome

    async def resume(self) -> Held:
        """Let auto-promotion go on with the next version that passes the gate."""
        async with self._writer() as writer:
            return (await writer.resume()).outcome

    async def resume_everywhere(self, timeout_ms: int, *, began: float | None = None) -> Resumed:
        """Let auto-promotion go on, and wait until every live scorer follows the champion's chain again.

        Args:
            timeout_ms: longest wait.
            began: as for `rollback`.
        """
        began = time.monotonic() if began is None else began
        async with self._connected(_nothing) as here:
            written = await here.writer.resume()
            waited, silent = Confirmations([], []), list[Silent]()
            if written.outcome.changed:
                version = here.writer.state.champion.version
                waited = await here.scorers.wait_for_confirmations(
                    written.position, -1 if version is None else version, timeout_ms, follows=True, now_ms=written.at_ms
                )
                silent = here.scorers.silent(written.at_ms)
            took_ms = round((time.monotonic() - began) * 1_000, 1)
        return Resumed(written.outcome, waited.confirmed, waited.missing, took_ms, tuple(silent))

    async def release(self, reason: str) -> Released:
        """Release what the gate withholds: the trainer publishes one delta of all that has changed."""
        async with self._writer() as writer:
            return (await writer.release(reason)).outcome

    @overload
    async def undo(self, done: ChampionMoved, *, timeout_ms: int | None = None) -> ChampionMoved: ...

    @overload
    async def undo(self, done: Held) -> Held: ...

    async def undo(self, done: ChampionMoved | Held, *, timeout_ms: int | None = None) -> ChampionMoved | Held:
        """Restore what was before an operation, as its undo command does.

        Args:
            timeout_ms: longest wait for the scorers to confirm; None: don't wait.

        Raises:
            RegistryError: the operation changed nothing, or there was no champion before it.
            SnapshotError: the version isn't whole in the store.
        """
        undo = done.undo
        if undo is None:
            raise RegistryError(
                "undo: expected an operation that changed something and had a champion before it, found another. Nothing was "
                "changed."
            )
        if undo.version is not None:
            return await self.promote(PromoteRequest(undo.version, undo.reason, undo.hold, undo.hold_reason, timeout_ms))
        return await (self.hold(undo.hold_reason) if undo.hold else self.resume())

    async def set_alias(self, name: str, version: int, reason: str) -> AliasMoved:
        """Point an alias at a version. The champion is moved by `promote` and `rollback` instead.

        Raises:
            SnapshotError: the version isn't whole in the store.
        """
        await check_store(self._store, version)
        async with self._writer() as writer:
            return (await writer.set_alias(name, version, reason)).outcome

    async def remove_alias(self, name: str, reason: str) -> AliasMoved:
        """Remove an alias; its history stays."""
        async with self._writer() as writer:
            return (await writer.remove_alias(name, reason)).outcome

    async def tag(self, version: int, values: Mapping[str, str], reason: str, *, remove: Collection[str] = ()) -> Tagged:
        """Put tags on a version, or change or remove them. A version with a tag is never deleted."""
        async with self._writer() as writer:
            return (await writer.tag(version, values, reason, remove=remove)).outcome

    async def plan_gc(self, settings: SnapshotSettings) -> CollectionPlan:
        """Find out which versions `gc` would delete. Writes nothing."""
        seen = await self.look()
        return await asyncio.to_thread(plan_collection, seen.state, self._whole_store, seen.live, settings, seen.now_ms)

    async def gc(self, settings: SnapshotSettings, reason: str) -> Collected:
        """Delete versions that nothing needs (`stream.registry.collect`).

        Raises:
            SnapshotError: the store failed; what it hasn't deleted goes with the next `gc`.
        """
        seen = await self.look()
        async with self._writer() as writer:
            return await collect(writer, self._whole_store, settings, seen.state, seen.live, reason=reason)

    async def reindex(self, reason: str, *, champion: int | None = None, dry_run: bool = False) -> Reindexing:
        """Enter versions that are whole in the store and that the registry doesn't know.

        Args:
            champion: the version to make champion if the registry knows no version; None: the one that live scorers answer
                with; 0: none.
            dry_run: only find out what would be entered, and write nothing.

        Raises:
            SnapshotError: the store can't be read.
        """
        seen = await self.look()
        plan, manifests = await asyncio.to_thread(plan_reindexing, seen.state, self._whole_store, seen.live, champion)
        if dry_run:
            return plan
        async with self._writer() as writer:
            return await reindex(writer, plan, manifests, reason)

    @property
    def _whole_store(self) -> SnapshotStore:
        if self._store is None:
            raise TypeError("expected a store, for an operation that reads or deletes versions, found None.")
        return self._store

    async def _rewinding(self, target: int, request: RollbackRequest, now_ms: int) -> Rewinding | None:
        """What a request asks of the trainer, resolved to offsets. Raises Refused."""
        if not request.rewind:
            return None
        return await resolve_rewinding(self._kafka, self._names, self._store, target, request.skip, now_ms)

    async def _offsets(self, version: int) -> dict[str, int]:
        """From where a version learns on, by partition of `examples`; empty without a store."""
        store = self._store
        return {} if store is None else (await asyncio.to_thread(store.manifest, version)).offsets

    @asynccontextmanager
    async def _writer(self) -> AsyncIterator[RegistryWriter]:
        writer = RegistryWriter(self._kafka, self._names, who=self._who)
        try:
            yield writer
        finally:
            await writer.close()

    @asynccontextmanager
    async def _connected(self, ask: Callable[[RegistryWriter], Awaitable[T]]) -> AsyncIterator[_Connected[T]]:
        """Connect to the registry and to the scorers at the same time, and meanwhile ask something of the registry as read."""

        async def asked(writer: RegistryWriter) -> T:
            await writer.connect()
            return await ask(writer)

        async with AsyncExitStack() as stack:
            writer = await stack.enter_async_context(self._writer())
            opening = stack.enter_async_context(HeartbeatReader(self._kafka, self._names))
            scorers, answer = await asyncio.gather(opening, asked(writer), return_exceptions=True)
            if isinstance(answer, BaseException):
                raise answer
            if isinstance(scorers, BaseException):
                raise scorers
            yield _Connected(writer, scorers, answer)

    async def _moved(
        self, change: Awaitable[Written[Moved]], began: float, scorers: HeartbeatReader | None = None, timeout_ms: int = 0
    ) -> ChampionMoved:
        """Write a change of the champion; with `scorers`, wait for their confirmations."""
        from aiokafka.errors import KafkaError

        written = await change
        written_s = time.monotonic()
        moved = written.outcome
        waited, gone_back, trainer_ms = Confirmations([], []), None, None
        if scorers is not None:
            confirmed = scorers.wait_for_confirmations(
                written.position, moved.version, timeout_ms, follows=not moved.held, alone=moved.alone, now_ms=written.at_ms
            )
            try:
                if moved.rewind is None:
                    waited = await confirmed
                else:
                    waited, gone_back = await asyncio.gather(
                        confirmed, gone_back_in_time(self._kafka, self._names, moved.rewind, timeout_ms)
                    )
            except KafkaError as error:
                undo = "none, there was no champion before" if moved.undo is None else moved.undo.command
                raise RegistryError(
                    f"champion {moved.previous} → {moved.version}: written, but expected the scorers' heartbeats, found "
                    f"{error!r}. Whether all of them have followed isn't known. Undo: {undo}"
                ) from error
        # From the beginning to the last confirmation. The trainer is waited for at the same time, and may take longer.
        waits = [float(timeout_ms)] if waited.missing else [0.0, *(each.after_ms for each in waited.confirmed)]
        took_ms = round((written_s - began) * 1_000 + max(waits), 1)
        if gone_back is not None:
            trainer_ms = round((time.monotonic() - began) * 1_000, 1)
        return ChampionMoved(
            moved.version,
            moved.previous,
            moved.held,
            moved.undo,
            waited.confirmed,
            waited.missing,
            took_ms,
            silent=() if scorers is None else tuple(scorers.silent(written.at_ms)),
            trainer=gone_back,
            trainer_ms=trainer_ms,
        )


@dataclass(frozen=True, slots=True)
class _Connected(Generic[T]):
    """A writer that has read the registry, a reader of heartbeats, and what was asked of the registry meanwhile."""

    writer: RegistryWriter
    scorers: HeartbeatReader
    answer: T


async def _nothing(writer: RegistryWriter) -> None:
    """For `_connected`, where nothing is asked."""
