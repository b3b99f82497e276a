"""The version that answers. The champion is loaded while the old version answers, then replaces it by one assignment.

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
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from state.decisions import rollback_target
from state.errors import Refused
from state.registry import RegistryState
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.serving import Served

__all__ = ["Fallback", "Swapper"]

log = logging.getLogger(__name__)

# First and longest wait until a version that could not be loaded is tried again. The first is short for a store that was out of
# reach for a moment; the longest is short because trying a broken version costs next to nothing.
RETRY_S, MAX_RETRY_S = 0.5, 10.0
# Good versions that are tried instead of an unreadable champion. When the newest few are all broken, the store itself is.
MAX_FALLBACKS = 5


class Fallback(NamedTuple):
    """The champion that can't be read, and the reason."""

    of: int
    reason: str


class _Failure(NamedTuple):
    """A version that could not be loaded."""

    in_a_row: int = 0
    not_before_s: float = 0.0  # monotonic: when it is tried again


class Swapper:
    """Owns the reference to the version that answers. A batch of requests takes the reference once and uses it to the end.

    Args:
        load: reads a version and makes it ready. Called in threads; raises when it can't.
        keep: number of versions kept ready, besides the one that `headrace snapshot rollback` would go to.
    """

    def __init__(self, load: Callable[[int], Served], metrics: ScorerMetrics, *, keep: int) -> None:
        self._load_version, self._metrics, self._keep = load, metrics, keep
        self.current: Served | None = None
        self.since_ms = 0
        self.applied = 0
        """Registry offset below which everything is in effect; a heartbeat's `registry_offset`."""
        self.changed = asyncio.Event()
        """Set when `current`, `applied` or `fallback` changes; the sender of heartbeats clears it."""
        self.fallback: Fallback | None = None
        """Not None from a failure to load the champion until a champion answers."""
        self.has_version = asyncio.Event()
        self._registry = RegistryState()
        self._wanted: int | None = None
        self._position = 0
        self._ready: OrderedDict[int, Served] = OrderedDict()  # in the order last served
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._failed: dict[int, _Failure] = {}  # by version

    def want(self, registry: RegistryState, position: int) -> None:
        """Take the registry as of an offset. When it has no champion, the version that answers goes on."""
        self._registry, self._position = registry, position
        self._wanted = registry.champion.version
        self._metrics.champion_version.set(-1 if self._wanted is None else self._wanted)
        self._settle()

    async def first_load_ended(self) -> None:
        """Wait until the versions being loaded are served, or have failed."""
        if self._loading:
            await asyncio.wait(list(self._loading.values()))

    async def close(self) -> None:
        """Stop loading."""
        self._wanted = None
        tasks = list(self._loading.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _settle(self) -> None:
        """Serve the wanted version if it is ready, else make sure that it is being loaded."""
        wanted = self._wanted
        if wanted is None or wanted == self._version:
            self._set_fallback(None)
            if self.applied != self._position:
                self.applied = self._position
                self.changed.set()
        elif wanted in self._ready:
            self._swap(self._ready[wanted])
        elif wanted not in self._loading and not any(map(self._is_on_the_way, self._loading)):
            self._load_soon(wanted)
            self._fall_back()

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
        if self.current is not None and not champion.was_rolled_back(self._version):
            return []
        good = (
            version
            for version, record in self._registry.versions.items()
            if version < wanted and record.good_at_ms is not None and not champion.was_rolled_back(version)
        )
        return heapq.nlargest(MAX_FALLBACKS, good)

    def _set_fallback(self, fallback: Fallback | None) -> None:
        self._metrics.fallback.set(fallback is not None)
        if fallback != self.fallback:
            self.fallback = fallback
            self.changed.set()

    @property
    def _version(self) -> int:
        return -1 if self.current is None else self.current.version

    def _is_on_the_way(self, version: int) -> bool:
        """Whether serving this version is a step forward to the wanted one."""
        wanted = self._wanted
        return (
            wanted is not None
            and self._version < version <= wanted
            and not (version < wanted and self._registry.champion.was_rolled_back(version))
        )

    def _swap(self, served: Served) -> None:
        self.current, self.since_ms = served, time.time_ns() // 1_000_000
        self._ready[served.version] = served
        self._ready.move_to_end(served.version)
        self._forget()
        self._metrics.swaps.inc()
        self._metrics.serving(served.version, served.created_at_ms)
        self.changed.set()
        self.has_version.set()
        if self.fallback is not None and served.version != self._wanted:
            log.error("serving version %d instead of the champion, version %d: %s", served.version, *self.fallback)
        else:
            log.info("serving version %d", served.version)
        self._settle()

    def _forget(self) -> None:
        """Drop versions beyond those to keep, the longest unserved first."""
        try:
            target = rollback_target(self._registry, now_ms=time.time_ns() // 1_000_000)
        except Refused:
            target = None
        others = [version for version in self._ready if version != target]
        for version in others[: max(len(others) - self._keep, 0)]:
            del self._ready[version]

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
            if version == self._wanted or self._is_on_the_way(version) or version in self._fallbacks():
                self._swap(served)
                return
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
