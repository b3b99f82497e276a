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
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple, overload

from state import decisions
from state.alias_decisions import AliasMoved, Tagged
from state.changes import Cause, Held, Moved, Undo
from state.errors import Refused, SnapshotCorrupt, SnapshotError
from state.gate_release import Released
from state.registry import RegistryState
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.errors import RegistryError
from stream.records.heartbeat import Heartbeat
from stream.registry.collect import Collected, CollectionPlan, collect, plan_collection
from stream.registry.heartbeat import Confirmation, Confirmations, HeartbeatReader
from stream.registry.log import read_registry
from stream.registry.reindex import Reindexing, plan_reindexing, reindex
from stream.registry.writer import RegistryWriter, Written
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["ChampionMoved", "Operations", "Plan", "PromoteRequest", "RollbackRequest", "Seen"]

# Longest wait for the scorers to confirm a rollback, when the request names none.
CONFIRM_MS = 10_000


@dataclass(frozen=True, slots=True)
class RollbackRequest:
    """An older version to put back. At most one of `to`, `back_ms` and `before_ms` is set.

    to          this version
    back_ms     the champion this long ago
    before_ms   the champion at this time (ms since epoch)
    (none)      the newest version older than the champion that is tagged good
    reason      why; it stays in the registry
    timeout_ms  longest wait for the scorers to confirm
    """

    reason: str
    to: int | None = None
    back_ms: int | None = None
    before_ms: int | None = None
    timeout_ms: int = CONFIRM_MS


