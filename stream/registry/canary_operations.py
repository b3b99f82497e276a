"""A shadow or canary, by hand: begin it, stop it, watch it. The trainer ends it by itself (`stream.trainer.canary`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from state import canary_decisions
from state.canary import Mode, Thresholds
from state.canary_decisions import CanaryChanged
from state.changes import Cause
from state.errors import Refused
from stream.errors import RegistryError
from stream.records.heartbeat import Heartbeat
from stream.registry.checking import check_store
from stream.registry.follower import RegistryFollower
from stream.registry.heartbeat import HeartbeatReader
from stream.registry.log import read_registry
from stream.registry.operations import Operations, Seen

__all__ = ["CanaryOperations", "CanaryPlan", "CanaryRequest", "CanaryStopped"]

# How often heartbeats and registry are looked at.
LOOK_S = 0.1
WATCH_S = 0.5


@dataclass(frozen=True, slots=True)
class CanaryRequest:
    """A version to try on a share of the requests, as in `state.canary.Canary`."""

    mode: Mode
    version: int
    share: float
    reason: str
    thresholds: Thresholds


@dataclass(frozen=True, slots=True)
class CanaryPlan:
    """What a request would do: the record that it would write, and the scorers that would take part."""

    change: CanaryChanged
    champion: int | None
    live: list[Heartbeat]


@dataclass(frozen=True, slots=True)
class CanaryStopped:
    """The record after a stop.

    confirmed, unconfirmed  scorers that have said that no candidate takes part any more, and the last heartbeats of the others
    took_ms                 from the beginning of the operation to the last confirmation, or to the end of the wait
    """

    change: CanaryChanged
    confirmed: list[str]
    unconfirmed: list[Heartbeat]
    took_ms: float


class CanaryOperations(Operations):
    """`Operations` on the shadow or canary. The same errors are raised."""

    async def plan_canary(self, request: CanaryRequest) -> CanaryPlan:
        """Find out what a request would do. Writes nothing.

        Raises:
            SnapshotError: the version isn't whole in the store.
        """
        seen = await self.look()
        cause = Cause(self._who, seen.now_ms, request.reason, operation="plan")
        try:
            change = canary_decisions.begin_canary(
                seen.state, request.mode, request.version, request.share, request.thresholds, cause
            )
        except Refused as error:
            raise RegistryError(str(error)) from error
        await check_store(self._store, request.version)
        return CanaryPlan(change.outcome, seen.state.champion.version, seen.live)

    async def begin_canary(self, request: CanaryRequest) -> CanaryChanged:
        """Give a version a share of the requests.

        Raises:
            SnapshotError: the version isn't whole in the store.
        """
        await check_store(self._store, request.version)
        async with self._writer() as writer:
            written = await writer.begin_canary(
                request.mode, request.version, request.share, request.thresholds, request.reason
            )
            return written.outcome

    async def stop_canary(self, reason: str, *, timeout_ms: int) -> CanaryStopped:
        """End the trial, and wait until no live scorer asks the candidate any more."""
        began = time.monotonic()
        async with HeartbeatReader(self._kafka, self._names) as scorers, self._writer() as writer:
            written = await writer.end_canary("stopped", reason)
            while True:
                live = await scorers.live(now_ms=written.at_ms)
                done = [beat for beat in live if beat.registry_offset >= written.position and beat.candidate is None]
                took_ms = round((time.monotonic() - began) * 1_000, 1)
                # Heartbeats confirm what was written. Where nothing was, there is nothing to wait for.
                if len(done) == len(live) or took_ms >= timeout_ms or not written.outcome.changed:
                    confirmed = [beat.worker for beat in done]
                    missing = [beat for beat in live if beat.worker not in confirmed]
                    missing += [beat for beat, _ in scorers.silent(written.at_ms) if beat.candidate is not None]
                    return CanaryStopped(written.outcome, confirmed, missing if written.outcome.changed else [], took_ms)
                await asyncio.sleep(LOOK_S)

    async def watch(self) -> AsyncGenerator[Seen]:
        """The registry and the live scorers, now and whenever either has changed."""
        follower = RegistryFollower(self._kafka, self._names)
        await read_registry(self._kafka, self._names)  # raises what is wrong with the topic, before anything follows it
        await follower.start()
        try:
            async with HeartbeatReader(self._kafka, self._names) as scorers:
                while True:
                    live = await scorers.live()
                    yield Seen(follower.state, live, scorers.silent(), await scorers.now_ms())
                    await asyncio.sleep(WATCH_S)
        finally:
            await follower.close()
