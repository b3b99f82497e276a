"""Keeps one replica of the weights at the newest delta of the champion's chain.

    choose a version ─▶ read it ─▶ read deltas from its offset on ─▶ each: prepare (a thread) ─▶ apply (between two batches)
          ▲                                  │
          └── refused again, damaged memory, the log doesn't lead to the champion ◀──┘

What was whole last goes on answering meanwhile. A version is read from the store only if it contains what the replica can't
apply, so a delta that is bad for every scorer makes none of them read the store. Scorers that heal wait a random time first.

Everything here runs in one task on the event loop. Only the reading of versions, `prepare` and the check of the memory run in
threads, and `apply` in the thread that scores.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager

from model.errors import DigestMismatch, ModelError
from state.chain import Problem, Step, on_delta, on_digest, on_problem, order
from state.chain_versions import LogSeen, before_champion, is_behind, is_beyond, leads_on, point_of, starts
from state.registry import RegistryState, VersionRecord
from stream.records.delta import DeltaHeader
from stream.scorer.following_metrics import FollowingMetrics
from stream.scorer.freshness import Freshness
from stream.scorer.replica import DeltaLog, Listener, LogItem, Replica, WholeDelta, offered_by
from stream.scorer.scrub import memory_is_right
from stream.scorer.serving import Served

__all__ = ["ChainFollower"]

log = logging.getLogger(__name__)

# How often the follower looks whether the end of the log is reached, and the champion overdue. There is neither to look for
# while the replica may answer and has the delta of the champion: news of the registry and of the log wake the follower then.
LOOK_S, QUIET_S = 0.2, 2.0
# A version is announced after its delta was committed. When the log hasn't brought the champion's delta this long after the
# champion's record was read, the log lacks it, or this scorer reads more slowly than the trainer writes: a version helps.
OVERDUE_S = 10.0
# Longest random wait before the log is read once more. Whatever went wrong is over by then, and a hundred scorers spread.
REREAD_S = 0.2
# How many deltas older than the newest version one may be that this machine has, for the store not to be read. 1,000 deltas are
# 4 minutes of training, and read and applied in some 10 s; a large version takes as long from a store.
CACHED_DELTAS = 1_000
# First and longest wait before the next attempt when no version or no log can be read.
RETRY_S, MAX_RETRY_S = 0.5, 10.0


# Reasons to replace the replica that don't depend on how far it is.
AT_ONCE = ("memory", "track")


class _Replace(Exception):
    """The replica must be replaced by a version; the text is a reason of `state.chain.REFUSALS`, or a problem's."""


