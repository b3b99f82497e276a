"""The version that answers: the champion is loaded beside it, then takes its place by one assignment.

Which version is wanted comes from the registry, and may change while another is being loaded:

- one that is kept ready is served at once, whatever is loading: going back waits for no download;
- when versions come faster than they load, the one being loaded is served on the way to the one wanted, so that a scorer
  always moves on;
- a version that can't be loaded changes nothing. It is tried again, at growing intervals, for as long as it is wanted.

Everything here runs on the event loop; only `load` runs in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable

from state.decisions import rollback_target
from state.errors import Refused
from state.registry import RegistryState
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.serving import Served

__all__ = ["Swapper"]

log = logging.getLogger(__name__)

# First and longest wait until a version that could not be loaded is tried again: a store that was out of reach is found again
# soon, a broken version costs next to nothing.
RETRY_S, MAX_RETRY_S = 0.5, 10.0


class Swapper:
    """Owns the reference to the version that answers. Whoever scores takes it once and uses it to the end.

    Args:
        load: reads a version and makes it ready; called in threads, raises when it can't.
        keep: versions kept ready besides the one that `headrace snapshot rollback` would go to.
    """

    def __init__(self, load: Callable[[int], Served], metrics: ScorerMetrics, *, keep: int) -> None:
        self._load_version, self._metrics, self._keep = load, metrics, keep
        self.current: Served | None = None
        self.since_ms = 0
        self.applied = 0
        """Registry offset below which everything is in effect: a heartbeat's `registry_offset`."""
        self.changed = asyncio.Event()
        """Set when any of the three changes; cleared by who says so to others."""
        self._registry = RegistryState()
        self._wanted: int | None = None
        self._position = 0
        self._ready: OrderedDict[int, Served] = OrderedDict()  # in the order last served
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._failed: tuple[int, int, float] | None = None  # version, failures in a row, not before (monotonic)

    def want(self, registry: RegistryState, position: int) -> None:
        """News: the registry as of an offset. A registry without a champion leaves the version that answers alone."""
        self._registry, self._position = registry, position
        self._wanted = registry.champion.version
        self._settle()

    async def tried(self) -> None:
        """Wait until what is being loaded is served, or has failed."""
        if self._loading:
            await asyncio.wait(list(self._loading.values()))

    async def close(self) -> None:
        """Load no more."""
        self._wanted = None
        tasks = list(self._loading.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _settle(self) -> None:
        """Do what can be done at once towards the version wanted; else see to it that it is being loaded."""
        wanted = self._wanted
        if wanted is None or wanted == self._version:
            if self.applied != self._position:
                self.applied = self._position
                self.changed.set()
        elif wanted in self._ready:
            self._swap(self._ready[wanted])
        elif wanted not in self._loading and not any(map(self._is_on_the_way, self._loading)):
            if self._failed is not None and self._failed[0] == wanted and time.monotonic() < self._failed[2]:
                return  # a timer comes back
            self._loading[wanted] = asyncio.ensure_future(self._load(wanted))

    @property
    def _version(self) -> int:
        return -1 if self.current is None else self.current.version

    def _is_on_the_way(self, version: int) -> bool:
        """Whether serving it is a step forward to the version wanted."""
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
        log.info("serving version %d", served.version)
        self._settle()

    def _forget(self) -> None:
        """Let go of versions beyond those to keep, the longest unserved first."""
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
        except Exception as error:  # whatever it is, the version that answers goes on
            del self._loading[version]
            self._note_failure(version, error)
        else:
            del self._loading[version]
            self._failed = None
            self._metrics.swap_seconds.observe(time.perf_counter() - began)
            if version == self._wanted or self._is_on_the_way(version):
                self._swap(served)
                return
        self._settle()

    def _note_failure(self, version: int, error: Exception) -> None:
        failures = self._failed[1] + 1 if self._failed is not None and self._failed[0] == version else 1
        wait_s = min(RETRY_S * 2 ** (failures - 1), MAX_RETRY_S)
        self._failed = (version, failures, time.monotonic() + wait_s)
        self._metrics.swap_failures.inc()
        name = "no version" if self.current is None else f"version {self._version}"
        log.error("version %d can't be served, going on with %s, trying again in %g s: %s", version, name, wait_s, error)
        # A little later than `not before`, so that the timer finds it passed.
        asyncio.get_running_loop().call_later(wait_s + 0.01, self._settle)
