"""What an operator does to a running system, for the command line and for other programs: look, roll back, undo."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from state.decisions import rollback_target
from state.errors import Refused
from state.registry import RegistryState
from stream.errors import RegistryError
from stream.records.heartbeat import Heartbeat
from stream.registry.heartbeat import Confirmation, HeartbeatReader
from stream.registry.log import read_registry
from stream.registry.writer import RegistryWriter
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["Rollback", "RollbackPlan", "look", "plan_rollback", "roll_back"]


@dataclass(frozen=True, slots=True)
class RollbackPlan:
    """What a rollback would do, found by looking only."""

    previous: int
    version: int
    held_already: bool
    live: list[Heartbeat]


@dataclass(frozen=True, slots=True)
class Rollback:
    """What a rollback did.

    `rollback_ms` is from the command to the last scorer's confirmation, or to giving up. `undo` is the command that brings
    back exactly what was before.
    """

    previous: int
    version: int
    held: bool
    confirmed: list[Confirmation]
    unconfirmed: list[Heartbeat]
    rollback_ms: float
    undo: str


async def look(kafka: KafkaSettings, names: TopicNames) -> tuple[RegistryState, list[Heartbeat]]:
    """The registry, and what every live scorer says of itself. Writes nothing.

    Raises:
        RegistryError: Kafka can't be reached.
    """

    async def live() -> list[Heartbeat]:
        async with HeartbeatReader(kafka, names) as scorers:
            return await scorers.live()

    state, beats = await asyncio.gather(read_registry(kafka, names), live())
    return state, beats


async def plan_rollback(
    kafka: KafkaSettings,
    names: TopicNames,
    *,
    to: int | None = None,
    back_ms: int | None = None,
    before_ms: int | None = None,
) -> RollbackPlan:
    """Find out which version a rollback would go to and which scorers would have to confirm it. Writes nothing.

    Args:
        to, back_ms, before_ms: at most one; see `state.decisions.rollback_target`.

    Raises:
        RegistryError: there is no such version, or Kafka can't be reached.
    """
    state, live = await look(kafka, names)
    version = _target(state, to, back_ms, before_ms)
    assert state.champion.version is not None
    return RollbackPlan(state.champion.version, version, state.champion.hold, live)


async def roll_back(
    kafka: KafkaSettings,
    names: TopicNames,
    *,
    who: str,
    reason: str,
    to: int | None = None,
    back_ms: int | None = None,
    before_ms: int | None = None,
    timeout_ms: int = 10_000,
    check: Callable[[int], object] | None = None,
    began: float | None = None,
) -> Rollback:
    """Put an older version back, hold auto-promotion, and wait until every live scorer serves it.

    Args:
        to, back_ms, before_ms: at most one; the newest older version tagged good when there is none.
        timeout_ms: how long to wait for the scorers.
        check: called with the version before anything is written; it raises to stop the rollback (a version that isn't
            whole in the store must not be what everyone is sent to).
        began: `time.monotonic()` of the command, from which `rollback_ms` counts; now when unset.

    Raises:
        RegistryError: there is no such version, or Kafka can't be reached; nothing was changed.
        Fenced: other writers were in the way at every attempt; nothing was changed.
    """
    from aiokafka.errors import KafkaError

    began = time.monotonic() if began is None else began
    writer = RegistryWriter(kafka, names, who=who)
    try:
        async with HeartbeatReader(kafka, names) as scorers:
            if check is not None:
                # The target is looked up first so that it can be checked. What is found is then named, so that an
                # automatic promotion in between can't move it.
                to = _target(await read_registry(kafka, names), to, back_ms, before_ms)
                back_ms = before_ms = None
                await asyncio.to_thread(check, to)
            written = await writer.rollback(reason, to=to, back_ms=back_ms, before_ms=before_ms)
            moved = written.outcome
            try:
                confirmed, missing = await scorers.wait_for_confirmations(
                    written.position, moved.version, timeout_ms, now_ms=written.at_ms
                )
            except KafkaError as error:
                raise RegistryError(
                    f"champion {moved.previous} → {moved.version}: written, but expected the scorers' heartbeats, found "
                    f"{error!r}. Whether all of them have followed isn't known. Undo: {moved.undo}"
                ) from error
            rollback_ms = round((time.monotonic() - began) * 1_000, 1)
    finally:
        await writer.close()
    assert moved.previous is not None and moved.undo is not None  # a rollback always leaves a champion behind
    return Rollback(
        previous=moved.previous,
        version=moved.version,
        held=moved.held,
        confirmed=confirmed,
        unconfirmed=missing,
        rollback_ms=rollback_ms,
        undo=moved.undo,
    )


def _target(state: RegistryState, to: int | None, back_ms: int | None, before_ms: int | None) -> int:
    try:
        now_ms = time.time_ns() // 1_000_000
        return rollback_target(state, to=to, back_ms=back_ms, before_ms=before_ms, now_ms=now_ms)
    except Refused as error:
        raise RegistryError(str(error)) from error