class ChainFollower:
    """Follows the champion's chain while it is asked to.

    Args:
        load: reads a version; called in threads.
        open_log: opens the log of deltas at an offset.
        alone: runs a function between two batches, in the thread that scores.
        jitter_s: longest random wait before a version is read to heal.
        cached: whether this machine has a version, so that the store needn't be read for it; called in threads.
    """

    def __init__(
        self,
        load: Callable[[VersionRecord], Served],
        open_log: Callable[[int], AbstractAsyncContextManager[DeltaLog]],
        alone: Callable[[Callable[[], None]], Awaitable[None]],
        listener: Listener,
        metrics: FollowingMetrics,
        freshness: Freshness,
        *,
        jitter_s: float,
        cached: Callable[[VersionRecord], bool] = lambda record: False,
    ) -> None:
        self._load, self._open_log, self._alone = load, open_log, alone
        self._listener, self._metrics, self._freshness, self._jitter_s = listener, metrics, freshness, jitter_s
        self._cached = cached
        self.replica: Replica | None = None
        """The replica that answers or may; None before the first one is as far as it can be, and when nobody wants one."""
        self.problem = ""
        """Why the replica doesn't go on; empty while it does."""
        self._registry, self._wanted, self._replace = RegistryState(), False, ""
        self._growing: Replica | None = None  # the replica that the log is read for; `replica` once it is no older than that
        self._news = asyncio.Event()
        self._adopted: Replica | None = None  # what another follower has brought to the chain that is followed next
        self._uncovered_since: float | None = None
        self._follows_since_ms = 0  # when the first replica began to answer
        self._unreadable: set[int] = set()

    def want(self, registry: RegistryState, wanted: bool) -> None:
        """Take the registry, and whether a replica is wanted: because it answers, or aside, so that it can soon."""
        self._registry, self._wanted = registry, wanted
        self._news.set()

    def damaged(self) -> None:
        """The replica's memory isn't what was put into it: replace it."""
        self._replace = "memory"
        self._news.set()

    def moved(self, replica: Replica | None) -> None:
        """Another track serves: go on with this replica of its chain, or read one. The old one answers meanwhile."""
        self._replace, self._adopted = "track", replica
        self._news.set()

    async def run(self) -> None:
        """Follow, until cancelled."""
        failures = 0
        while True:
            self._news.clear()
            if not self._wanted:
                self.replica, self._growing, self._adopted, self.problem, self._replace = None, None, None, "", ""
                self._metrics.stopped()
                self._listener.dropped()
                await self._news.wait()
                continue
            try:
                await self._session()
                failures = 0
            except _Replace as why:
                self._replace = str(why)
                failures = 0
            except Exception as error:  # of the store, of Kafka: what was whole last goes on answering
                failures += 1
                wait_s = min(RETRY_S * 2 ** (failures - 1), MAX_RETRY_S) * random.uniform(0.5, 1.0)
                self._failed(error, wait_s)
                await self._news_or(wait_s)

    async def _session(self) -> None:
        """Read a version where one is needed, and the log from there on. Returns when the log must be opened anew."""
        if self._replace == "track" and self._adopted is not None:
            await self._alone(lambda: None)  # behind what its former follower has begun to apply
            self._growing, self._adopted, self._replace = self._adopted, None, ""
            self._mark(self._growing)
        replica = self._growing
        if replica is not None and not self._replace:
            async with self._open_log(replica.offset) as deltas:
                await self._read(replica, deltas)
            return
        found = self._candidates(replica)
        record = await self._nearest([each for each in found if each.version not in self._unreadable])
        if record is None:
            self._replace = ""
            self._cannot("no version of the champion's chain can be followed from")
            await self._news_or(MAX_RETRY_S)
            return
        if self._replace and self._replace != "behind" and not await asyncio.to_thread(self._cached, record):
            await asyncio.sleep(random.uniform(0, self._jitter_s))
        assert record.deltas_offset is not None  # of a version that can be followed from
        async with self._open_log(record.deltas_offset) as deltas:
            try:
                replica = self._growing = await self._begin(record, replica)
            except Exception as error:
                self._unreadable.add(record.version)
                if all(each.version in self._unreadable for each in found):
                    self._unreadable.clear()
                    raise
                log.warning("version %d can't be read, trying an older one: %s", record.version, error)
                return
            await self._read(replica, deltas)

    def _candidates(self, before: Replica | None) -> list[VersionRecord]:
        """The versions to begin with, the newest first. Where a chain broke, only those that have what broke it."""
        found, champion = starts(self._registry), self._registry.champion_record
        if before is None or before.progress.broken is None or self._replace in AT_ONCE:
            return found
        if champion is None or not before.covers(champion):
            return found
        return [record for record in found if is_beyond(before.progress, record)]

    async def _nearest(self, found: list[VersionRecord]) -> VersionRecord | None:
        """The newest of these versions, or a somewhat older one if this machine has that one.

        Where the log didn't lead on from the version before, the newest is taken, so that the same one isn't tried again.
        """
        if found and self._replace in ("", *AT_ONCE):
            newest = found[0]
            for record in (*found, *before_champion(self._registry)):
                if record.chain != newest.chain or (newest.sequence or 0) - (record.sequence or 0) > CACHED_DELTAS:
                    break
                if record.version not in self._unreadable and await asyncio.to_thread(self._cached, record):
                    return record
        return found[0] if found else None

    async def _begin(self, record: VersionRecord, before: Replica | None) -> Replica:
        began = time.perf_counter()
        served = await asyncio.to_thread(self._load, record)
        self._unreadable.clear()
        replica = Replica(served, record, before)
        champion = self._registry.champion_record
        if champion is not None and not replica.covers(champion):
            replica.answers_from = point_of(champion)
        replica.mark(self._registry.versions.values())
        why, self._replace = self._replace or "start", ""
        self._metrics.began(why, time.perf_counter() - began)
        log.info("following %s from version %d (%s)", replica.progress.point.chain, record.version, why)
        return replica

    async def _read(self, replica: Replica, deltas: DeltaLog) -> None:
        """Apply what the log brings, until it must be read anew. Raises _Replace."""
        if replica.progress.broken is None:
            self.problem = ""
        items, taken = aiter(deltas), replica.offset
        waiting: asyncio.Future[LogItem] = asyncio.ensure_future(_next(items))
        marked = self._registry
        try:
            while self._wanted:
                at_end = deltas.at_end and not waiting.done()  # an item that is here already has not been taken
                self._hand_over(replica, at_end=at_end)
                self._look(replica, deltas.position if at_end else taken)
                quiet = self.replica is replica and self._uncovered_since is None and not replica.is_left(self._registry)
                await self._news_or(QUIET_S if quiet else LOOK_S, waiting)
                if self._registry is not marked or self._news.is_set():
                    self._news.clear()
                    marked = self._registry
                    self._mark(replica)
                if not waiting.done():
                    continue
                item, waiting = waiting.result(), asyncio.ensure_future(_next(items))
                if await self._take(replica, item) == "reread":
                    return
                taken = item.next_offset
        finally:
            waiting.cancel()
            with contextlib.suppress(BaseException):
                await waiting

    def _hand_over(self, replica: Replica, *, at_end: bool) -> None:
        """Let a replica answer once it is no older than what answers, or has read all there is; never while it is left."""
        before, champion = self.replica, self._registry.champion_record
        if replica.is_left(self._registry):
            if at_end and not self._listener.is_serving:
                self._cannot("the log doesn't lead to the weights that the trainer went back to")
            return
        if before is replica:
            if self._listener.waits:
                self._listener.follow(replica)
            return
        if before is not None:
            ready = at_end or order(replica.progress.point) >= order(before.progress.point)
        elif self._listener.is_serving:
            ready = at_end and champion is not None and replica.covers(champion)
        else:
            ready = replica.answers_from is None or order(replica.progress.point) >= order(replica.answers_from)
        if not ready:
            return
        if before is None:
            self._follows_since_ms = time.time_ns() // 1_000_000
        self.replica, self.problem = replica, ""
        self._freshness.learned(replica.unanswered)
        replica.unanswered.clear()
        self._listener.follow(replica)
        self._metrics.follows(replica.served.state)

    def _look(self, replica: Replica, position: int) -> None:
        """Raise _Replace if a version must be read.

        Args:
            position: everything in the log before it has been taken.
        """
        if self._replace in AT_ONCE:
            raise _Replace(self._replace)
        champion, progress = self._registry.champion_record, replica.progress
        if champion is None or point_of(champion) is None:
            return  # nothing to follow: what is here goes on
        if replica.covers(champion):
            self._uncovered_since = None
        elif self._uncovered_since is None:
            self._uncovered_since = time.monotonic()
        overdue = self._uncovered_since is not None and time.monotonic() - self._uncovered_since > OVERDUE_S
        if is_behind(progress, replica.line, champion, LogSeen(position, overdue)):
            self._uncovered_since = None
            raise _Replace("behind" if progress.broken is None else progress.broken.reason)
        if progress.broken is not None and any(is_beyond(progress, record) for record in starts(self._registry)):
            raise _Replace(progress.broken.reason)
        if replica.is_left(self._registry) and leads_on(self._registry, position):
            raise _Replace("behind")

    async def _take(self, replica: Replica, item: LogItem) -> str:
        """Do what the rules say about one item. Returns what was done."""
        found = item.found
        if isinstance(found, Problem):
            step = on_problem(replica.progress, found)
        else:
            offered = offered_by(found.header)
            step = on_delta(replica.progress, offered)
            if step.act == "apply":
                refused = await self._apply(replica, found, item.next_offset)
                if refused is None:
                    return "applied"
                step = refused
        self._metrics.passed_over(step.reason)
        replica.progress = step.progress
        if step.act == "reread":
            reason = step.progress.refused
            log.warning("%s; reading it once more", "" if reason is None else reason.message)
            await asyncio.sleep(random.uniform(0, REREAD_S))
        elif step.progress.broken is not None and step.act in ("refuse", "wait"):
            await self._stay(replica, step)
        return step.act

    async def _apply(self, replica: Replica, delta: WholeDelta, next_offset: int) -> Step | None:
        """Put a delta into the weights. Returns what to do if it can't be."""
        offered, began = offered_by(delta.header), time.perf_counter()
        try:
            prepared = await asyncio.to_thread(replica.prepare, delta)
        except DigestMismatch as error:
            return on_digest(replica.progress, offered, str(error))
        except ModelError as error:
            return on_digest(replica.progress, offered, str(error), "unfit")
        version, took = replica.served.version, [0.0]
        prepared_s = time.perf_counter() - began

        def apply() -> None:
            start = time.perf_counter()
            replica.apply(prepared, delta, offered)
            took[0] = time.perf_counter() - start

        await self._alone(apply)
        replica.offset = next_offset
        if offered.parent.chain != offered.point.chain:
            replica.mark(self._registry.versions.values())
        self._metrics.applied(delta.header, prepared_s, took[0])
        self._note_arrivals(replica, delta.header)
        if replica is self.replica:
            self.problem = ""
            if replica.served.version != version:
                self._listener.renamed()
        return None

    def _note_arrivals(self, replica: Replica, header: DeltaHeader) -> None:
        """Note clicks that no answer knows yet. What was learned before this scorer followed, others have answered with."""
        if header.at_ms < self._follows_since_ms:
            return
        if replica is self.replica:
            self._freshness.learned(header.arrivals)
        elif self.replica is not None and order(replica.progress.point) > order(self.replica.progress.point):
            replica.unanswered.extend(header.arrivals)

    async def _stay(self, replica: Replica, step: Step) -> None:
        """The chain is broken for this replica. If that is because its own memory changed, a version is read."""
        broken = step.progress.broken
        assert broken is not None
        if broken.reason == "wrong_digest" and not await memory_is_right(replica.served.predictor):
            self._metrics.scrubbed(False)
            raise _Replace("memory")
        self.problem = f"{broken.reason}: {broken.message}"
        self._metrics.broke()
        log.error(
            "%s: going on with sequence %d of %s until a version or a new chain leads further",
            *(self.problem, replica.progress.point.sequence, replica.progress.point.chain),
        )

    def _mark(self, replica: Replica) -> None:
        version = replica.served.version
        replica.mark(self._registry.versions.values())
        if replica is self.replica and replica.served.version != version:
            self._listener.renamed()

    def _failed(self, error: Exception, wait_s: float) -> None:
        reason = " ".join(f"{error}".split()) or repr(error)
        log.error("the champion's chain can't be followed, trying again in %.1f s: %s", wait_s, reason)
        self._metrics.failures.inc()
        self._cannot(reason)

    def _cannot(self, reason: str) -> None:
        """Without a log, a replica may answer for as long as no newer champion is there. After that it has to catch up."""
        self.problem = reason
        champion, replica = self._registry.champion_record, self.replica
        if replica is None or champion is None or not replica.covers(champion) or replica.is_left(self._registry):
            self.replica = None
            self._listener.cannot_follow(reason)

    async def _news_or(self, seconds: float, other: asyncio.Future[LogItem] | None = None) -> None:
        """Wait for news of the registry, or for the log, at most this long."""
        news = asyncio.ensure_future(self._news.wait())
        try:
            waiting: list[asyncio.Future[object]] = [news] if other is None else [news, other]  # type: ignore[list-item]
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()


async def _next(items: AsyncIterator[LogItem]) -> LogItem:
    return await anext(items)
