"""The weights that answer: exactly the champion, or a replica that follows the champion's chain.

While auto-promotion is held, and for versions without a chain, the champion is loaded while the old version answers, then
replaces it by one assignment. Otherwise a replica answers, which `stream.scorer.chain_follower` hands over. While no replica
can be brought to the champion, the champion itself is loaded as above.

The registry names the wanted version, which may change while another one is being loaded:

- a version that is kept ready is served at once, whatever is loading, so a rollback waits for no download;
- when versions come faster than they load, the version being loaded is served on the way to the wanted one, so a scorer always
  moves on;
- a champion that can't be loaded is tried again, at growing intervals, for as long as it is wanted. Meanwhile the version that
  answers goes on. When no version answers, or the one that answers was rolled back, the newest older version that is tagged
  good is loaded instead. `fallback` then names the champion that can't be read, in heartbeats, metrics and the log.

Everything here runs on the event loop; only `load` runs in threads.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from state.decisions import rollback_target
from state.errors import Refused
from state.registry import RegistryState
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.replica import Replica
from stream.scorer.serving import Served

__all__ = ["Fallback", "Swapper"]

log = logging.getLogger(__name__)

# First and longest wait until a version that could not be loaded is tried again. The first is short for a store that was out of
# reach for a moment; the longest is short because trying a broken version costs next to nothing.
RETRY_S, MAX_RETRY_S = 0.5, 10.0
# Good versions that are tried instead of an unreadable champion. When the newest few are all broken, the store itself is.
MAX_FALLBACKS = 5
# Longest random wait before the version that a rollback would go to is read while a replica answers: it changes for all scorers
# at once.
PRELOAD_JITTER_S = 2.0


class Fallback(NamedTuple):
    """The champion that can't be read, and the reason."""

    of: int
    reason: str


class _Failure(NamedTuple):
    """A version that could not be loaded."""

    in_a_row: int = 0
    not_before_s: float = 0.0  # monotonic: when it is tried again


