"""The tracks that score a share of the requests beside the one that serves.

Each has what the track that serves has: a swapper, and a follower that applies its deltas to a replica. The weights score the
requests of the track's share, and their scores stand beside the answer's (`stream.scorer.answers`). A challenger that can't be
read, finds no room in the spare memory, or fails to score, costs the answers nothing.

Everything here runs on the event loop; versions are read in threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from state.background import in_background
from state.chain_versions import point_of
from state.registry import RegistryState, VersionRecord
from state.store import SnapshotStore
from state.tracks import Interval
from stream.records.heartbeat import ShadowBeat
from stream.scorer.candidate import NoRoom, load_candidate
from stream.scorer.chain_follower import ChainFollower
from stream.scorer.challenger_metrics import ChallengerMetrics
from stream.scorer.following_metrics import FollowingMetrics
from stream.scorer.freshness import Freshness
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.replica import DeltaLog, Replica
from stream.scorer.serving import Served
from stream.scorer.swap import Swapper
from stream.scorer.tracks import Challenging
from stream.scorer.trial import Shadow

__all__ = ["Challengers"]

log = logging.getLogger(__name__)

# Longest random wait before a version is read to heal: nobody waits for a challenger.
JITTER_S = 2.0


@dataclass(slots=True)
class _Challenger:
    """One track beside. Its metrics are in a registry of their own, which nobody reads: their names are those of the scorer."""

    interval: Interval
    state: RegistryState
    swapper: Swapper
    follower: ChainFollower
    task: asyncio.Task[None]
    no_room: str = ""

    @property
    def size(self) -> int:
        """Bytes of its weights in memory."""
        found = [*self.swapper.in_memory, *([] if self.follower.replica is None else [self.follower.replica.served])]
        return sum({id(each): each.size for each in found}.values())


class Challengers:
    """Keeps the tracks beside ready. A batch of requests takes `shadows` once and uses them to the end.

    Args:
        store_of: the store of a track.
        open_log: opens the deltas of a track at an offset.
        alone: runs a function between two batches, in the thread that scores.
        room: bytes of the spare memory that nothing else has taken.
        on_change: called when other tracks are there, or their weights have another size.
    """

    def __init__(
        self,
        store_of: Callable[[str], SnapshotStore],
        open_log: Callable[[str, int], AbstractAsyncContextManager[DeltaLog]],
        alone: Callable[[Callable[[], None]], Awaitable[None]],
        metrics: ChallengerMetrics,
        *,
        device: str,
        room: Callable[[], int],
        on_change: Callable[[], None],
    ) -> None:
        self._store_of, self._open_log, self._alone, self._metrics = store_of, open_log, alone, metrics
        self._device, self._room, self._on_change = device, room, on_change
        self._tracks: dict[str, _Challenger] = {}
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def size(self) -> int:
        """Bytes of their weights in memory. Threads that load ask for it, too."""
        return sum(each.size for each in list(self._tracks.values()))

    @property
    def shadows(self) -> Sequence[Shadow]:
        """Those that take part now."""
        found = []
        for name, each in self._tracks.items():
            served = each.swapper.current
            self._metrics.ready(name, served is not None)
            if served is not None:
                found.append(Shadow(name, each.interval, served))
        return found

    def in_memory(self) -> list[Served]:
        """All their weights."""
        found: list[Served] = []
        for each in self._tracks.values():
            found += each.swapper.in_memory
            if each.follower.replica is not None:
                found.append(each.follower.replica.served)
        return found

    def beats(self, now_ms: int) -> tuple[ShadowBeat, ...]:
        """What a heartbeat says of them."""
        return tuple(_beat(name, each, now_ms) for name, each in self._tracks.items())

    def want(self, found: list[Challenging]) -> None:
        """Take the tracks that have a share, with their registries."""
        if not found and not self._tracks:
            return
        wanted = {each.track.name: each for each in found}
        for name in self._tracks.keys() - wanted.keys():
            self._end(name)
        for name, each in wanted.items():
            challenger = self._tracks.get(name) or self._begin(name, each.track.interval)
            challenger.interval, challenger.state = each.track.interval, each.state
            follows = each.state.champion.follows and _has_chain(each.state)
            challenger.swapper.want(each.state, each.position, follow=follows)
            challenger.follower.want(each.state, follows)
        self._on_change()

    def take(self, name: str) -> Replica | None:
        """A track's replica, which this object has no more to do with: the track serves now. None: it isn't ready."""
        challenger = self._tracks.get(name)
        if challenger is None:
            return None
        self._end(name)
        replica = challenger.follower.replica
        return replica if replica is not None and replica.progress.broken is None else None

    def damaged(self, served: Served) -> bool:
        """The memory of weights has changed by itself. Returns whether they are a challenger's, which reads them again."""
        for each in self._tracks.values():
            if each.follower.replica is not None and each.follower.replica.served is served:
                each.follower.damaged()
                return True
            if any(served is kept for kept in each.swapper.in_memory):
                each.swapper.reload(served)
                return True
        return False

    def scored(self, track: str, scored: int, missed: int) -> None:
        """Count the requests of a track's share in one batch."""
        self._metrics.scored(track, scored, missed)

    async def close(self) -> None:
        """Stop following, and stop loading."""
        for name in list(self._tracks):
            self._end(name)
        if self._ending:
            await asyncio.wait(list(self._ending))

    def _begin(self, name: str, interval: Interval) -> _Challenger:
        store, quiet = self._store_of(name), CollectorRegistry()

        def load_record(record: VersionRecord) -> Served:
            # Weights that take the place of others of this track are there beside them for a moment, which isn't counted.
            spare = self._room() + challenger.size
            try:
                served = in_background(
                    lambda: load_candidate(store, record, device=self._device, spare_bytes=spare, taken_bytes=0)
                )
            except NoRoom as error:
                challenger.no_room = str(error)
                raise
            challenger.no_room = ""
            return served

        def load(version: int) -> Served:
            record = challenger.state.versions.get(version)
            if record is None:
                raise KeyError(f"version {version} is deleted")
            return load_record(record)

        swapper = Swapper(load, ScorerMetrics(quiet), keep=1, on_swap=self._on_change)
        follower = ChainFollower(
            load_record,
            lambda offset: self._open_log(name, offset),
            self._alone,
            swapper,
            FollowingMetrics(quiet),
            Freshness(lambda seconds: None),
            jitter_s=JITTER_S,
            cached=store.has,
        )
        task = asyncio.ensure_future(follower.run())
        challenger = self._tracks[name] = _Challenger(interval, RegistryState(), swapper, follower, task)
        log.info("track %s scores %g %% of the requests beside", name, (interval.stop - interval.start) * 100)
        return challenger

    def _end(self, name: str) -> None:
        challenger = self._tracks.pop(name)
        self._metrics.gone(name)
        log.info("track %s scores no requests beside any more", name)

        async def end() -> None:
            challenger.task.cancel()
            await asyncio.wait([challenger.task])
            await challenger.swapper.close()

        task = asyncio.ensure_future(end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


def _has_chain(state: RegistryState) -> bool:
    record = state.champion_record
    return record is not None and point_of(record) is not None


def _beat(name: str, challenger: _Challenger, now_ms: int) -> ShadowBeat:
    served, fallback = challenger.swapper.current, challenger.swapper.fallback
    problem = challenger.no_room or challenger.follower.problem or ("" if fallback is None else fallback.reason)
    if served is None:
        return ShadowBeat(name, problem=problem or "it has no champion yet, or reads it")
    state = served.state
    return ShadowBeat(name, state.version, state.delta, max(now_ms - state.captured_at_ms, 0), problem)
