"""The registries that a scorer follows: that of `main`, which knows all tracks, and those of tracks that serve or have a share.

Another track serves from the moment in which its registry has been read to its end. Until then the scorer goes on with the
track before; a scorer that has just started waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import NamedTuple

from state.registry import RegistryState
from state.tracks import MAIN, Track, numbers_before
from stream.errors import StreamError
from stream.registry.follower import RegistryFollower
from stream.registry.log import LOOK_MS
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["Challenging", "ServingView", "TrackRegistries"]

log = logging.getLogger(__name__)

# Wait before the registry of a track that couldn't be read is tried again: its topic is missing, or Kafka is away.
RETRY_S = 2.0


class ServingView(NamedTuple):
    """The registry of the track that serves.

    track          its name
    state          of its own registry, read to `position`
    position       the next offset to read there
    main_position  the next offset to read in the registry of `main`, which says that it serves
    """

    track: str
    state: RegistryState
    position: int
    main_position: int


class Challenging(NamedTuple):
    """A track that scores a share of the requests beside the one that serves; `state` and `position` as in `ServingView`."""

    track: Track
    state: RegistryState
    position: int


class TrackRegistries:
    """Follows them. Belongs to the event loop.

    Args:
        on_change: called when the registry of the track that serves has changed, or another track serves.
        on_shares: called when a share, or the registry of a track with a share, has changed.
        look_ms: about how often `caught_up_at` moves while there is no news.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        names: TopicNames,
        *,
        on_change: Callable[[ServingView], None],
        on_shares: Callable[[list[Challenging]], None],
        look_ms: int = LOOK_MS,
    ) -> None:
        self._kafka, self._names, self._look_ms = kafka, names.of_track(MAIN), look_ms
        self._on_change, self._on_shares = on_change, on_shares
        self._main = RegistryFollower(kafka, self._names, on_change=self._main_changed, look_ms=look_ms)
        self._others: dict[str, RegistryFollower] = {}  # those that were read to their end, by track
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._serving = ""

    @property
    def view(self) -> ServingView:
        """The track that serves, as far as this scorer knows. Not before the first `on_change`."""
        follower = self._follower(self._serving)
        return ServingView(self._serving, follower.state, follower.position, self._main.position)

    @property
    def caught_up_at(self) -> float | None:
        """When (`time.monotonic()`) the registries that say what is served were last seen to hold nothing more."""
        if not self._serving:
            return None
        times = [self._main.caught_up_at, self._follower(self._serving).caught_up_at]
        known = [each for each in times if each is not None]
        return min(known) if len(known) == len(times) else None

    def names_of(self, track: str) -> TopicNames:
        """The topics of a track."""
        return self._names.of_track(track)

    def track_of(self, version: int) -> str:
        """The track that a version of this number is of."""
        first = numbers_before(version)
        return next((track.name for track in self._main.state.tracks.values() if track.first_number == first), MAIN)

    async def start(self) -> None:
        """Read the registries whole, then follow them in the background.

        Raises:
            TopicError: the topic of `main` doesn't exist.
            NoAnswer: Kafka can't be reached.
        """
        await self._main.start()

    async def read_to_end(self) -> None:
        """Return once the callbacks know everything that the registries which say what is served hold by now.

        Raises:
            aiokafka.errors.KafkaError: Kafka can't be reached.
        """
        await self._main.read_to_end()
        if self._serving not in ("", MAIN):
            await self._others[self._serving].read_to_end()

    async def close(self) -> None:
        """Stop following."""
        opening, self._opening = list(self._opening.values()), {}
        for task in opening:
            task.cancel()
        if opening or self._closing:
            await asyncio.wait([*opening, *self._closing])
        for follower in (*self._others.values(), self._main):
            await follower.close()

    def _follower(self, track: str) -> RegistryFollower:
        return self._main if track == MAIN else self._others[track]

    def _main_changed(self, state: RegistryState) -> None:
        shares = [track.name for track in state.tracks.values() if track.share]
        wanted = {state.serving.track, self._serving, *shares} - {MAIN, ""}
        for track in wanted - self._others.keys() - self._opening.keys():
            self._opening[track] = asyncio.ensure_future(self._open(track))
        for track in self._opening.keys() - wanted:
            self._opening.pop(track).cancel()
        self._serve()
        if self._serving:
            self._on_change(self.view)
        self._report_shares()

    def _serve(self) -> None:
        """Let the track serve that should, if its registry has been read."""
        track = self._main.state.serving.track
        if track == self._serving or track not in (MAIN, *self._others):
            return
        if self._serving:
            log.warning("track %s serves from now on, instead of %s", track, self._serving)
        self._serving = track

    async def _open(self, track: str) -> None:
        """Read a track's registry to its end, and follow it. Tries until it succeeds."""
        follower = RegistryFollower(
            self._kafka, self.names_of(track), on_change=lambda state: self._track_changed(track), look_ms=self._look_ms
        )
        while True:
            try:
                await follower.start()
            except StreamError as error:
                log.error("the registry of track %s can't be read, trying again in %g s: %s", track, RETRY_S, error)
                await asyncio.sleep(RETRY_S)
            except asyncio.CancelledError:
                await follower.close()
                raise
            else:
                break
        del self._opening[track]
        self._others[track] = follower
        self._track_changed(track)

    def _track_changed(self, track: str) -> None:
        if track not in self._others:
            return  # the first read isn't complete
        self._serve()
        if track == self._serving:
            self._on_change(self.view)
        self._report_shares()

    def _report_shares(self) -> None:
        """Say which tracks have a share, and stop following those that neither serve nor have one."""
        found, state = [], self._main.state
        serving = {self._serving, state.serving.track}
        for track in sorted(state.tracks.values(), key=lambda each: each.number):
            if track.share and track.name not in serving and track.name in (MAIN, *self._others):
                follower = self._follower(track.name)
                found.append(Challenging(track, follower.state, follower.position))
        self._on_shares(found)
        for name in self._others.keys() - serving - {each.track.name for each in found}:
            self._close_follower(self._others.pop(name))

    def _close_follower(self, follower: RegistryFollower) -> None:
        async def close() -> None:
            with contextlib.suppress(StreamError):
                await follower.close()

        task = asyncio.ensure_future(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
