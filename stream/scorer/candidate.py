"""Keeps the candidate of a shadow or canary ready beside the weights that answer.

The registry says whether there is a trial, and of which version. The version is read in a thread, if the spare memory has room
for it, and then takes part from the next batch on. It is dropped as soon as the registry says that the trial is over. A version
that can't be read is tried again at growing intervals. In the meantime, and always when the candidate can't score a request,
the champion answers.

Everything here runs on the event loop; only `load` runs in threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from state.canary import Canary
from state.canary_running import running_canary
from state.registry import RegistryState, VersionRecord
from state.store import SnapshotStore
from stream.scorer.candidate_metrics import CandidateMetrics
from stream.scorer.serving import Served, load_version
from stream.scorer.trial import Trial

__all__ = ["CandidateKeeper", "NoRoom", "load_candidate"]

log = logging.getLogger(__name__)

# First and longest wait until a candidate that could not be read is tried again.
RETRY_S, MAX_RETRY_S = 0.5, 10.0


class NoRoom(Exception):
    """The spare memory has no room for the candidate."""


def load_candidate(store: SnapshotStore, record: VersionRecord, *, device: str, spare_bytes: int, taken_bytes: int) -> Served:
    """Read a candidate and make it ready, if there is room for it. Blocks.

    Args:
        spare_bytes: memory for weights that don't answer.
        taken_bytes: part of it that other weights have taken.

    Raises:
        NoRoom: there is no room for it.
        SnapshotError: the version is missing or isn't what its manifest says.
    """
    size, room = store.announced(record).serving_size, max(spare_bytes - taken_bytes, 0)
    if size > room:
        raise NoRoom(
            f"version {record.version}: expected room for {size / 1e6:,.3f} MB in the spare memory, found {room / 1e6:,.3f} MB "
            f"of {spare_bytes / 1e6:,.3f} MB. Raise scorer.spare_mb."
        )
    return load_version(store, record.version, device=device, announced=record)


class CandidateKeeper:
    """Owns the candidate. A batch of requests takes `trial` once and uses it to the end.

    Args:
        load: reads a version and makes it ready. Called in threads; raises NoRoom, or another error when it can't.
        on_change: called when `trial` or `problem` changes.
    """

    def __init__(
        self, load: Callable[[VersionRecord], Served], metrics: CandidateMetrics, *, on_change: Callable[[], None]
    ) -> None:
        self._load_version, self._metrics, self._on_change = load, metrics, on_change
        self.trial: Trial | None = None
        self.problem = ""
        """Why the candidate isn't ready; empty while it is, while it is read for the first time, and without a trial."""
        self.since_ms = 0
        """When `trial` changed last."""
        self._wanted: Canary | None = None
        self._record: VersionRecord | None = None
        self._loading: asyncio.Task[None] | None = None
        self._failures = 0
        self._retry: asyncio.TimerHandle | None = None

    @property
    def size(self) -> int:
        """Bytes of the candidate in memory."""
        return 0 if self.trial is None else self.trial.served.size

    def want(self, registry: RegistryState) -> None:
        """Take the registry: begin a trial, go on with it, or end it."""
        canary = running_canary(registry)
        before, self._wanted = self._wanted, canary
        if canary is None:
            self._record = None
            self._metrics.wanted(None)
            self._stop()
            self._note(None, "")
            return
        self._metrics.wanted(canary)
        if before is None or before.operation != canary.operation:
            self._record = registry.versions[canary.version]
            self._stop()
            self._note(None, "")
            self._load_soon()

    def damaged(self) -> None:
        """The candidate's memory has changed by itself: it takes no further part until it has been read again."""
        self._note(None, "its memory has changed by itself")
        self._load_soon()

    def scored(self, trial: Trial, by_candidate: int, left: int) -> None:
        """Count the requests of the share in one batch."""
        self._metrics.scored(trial.mode, by_candidate, left)

    async def close(self) -> None:
        """Stop loading."""
        self._wanted = None
        loading = self._loading
        self._stop()
        if loading is not None:
            await asyncio.wait([loading])

    def _stop(self) -> None:
        self._failures = 0
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._loading is not None:
            self._loading.cancel()
            self._loading = None

    def _load_soon(self) -> None:
        self._retry = None
        if self._loading is None and self._wanted is not None and self._record is not None:
            self._loading = asyncio.ensure_future(self._load(self._wanted, self._record))

    async def _load(self, canary: Canary, record: VersionRecord) -> None:
        try:
            served = await asyncio.to_thread(self._load_version, record)
        except Exception as error:  # whatever fails, the champion answers
            self._loading = None
            self._fail(canary, error)
            return
        self._loading = None
        self._failures = 0
        self._note(Trial(canary.mode, canary.share, served), "")
        log.info("version %d takes part in a %s of %g %% of the requests", canary.version, canary.mode, canary.share * 100)

    def _fail(self, canary: Canary, error: Exception) -> None:
        wait_s = min(RETRY_S * 2**self._failures, MAX_RETRY_S)
        self._failures += 1
        if not isinstance(error, NoRoom):
            self._metrics.failures.labels("load").inc()
        problem = " ".join(f"{error}".split()) or repr(error)
        if problem != self.problem:
            log.error("version %d can't be the candidate, trying again in %g s: %s", canary.version, wait_s, problem)
        self._note(None, problem)
        self._retry = asyncio.get_running_loop().call_later(wait_s, self._load_soon)

    def _note(self, trial: Trial | None, problem: str) -> None:
        if (trial, problem) == (self.trial, self.problem):
            return
        if trial is not self.trial:
            # A heartbeat tells changes apart by it, so no two have the same, whatever the clock does.
            self.since_ms = max(time.time_ns() // 1_000_000, self.since_ms + 1)
        self.trial, self.problem = trial, problem
        self._metrics.ready(trial, problem)
        self._on_change()
