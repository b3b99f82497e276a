"""Follows the registry: the version that the alias names is loaded beside the one that answers, then takes its place."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from state.errors import SnapshotError
from stream.registry_reader import RegistryReader
from stream.scorer.metrics import ScorerMetrics
from stream.scorer.serving import Ready, Served
from stream.settings import KafkaSettings
from stream.topics import TopicNames

__all__ = ["Swapper"]

log = logging.getLogger(__name__)

RETRY_S = 1.0  # until a version that could not be loaded is tried again; news from the registry ends the wait


class Swapper:
    """Owns the reference to the version that answers. Whoever scores takes it once and uses it to the end."""

    def __init__(self, kafka: KafkaSettings, names: TopicNames, ready: Ready, metrics: ScorerMetrics, *, lease_ms: int) -> None:
        self._reader = RegistryReader(kafka, names, on_change=lambda _: self._news.set())
        self._ready, self._metrics, self._lease_s = ready, metrics, lease_ms / 1000
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._applied = 0
        self.current: Served | None = None
        self.since_ms = 0
        self.swapped = asyncio.Event()  # set at each swap, cleared by who sends the heartbeat

    async def start(self) -> None:
        """Read the registry and load what it names. Raises TopicError and RegistryError."""
        await self._reader.start()
        self._task = asyncio.ensure_future(self._follow())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._reader.close()

    @property
    def stale(self) -> bool:
        """Whether the registry could not be read to its end within the lease: what answers may no longer be the champion."""
        at = self._reader.caught_up_at
        return at is None or time.monotonic() - at > self._lease_s

    @property
    def registry_offset(self) -> int:
        """The registry offset below which everything is in effect."""
        wanted = self._reader.state.champion.version
        if wanted is None or (self.current is not None and self.current.version == wanted):
            self._applied = self._reader.position
        return self._applied

    def watch(self, task_ended: Any) -> None:
        assert self._task is not None
        self._task.add_done_callback(task_ended)

    async def _follow(self) -> None:
        while True:
            self._news.clear()
            wanted = self._reader.state.champion.version
            if wanted is None or (self.current is not None and self.current.version == wanted):
                await self._news.wait()
                continue
            began = time.perf_counter()
            try:
                served = await asyncio.to_thread(self._ready.get, wanted)
            except (SnapshotError, OSError) as error:
                self._metrics.swap_failures.inc()
                log.error("version %d can't be served, going on with %s: %s", wanted, self._name(), error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), RETRY_S)
                continue
            if self._reader.state.champion.version != wanted and self.current is not None:
                continue  # the registry moved on while it was loaded
            self.current, self.since_ms = served, int(time.time() * 1000)
            self._metrics.swaps.inc()
            self._metrics.swap_seconds.observe(time.perf_counter() - began)
            self._metrics.model_version.set(wanted)
            self.swapped.set()
            log.info("serving version %d", wanted)

    def _name(self) -> str:
        return "none" if self.current is None else f"version {self.current.version}"