@dataclass(frozen=True, slots=True)
class PromoteRequest:
    """A version to make champion.

    reason       why; it stays in the registry
    hold         also hold auto-promotion (True) or let it go on (False); None: leave it as it is
    hold_reason  why it is held
    timeout_ms   longest wait for the scorers to confirm; None: don't wait
    """

    version: int
    reason: str
    hold: bool | None = None
    hold_reason: str = ""
    timeout_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request would do to the registry as it is now.

    version, previous   the champion after it and before it
    held, held_already  whether auto-promotion would be held after it, and whether it is held now
    undo                what would restore the present champion; None when there is no champion now
    live                the scorers that would have to confirm
    """

    request: RollbackRequest | PromoteRequest
    version: int
    previous: int | None
    held: bool
    held_already: bool
    undo: Undo | None
    live: list[Heartbeat]


@dataclass(frozen=True, slots=True)
class ChampionMoved:
    """What a promotion or a rollback did.

    version, previous       the champion after it and before it
    held                    whether auto-promotion is held now
    undo                    what restores exactly what was before; `undo.command` is the command. None when there was no
                            champion before
    confirmed, unconfirmed  scorers that serve `version`, and the last heartbeats of those that didn't confirm in time. Both are
                            empty when no wait was asked for
    took_ms                 from the beginning of the operation to the last confirmation, or to the end of the wait
    """

    version: int
    previous: int | None
    held: bool
    undo: Undo | None
    confirmed: list[Confirmation]
    unconfirmed: list[Heartbeat]
    took_ms: float


class Seen(NamedTuple):
    """The registry, and the last heartbeat of every live scorer."""

    state: RegistryState
    live: list[Heartbeat]


class Operations:
    """Operations on one registry. Each computes its target once: an automatic promotion meanwhile can't move the target.

    Every method raises `NoAnswer` when Kafka can't be reached, `TopicError` when a topic is missing, and `RegistryError` when
    the rules don't allow the change. Methods that write also raise `Fenced` when other writers came in between at every
    attempt. Nothing was changed then, unless the error says otherwise.

    Args:
        who: who asks, for the registry: user@host.
        store: before anything is written, the version must be whole in this store, by names and sizes of its files. None: don't
            check.
    """

    def __init__(self, kafka: KafkaSettings, names: TopicNames, who: str, *, store: SnapshotStore | None = None) -> None:
        self._kafka, self._names, self._who, self._store = kafka, names, who, store

    async def look(self) -> Seen:
        """The registry, and what every live scorer reports. Writes nothing."""

        async def live() -> list[Heartbeat]:
            async with HeartbeatReader(self._kafka, self._names) as scorers:
                return await scorers.live()

        state, beats = await asyncio.gather(read_registry(self._kafka, self._names), live())
        return Seen(state, beats)

    async def plan(self, request: RollbackRequest | PromoteRequest) -> Plan:
        """Find out what a request would do. Writes nothing.

        Raises:
            SnapshotError: the version isn't whole in the store.
        """
        if isinstance(request, PromoteRequest) and request.timeout_ms is None:  # no scorer is waited for
            seen = Seen(await read_registry(self._kafka, self._names), [])
        else:
            seen = await self.look()
        cause = Cause(self._who, _now_ms(), request.reason, operation="plan")
        try:
            if isinstance(request, PromoteRequest):
                moved = decisions.promote(
                    seen.state, request.version, cause, hold=request.hold, hold_reason=request.hold_reason
                ).outcome
            else:
                moved = decisions.rollback(seen.state, _target(seen.state, request), cause).outcome
        except Refused as error:
            raise RegistryError(str(error)) from error
        await self._check_store(moved.version)
        held_already = seen.state.champion.hold
        return Plan(request, moved.version, moved.previous, moved.held, held_already, moved.undo, seen.live)

    async def promote(self, request: PromoteRequest, *, began: float | None = None) -> ChampionMoved:
        """Make a version champion.

        Args:
            began: `time.monotonic()` of the command, from which `took_ms` counts; now when not given.

        Raises:
            SnapshotError: the version isn't whole in the store.
        """
        began = time.monotonic() if began is None else began
        await self._check_store(request.version)

        async def write(writer: RegistryWriter) -> Written[Moved]:
            return await writer.promote(request.version, request.reason, hold=request.hold, hold_reason=request.hold_reason)

        if request.timeout_ms is not None:
            async with HeartbeatReader(self._kafka, self._names) as scorers:
                return await self._move(write, began, scorers, request.timeout_ms)
        return await self._move(write, began)

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
        async with HeartbeatReader(self._kafka, self._names) as scorers:
            if isinstance(what, Plan):
                target = what.version
            else:
                try:
                    target = _target(await read_registry(self._kafka, self._names), what)
                except Refused as error:
                    raise RegistryError(str(error)) from error
            await self._check_store(target)
            return await self._move(lambda writer: writer.rollback(target, request.reason), began, scorers, request.timeout_ms)

    async def hold(self, reason: str) -> Held:
        """Stop auto-promotion: new versions stay candidates."""
        async with self._writer() as writer:
            return (await writer.hold(reason)).outcome

    async def resume(self) -> Held:
        """Let auto-promotion go on with the next version that passes the gate."""
        async with self._writer() as writer:
            return (await writer.resume()).outcome

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
        await self._check_store(version)
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
        return await asyncio.to_thread(plan_collection, seen.state, self._whole_store, seen.live, settings)

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

    async def _check_store(self, version: int) -> None:
        """Raise SnapshotError if the version isn't whole in the store, so that scorers are never sent to it.

        Hashes aren't checked, since a rollback is urgent.
        """
        if self._store is None:
            return
        try:
            problems = await asyncio.to_thread(self._store.verify, version, hashes=False)
            if problems:
                raise SnapshotCorrupt(problems[0])
        except SnapshotError as error:
            raise type(error)(f"{error} Nothing was changed; --unchecked goes there all the same.") from error

    @asynccontextmanager
    async def _writer(self) -> AsyncIterator[RegistryWriter]:
        writer = RegistryWriter(self._kafka, self._names, who=self._who)
        try:
            yield writer
        finally:
            await writer.close()

    async def _move(
        self,
        change: Callable[[RegistryWriter], Awaitable[Written[Moved]]],
        began: float,
        scorers: HeartbeatReader | None = None,
        timeout_ms: int = 0,
    ) -> ChampionMoved:
        """Write a change of the champion; with `scorers`, wait for their confirmations."""
        from aiokafka.errors import KafkaError

        async with self._writer() as writer:
            written = await change(writer)
            moved = written.outcome
            waited = Confirmations([], [])
            if scorers is not None:
                try:
                    waited = await scorers.wait_for_confirmations(
                        written.position, moved.version, timeout_ms, follows=not moved.held, now_ms=written.at_ms
                    )
                except KafkaError as error:
                    undo = "none, there was no champion before" if moved.undo is None else moved.undo.command
                    raise RegistryError(
                        f"champion {moved.previous} → {moved.version}: written, but expected the scorers' heartbeats, found "
                        f"{error!r}. Whether all of them have followed isn't known. Undo: {undo}"
                    ) from error
            took_ms = round((time.monotonic() - began) * 1_000, 1)
        return ChampionMoved(moved.version, moved.previous, moved.held, moved.undo, waited.confirmed, waited.missing, took_ms)


def _target(state: RegistryState, request: RollbackRequest) -> int:
    return decisions.rollback_target(
        state, to=request.to, back_ms=request.back_ms, before_ms=request.before_ms, now_ms=_now_ms()
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