class Swapper:
    """Owns the reference to the weights that answer. A batch of requests takes the reference once and uses it to the end.

    Args:
        load: reads a version and makes it ready. Called in threads; raises when it can't.
        keep: number of versions kept ready, besides the one that `headrace snapshot rollback` would go to. While a replica
            answers, only that one is kept.
        spare_bytes: memory for weights that don't answer, while a replica does.
        on_swap: called soon after other weights have begun to answer.
    """

    def __init__(
        self,
        load: Callable[[int], Served],
        metrics: ScorerMetrics,
        *,
        keep: int,
        spare_bytes: int = 0,
        on_swap: Callable[[], None] = lambda: None,
    ) -> None:
        self._load_version, self._metrics, self._keep, self._spare_bytes = load, metrics, keep, spare_bytes
        self._on_swap = on_swap
        self.current: Served | None = None
        self.since_ms = 0
        self.applied = 0
        """Registry offset below which everything is in effect; a heartbeat's `registry_offset`."""
        self.changed = asyncio.Event()
        """Set when `current`, `applied` or `fallback` changes; the sender of heartbeats clears it."""
        self.fallback: Fallback | None = None
        """Not None from a failure to load the champion until a champion answers."""
        self.has_version = asyncio.Event()
        self.reserved_bytes = 0
        """Part of the spare memory that something else has taken."""
        self._registry = RegistryState()
        self._wanted: int | None = None
        self._position = 0
        self._ready: OrderedDict[int, Served] = OrderedDict()  # in the order last served
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._failed: dict[int, _Failure] = {}  # by version
        self._follow = False
        self._replica: Replica | None = None  # may answer in the champion's place, if `_follow`
        self._reported = asyncio.Event()  # the follower has handed over a replica since `_follow`, or has said that it can't
        self._preloading: asyncio.TimerHandle | None = None

    def want(self, registry: RegistryState, position: int, *, follow: bool = False) -> None:
        """Take the registry as of an offset. When it has no champion, the version that answers goes on.

        Args:
            follow: serve a replica that follows the champion's chain, not exactly the champion.
        """
        if follow and not self._follow:
            self._reported.clear()
        self._registry, self._position, self._follow = registry, position, follow
        self._wanted = registry.champion.version
        self._metrics.champion_version.set(-1 if self._wanted is None else self._wanted)
        self._settle()
        self._preload_soon()

    # Of the replica

    @property
    def is_serving(self) -> bool:
        return self.current is not None

    @property
    def waits(self) -> bool:
        return self._follow and (self._replica is None or self.current is not self._replica.served)

    @property
    def in_memory(self) -> list[Served]:
        """All weights that answer, or may without being read again: what is kept ready for a rollback is checked too."""
        kept = self._ready.values()
        return [*kept] if self.current is None or any(each is self.current for each in kept) else [self.current, *kept]

    @property
    def is_following(self) -> bool:
        """Whether the weights that answer are a replica that is kept at the end of the champion's chain."""
        return self._follow and self._replica is not None and self.current is self._replica.served

    def follow(self, replica: Replica) -> None:
        """From now on this replica may answer in the champion's place."""
        self._replica = replica
        self._reported.set()
        self._settle()

    def cannot_follow(self, reason: str) -> None:
        """No replica can be brought to the champion for now: the champion itself is loaded."""
        if self._follow and not self._reported.is_set():
            log.warning("the champion is served as it is, without the deltas after it: %s", reason)
        self._replica = None
        self._reported.set()
        self._settle()

    def dropped(self) -> None:
        """There is no replica any more."""
        self._replica = None

    def renamed(self) -> None:
        """Answers name the replica by another version."""
        if self._replica is not None and self.current is self._replica.served:
            self._note_version(self.current)
            self._settle()

    def reload(self, served: Served) -> None:
        """The memory of a version has changed by itself: load the version again, while it answers if it has to.

        A version that was only kept ready is forgotten. The one that a rollback would go to is read again.
        """
        self._ready = OrderedDict((version, each) for version, each in self._ready.items() if each is not served)
        if served is self.current and served.version not in self._loading:
            self._load_soon(served.version)
        self._preload_soon()

    async def first_load_ended(self) -> None:
        """Wait until what is being loaded is served, or has failed."""
        if self._follow:
            await self._reported.wait()
        if self._loading:
            await asyncio.wait(list(self._loading.values()))

    async def close(self) -> None:
        """Stop loading."""
        self._wanted = None
        if self._preloading is not None:
            self._preloading.cancel()
        tasks = list(self._loading.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _settle(self) -> None:
        """Serve what is wanted if it is ready, else make sure that it is being loaded."""
        wanted = self._wanted
        replica = self._may_answer
        if replica is not None:
            champion = self._registry.champion_record
            if self.current is not replica.served:
                self._swap(replica.served)
            elif champion is not None and replica.covers(champion):
                self._in_effect()
        elif self._follow and not self._reported.is_set():
            return  # the follower is reading
        elif wanted is None or wanted == self._exact_version:
            self._in_effect()
        elif wanted in self._ready:
            self._swap(self._ready[wanted])
        elif wanted not in self._loading and not any(map(self._is_on_the_way, self._loading)):
            self._load_soon(wanted)
            self._fall_back()

    @property
    def _may_answer(self) -> Replica | None:
        """The replica, if it should answer and isn't of a line that the trainer was sent back from."""
        replica = self._replica if self._follow else None
        return None if replica is None or replica.is_left(self._registry) else replica

    def _in_effect(self) -> None:
        """Note that what the registry asks for is served."""
        self._set_fallback(None)
        if self.applied != self._position:
            self.applied = self._position
            self.changed.set()

    def _load_soon(self, version: int) -> bool:
        """Begin to load a version; False when it has failed a moment ago: a timer then calls `_settle` again."""
        if time.monotonic() < self._failed.get(version, _Failure()).not_before_s:
            return False
        self._loading[version] = asyncio.ensure_future(self._load(version))
        return True

    def _fall_back(self) -> None:
        """When the champion can't be read and no version may answer, serve or load the newest good version before it."""
        for version in self._fallbacks():
            if version in self._ready:
                self._swap(self._ready[version])
                return
            if version in self._loading or self._load_soon(version):
                return

    def _fallbacks(self) -> list[int]:
        """Versions that may answer instead of the champion, the newest first; empty while no fallback is needed."""
        champion, wanted = self._registry.champion, self._wanted
        if self.fallback is None or wanted is None:
            return []
        if self.current is not None and not self._was_rolled_back():
            return []
        good = (
            version
            for version, record in self._registry.versions.items()
            if version < wanted and record.good_at_ms is not None and not champion.was_rolled_back(version)
        )
        return heapq.nlargest(MAX_FALLBACKS, good)

    def _was_rolled_back(self) -> bool:
        """Whether a rollback went back past what answers. A replica may be ahead of every announced version."""
        champion, current = self._registry.champion, self.current
        return champion.was_rolled_back(self._version) or (
            current is not None and current.is_replica and any(each.above == self._wanted for each in champion.rolled_back)
        )

    def _set_fallback(self, fallback: Fallback | None) -> None:
        self._metrics.fallback.set(fallback is not None)
        if fallback != self.fallback:
            self.fallback = fallback
            self.changed.set()

    @property
    def _version(self) -> int:
        return -1 if self.current is None else self.current.version

    @property
    def _exact_version(self) -> int:
        """The version that answers, exactly as it is; -1 for none, and for a replica."""
        return -1 if self.current is None or self.current.is_replica else self.current.version

    def _is_on_the_way(self, version: int) -> bool:
        """Whether serving this version is a step forward to the wanted one."""
        wanted = self._wanted
        return (
            wanted is not None
            and self._version < version <= wanted
            and not (version < wanted and self._registry.champion.was_rolled_back(version))
        )

    def _swap(self, served: Served) -> None:
        self.current = served
        if not served.is_replica:
            self._ready[served.version] = served
            self._ready.move_to_end(served.version)
        self._forget()
        self._metrics.swaps.inc()
        self._note_version(served)
        self.has_version.set()
        if self.fallback is not None and served.version != self._wanted:
            log.error("serving version %d instead of the champion, version %d: %s", served.version, *self.fallback)
        else:
            log.info("serving %sversion %d", "a replica that follows " if served.is_replica else "", served.version)
        self._settle()
        self._preload_soon()
        asyncio.get_running_loop().call_soon(self._on_swap)

    def _note_version(self, served: Served) -> None:
        # A heartbeat tells changes apart by it, so no two have the same, whatever the clock does.
        self.since_ms = max(time.time_ns() // 1_000_000, self.since_ms + 1)
        self._metrics.serving(served)
        self.changed.set()

    def _forget(self) -> None:
        """Drop versions beyond those to keep, the longest unserved first."""
        target, keep = self._rollback_target(), 0 if self.is_following else self._keep
        others = [version for version in self._ready if version != target]
        for version in others[: max(len(others) - keep, 0)]:
            del self._ready[version]

    def _rollback_target(self) -> int | None:
        try:
            return rollback_target(self._registry, now_ms=time.time_ns() // 1_000_000)
        except Refused:
            return None

    def _preload_soon(self) -> None:
        """While a replica answers, read the version that a rollback would go to, if there is memory for it."""
        current = self.current
        if self._preloading is None and current is not None and self.is_following and self._has_room_for(current):
            self._preloading = asyncio.get_running_loop().call_later(random.uniform(0, PRELOAD_JITTER_S), self._preload)

    def _has_room_for(self, weights: Served) -> bool:
        return weights.size <= self._spare_bytes - self.reserved_bytes

    def offer(self, served: Served) -> None:
        """Keep a version ready that was read for something else, so that it is served at once when it is wanted."""
        self._ready.setdefault(served.version, served)

    def beside_bytes(self) -> int:
        """Bytes of the versions in memory that don't answer."""
        return sum(each.size for each in self._ready.values() if each is not self.current)

    def _preload(self) -> None:
        self._preloading = None
        target = self._rollback_target()
        if self.is_following and target is not None and target not in self._ready and not self._loading:
            self._forget()
            self._load_soon(target)

    async def _load(self, version: int) -> None:
        began = time.perf_counter()
        try:
            served = await asyncio.to_thread(self._load_version, version)
        except Exception as error:  # whatever fails, the version that answers goes on
            del self._loading[version]
            self._note_failure(version, error)
        else:
            del self._loading[version]
            self._failed.pop(version, None)
            self._metrics.swap_seconds.observe(time.perf_counter() - began)
            wanted = version == self._wanted or self._is_on_the_way(version) or version in self._fallbacks()
            if wanted and self._may_answer is None:
                self._swap(served)
                return
            if version == self._rollback_target():
                self._ready[version] = served
                self._forget()
        self._settle()

    def _note_failure(self, version: int, error: Exception) -> None:
        failures = self._failed.get(version, _Failure()).in_a_row + 1
        wait_s = min(RETRY_S * 2 ** (failures - 1), MAX_RETRY_S)
        self._metrics.swap_failures.inc()
        name = "no version" if self.current is None else f"version {self._version}"
        log.error("version %d can't be served, going on with %s, trying again in %g s: %s", version, name, wait_s, error)
        if version == self._wanted:
            self._set_fallback(Fallback(version, " ".join(f"{error}".split()) or repr(error)))
        kept = {self._wanted, *self._fallbacks()}
        self._failed = {each: failed for each, failed in self._failed.items() if each in kept}
        self._failed[version] = _Failure(failures, time.monotonic() + wait_s)
        # A little later than `not_before_s`, so that the timer finds it passed.
        asyncio.get_running_loop().call_later(wait_s + 0.01, self._settle)
