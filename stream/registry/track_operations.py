"""What an operator does with tracks: look at them, give one a share of the requests, let another one serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from state import track_decisions
from state.changes import Cause
from state.errors import Refused
from state.registry import RegistryState
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from state.track_decisions import Promoted, Shared, tracks_by_number
from state.tracks import MAIN, Track
from stream.errors import RegistryError, TopicError
from stream.records.heartbeat import Heartbeat
from stream.registry.checking import check_store
from stream.registry.heartbeat import HeartbeatReader
from stream.registry.log import read_registry
from stream.registry.writer import RegistryWriter
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["TrackOperations", "TrackPlan", "TrackPromoted", "TrackShared", "TracksSeen", "serving_track"]

# How often heartbeats are looked at while scorers are waited for.
LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class TracksSeen:
    """The registry of `main`, those of the other tracks, and the live scorers.

    states   by track, `main` included. A track whose topic is missing isn't in it
    """

    main: RegistryState
    states: dict[str, RegistryState]
    live: list[Heartbeat]

    @property
    def tracks(self) -> list[Track]:
        """All tracks, in the order of their first starts."""
        return tracks_by_number(self.main)


@dataclass(frozen=True, slots=True)
class TrackPlan:
    """What a promotion would do. `version` is the champion of the track's own registry."""

    promoted: Promoted
    version: int
    live: list[Heartbeat]


@dataclass(frozen=True, slots=True)
class _Waited:
    """Who has confirmed, the last heartbeats of the others, and the time from the command's beginning."""

    confirmed: list[str] = field(default_factory=list)
    unconfirmed: list[Heartbeat] = field(default_factory=list)
    took_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class TrackPromoted(_Waited):
    """A track that serves now."""

    promoted: Promoted = field(kw_only=True)
    version: int = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class TrackShared(_Waited):
    """A track after a change of its share. Scorers are waited for where it has none any more."""

    shared: Shared = field(kw_only=True)


async def serving_track(kafka: KafkaSettings, names: TopicNames) -> str:
    """The track that serves. Raises as `read_registry`."""
    return (await read_registry(kafka, names.of_track(MAIN))).serving.track


class TrackOperations:
    """Operations on tracks. The same errors are raised as by `stream.registry.operations.Operations`.

    Args:
        who: who asks, for the registry: user@host.
        snapshots: where the stores are; None: don't check that a version is whole before its track serves.
    """

    def __init__(self, kafka: KafkaSettings, names: TopicNames, who: str, *, snapshots: SnapshotSettings | None) -> None:
        self._kafka, self._names, self._who, self._snapshots = kafka, names.of_track(MAIN), who, snapshots

    async def look(self) -> TracksSeen:
        """Read the registries and the heartbeats. Writes nothing."""

        async def live() -> list[Heartbeat]:
            async with HeartbeatReader(self._kafka, self._names, every_track=True) as scorers:
                return await scorers.live()

        main, beats = await asyncio.gather(read_registry(self._kafka, self._names), live())
        others = [track.name for track in tracks_by_number(main) if track.name != MAIN]
        found = await asyncio.gather(*map(self._state_of, others))
        states = {name: state for name, state in zip(others, found, strict=True) if state is not None}
        return TracksSeen(main, {MAIN: main, **states}, beats)

    async def _state_of(self, track: str) -> RegistryState | None:
        try:
            return await read_registry(self._kafka, self._names.of_track(track))
        except TopicError:
            return None

    async def plan_promotion(self, name: str, reason: str) -> TrackPlan:
        """Find out what a promotion would do. Writes nothing.

        Raises:
            SnapshotError: the track's champion isn't whole in its store.
        """
        seen = await self.look()
        try:
            promoted = track_decisions.promote_track(seen.main, name, self._cause(reason)).outcome
        except Refused as error:
            raise RegistryError(str(error)) from error
        return TrackPlan(promoted, await self._ready(name, seen.states.get(name)), seen.live)

    async def _ready(self, name: str, state: RegistryState | None) -> int:
        """The version that scorers would begin with."""
        version = None if state is None else state.champion.version
        if state is None or version is None:
            raise RegistryError(
                f"track {name}: expected a version that its gate has let through, found none. `headrace snapshot --track "
                f"{name} list` shows its versions and what they wait for."
            )
        if self._snapshots is None:
            return version
        if state.withheld is not None and not state.champion.hold:
            raise RegistryError(
                f"track {name}: expected a gate that lets its versions through, found that it withholds them: "
                f"{state.withheld.reason}. `headrace snapshot --track {name} gate` shows more; --unchecked promotes it all the "
                "same."
            )
        await check_store(SnapshotStore(self._snapshots.on_track(name)), version)
        return version

    async def promote(self, name: str, reason: str, *, timeout_ms: int) -> TrackPromoted:
        """Let another track serve, and wait until every live scorer answers with it.

        Raises:
            SnapshotError: the track's champion isn't whole in its store.
        """
        began = time.monotonic()
        version = (await self.plan_promotion(name, reason)).version
        async with HeartbeatReader(self._kafka, self._names, every_track=True) as scorers:
            writer = RegistryWriter(self._kafka, self._names, who=self._who)
            try:
                written = await writer.promote_track(name, reason)
            finally:
                await writer.close()

            def follows(beat: Heartbeat) -> bool:
                return beat.track == name and beat.main_offset >= written.position and not beat.stale

            waited = await _wait(scorers, follows, began, timeout_ms, written.at_ms)
        return TrackPromoted(waited.confirmed, waited.unconfirmed, waited.took_ms, promoted=written.outcome, version=version)

    async def share(self, name: str, share: float, reason: str, *, timeout_ms: int) -> TrackShared:
        """Let a track score a share of the requests. With a share of 0, wait until no live scorer asks it any more."""
        began = time.monotonic()
        async with HeartbeatReader(self._kafka, self._names, every_track=True) as scorers:
            writer = RegistryWriter(self._kafka, self._names, who=self._who)
            try:
                written = await writer.share_requests(name, share, reason)
            finally:
                await writer.close()
            waited = _Waited(took_ms=round((time.monotonic() - began) * 1_000, 1))
            if not share and written.outcome.undo is not None:

                def without(beat: Heartbeat) -> bool:
                    return all(shadow.track != name for shadow in beat.shadows)

                waited = await _wait(scorers, without, began, timeout_ms, written.at_ms)
        return TrackShared(waited.confirmed, waited.unconfirmed, waited.took_ms, shared=written.outcome)

    def _cause(self, reason: str) -> Cause:
        return Cause(self._who, time.time_ns() // 1_000_000, reason, operation="plan")


async def _wait(
    scorers: HeartbeatReader, confirms: Callable[[Heartbeat], bool], began: float, timeout_ms: int, at_ms: int | None
) -> _Waited:
    """Wait until every live scorer's heartbeat confirms, at most this long.

    Args:
        at_ms: when the change was written, by the broker's clock, where it is known: scorers that were alive then must confirm.
    """
    written_s = time.monotonic()
    while True:
        live = await scorers.live(now_ms=at_ms)
        missing = [beat for beat in live if not confirms(beat)]
        if not missing or (time.monotonic() - written_s) * 1_000 >= timeout_ms:
            confirmed = [beat.worker for beat in live if confirms(beat)]
            return _Waited(confirmed, missing, round((time.monotonic() - began) * 1_000, 1))
        await asyncio.sleep(LOOK_S)
