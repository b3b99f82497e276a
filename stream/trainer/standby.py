"""A trainer before it leads: it has its state loaded, keeps that fresh, and waits.

    start ── look, load ──▶ join the group ── chosen ──▶ take the epoch, load what is newer, learn
                                 │   ▲
                                 ▼   │ a newer version was announced: load it aside, then replace the old state
                              stand by

Everything that could keep a trainer from starting is found before it joins the group, so a trainer that can't start never
leads. What a standby has loaded stays until something newer is whole in memory, whatever happens to the store meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from types import TracebackType

from aiokafka.errors import KafkaError
from prometheus_client import CollectorRegistry

from model.errors import ModelError
from state.errors import SnapshotError
from state.registry import RegistryState
from stream.errors import NoAnswer, PositionError, StreamError
from stream.kafka.cluster import Cluster, ClusterWatch
from stream.registry.follower import RegistryFollower
from stream.registry.log import read_registry
from stream.settings import HttpSettings, KafkaSettings, TrainerSettings
from stream.topics.names import TopicNames
from stream.trainer.leadership import Leadership
from stream.trainer.metrics import StandbyMetrics
from stream.trainer.prepare import Prepared
from stream.worker import Part, fatal, guarded
from stream.worker.http import HttpServer
from stream.worker.watchdog import Watchdog

__all__ = ["Standby"]

log = logging.getLogger(__name__)

# After a load a standby rests this many times as long as the load took, and one second at least. So it spends at most a fifth
# of its time on loading, and is behind by at most five loads: 45 s at 10 M rows, which take some 9 s.
REST = 4
REST_S = 1.0
# Log bounds that were read longer ago than this are read again when the trainer is chosen: retention may have deleted examples
# that it would begin with.
BOUNDS_S = 60.0
# How often to check whether a new leader has caught up. That is also how exact the reported time is.
CATCH_UP_S = 0.1

Look = Callable[[RegistryState], Awaitable[Prepared]]
PlaceAgain = Callable[[Prepared, RegistryState], Awaitable[Prepared]]


class Standby:
    """The process of a trainer until it leads, and what goes on beside the worker afterwards.

    ```python
    async with Standby(kafka, …) as standby:     # its HTTP server answers
        await standby.until_chosen()
        epoch = …                                # from here on no other trainer announces a version
        prepared = await standby.newest(registry)
        …
        standby.began(prepared, positions, batch_rows)
        await serve(worker, http=http, prometheus=prometheus, server=standby.server)
    ```

    SIGTERM and SIGINT end the block at once. `serve` replaces their handlers. At the end of the block the trainer leaves the
    group, and the next one leads.

    Args:
        look: loads the newest version that a registry knows (`stream.trainer.prepare.prepare`).
        place_again: reads the log's bounds again for a state that is loaded.
        take_over: replace a leader that is there.
        new_model: begin a new model. That takes over too, and doesn't wait where it can't.
    """

    def __init__(
        self,
        *,
        kafka: KafkaSettings,
        settings: TrainerSettings,
        names: TopicNames,
        cluster: Cluster,
        http: HttpSettings,
        prometheus: CollectorRegistry,
        who: str,
        look: Look,
        place_again: PlaceAgain,
        take_over: bool = False,
        new_model: bool = False,
    ) -> None:
        self._kafka, self._settings, self._names, self._http = kafka, settings, names, http
        self._look, self._place_again, self._new_model = look, place_again, new_model
        self._metrics = StandbyMetrics(prometheus)
        self._watch = ClusterWatch(kafka, cluster, changed=lambda error: fatal("trainer", error))
        self._news = asyncio.Event()
        self._follower = RegistryFollower(kafka, names, on_change=lambda state: self._news.set())
        self._leadership = Leadership(
            kafka,
            group=f"{names.prefix}{settings.group}{names.suffix}-leader",
            topic=names.snapshots,
            session_timeout_ms=settings.session_timeout_ms,
            who=who,
            loaded=self._loaded_version,
            take_over=take_over or new_model,
            lost=lambda error: fatal("trainer", error),
        )
        self._dog = Watchdog(self._parts, fatal)
        self._loaded: Prepared | None = None
        self._loaded_at_s = self._chosen_at_s = 0.0
        self._loading: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._main: asyncio.Task[object] | None = None
        self._stopping = self._began = False
        self.server = HttpServer(
            http,
            prometheus,
            healthy=lambda: "stopping" if self._stopping else None,
            ready=self.waiting_for,
            says=lambda: f"standby: {self._leadership.leader_name} leads",
        )
        """The process' HTTP server, before and after it leads."""

    async def __aenter__(self) -> Standby:
        self._main = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        self.server.start()
        log.info("trainer: http://%s:%d/metrics", self._http.host, self.server.port, extra={"http_port": self.server.port})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        asked_to_stop = self._stopping and isinstance(error, asyncio.CancelledError)
        if asked_to_stop and self._main is not None:
            self._main.uncancel()
        await self._cancel_tasks()
        await self._leadership.leave()
        await self._follower.close()
        self.server.stop()
        if asked_to_stop:
            log.info("trainer: stopped")
        if (error is None or asked_to_stop) and self._loading is not None and not self._loading.done():
            # A thread still reads from the store, and the interpreter would wait for it. It changes nothing, so it may end now.
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        return asked_to_stop

    def _stop(self) -> None:
        if not self._stopping and self._main is not None:
            self._stopping = True
            self._main.cancel()

    # Before this trainer leads

    async def until_chosen(self) -> None:
        """Load the newest state, join the group, and keep the state fresh until this trainer is chosen to lead.

        Raises:
            ModelError, SnapshotError, PositionError, TopicError, NoAnswer: as `run_trainer`.
            StreamError: the group doesn't let this trainer in, or a new model can't take over now.
        """
        await self._load(await read_registry(self._kafka, self._names))
        await self._follower.start()
        await self._leadership.join()
        membership = guarded(self._leadership.run(), "trainer")
        fresh = asyncio.ensure_future(self._keep_fresh())
        self._tasks = [membership, fresh, guarded(self._watch.run(), "trainer"), guarded(self._dog.run(), "trainer")]
        events = [self._leadership.won] + ([self._leadership.refused] if self._new_model else [])
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait([fresh, *waits], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if fresh.done():
            fresh.result()
        if not self._leadership.won.is_set():
            raise StreamError(f"a new model: {self._leadership.refusal} Nothing was changed.")
        self._chosen_at_s = time.monotonic()
        await self._cancel_tasks(but=membership)
        await self._follower.close()
        log.info("chosen to lead the trainers of group %s", self._leadership.group)

    def waiting_for(self) -> str | None:
        """What must happen before this trainer can take over; None when it can. Called by the HTTP thread."""
        if self._leadership.won.is_set():
            return "taking over"
        if self._loaded is None:
            return "loading the newest version"
        if self._watch.unanswered_s:
            return f"Kafka has not answered for {self._watch.unanswered_s:.0f} s"
        return None if self._leadership.choices else f"joining the group {self._leadership.group}"

    def _parts(self) -> Iterable[Part]:
        """What the watchdog looks after: the way into the group."""
        leadership = self._leadership
        outside = f"Kafka has not answered for {self._watch.unanswered_s:.0f} s" if self._watch.unanswered_s else None
        yield Part(f"the group {leadership.group}", leadership.choices, None if leadership.joined else "joining it", outside)

    async def _keep_fresh(self) -> None:
        """Load each newer version, as far as there is time. Ends with an error that no other version could end."""
        while True:
            await self._news.wait()
            self._news.clear()
            registry = self._follower.state
            if self._new_model or self._loaded is None:
                continue
            if self._loaded.newest == registry.newest and not registry.rewinds.left(self._loaded_version()):
                continue
            began_s = time.monotonic()
            try:
                await self._load(registry)
            except (ModelError, PositionError):
                raise
            except Exception as error:
                self._not_loaded(error)
                self._news.set()
            await asyncio.sleep(max(REST_S, REST * (time.monotonic() - began_s)))

    # Taking over

    async def newest(self, registry: RegistryState) -> Prepared:
        """The state to go on from, once no other trainer can announce a version.

        A version that is newer than the loaded one is loaded, for at most trainer.session_timeout_ms: if the store is slow or
        down, the trainer goes on from what it has. Both are exact, since the log has the examples in between. A version that a
        rewind left is never gone on from.

        Raises:
            ModelError, PositionError: as `run_trainer`.
            SnapshotError: the registry knows versions, none can be read, and none is loaded.
        """
        assert self._loaded is not None
        # A rewind that is asked for from here on isn't obeyed by what is loaded; the worker goes back then.
        wanted, rewind = registry.newest_to_start_from, registry.rewinds.pending
        if not self._new_model and self._loaded_version() != wanted and registry.versions:
            try:
                async with asyncio.timeout(self._settings.session_timeout_ms / 1000):
                    if self._loading is not None and not self._loading.done():
                        with contextlib.suppress(Exception):
                            await asyncio.shield(self._loading)
                    if self._loaded_version() != wanted:
                        await self._load(registry)
            except (ModelError, PositionError):
                raise
            except Exception as error:
                if self._loaded.start.version is None or registry.rewinds.left(self._loaded_version()):
                    raise
                self._not_loaded(error)
        if self._loaded.newest != registry.newest or time.monotonic() - self._loaded_at_s > BOUNDS_S:
            self._loaded = await self._place_again(self._loaded, registry)
        return replace(self._loaded, rewind=rewind)

    def began(self, prepared: Prepared, positions: Callable[[], Mapping[int, int]], batch_rows: int) -> None:
        """The trainer begins to learn. Reports when it has caught up.

        Args:
            positions: the next offset to train, by partition.
            batch_rows: rows of a full batch: fewer examples than that may wait for more.
        """
        self._began, self._loaded = True, None  # the weights belong to training now
        self._metrics.began(time.monotonic() - self._chosen_at_s)
        self._tasks.append(guarded(self._until_caught_up(prepared.ends, positions, batch_rows), "trainer"))

    async def _until_caught_up(
        self, ends: Mapping[int, int], positions: Callable[[], Mapping[int, int]], batch_rows: int
    ) -> None:
        def left() -> int:
            return sum(max(0, end - positions().get(partition, 0)) for partition, end in ends.items())

        behind = left()
        while True:
            await asyncio.sleep(CATCH_UP_S)
            if left() < batch_rows:
                break
        after_s = time.monotonic() - self._chosen_at_s
        self._metrics.caught_up(after_s)
        log.info("caught up %.1f s after being chosen to lead: %d offsets of the log", after_s, behind)

    # Loading

    async def _load(self, registry: RegistryState) -> None:
        """Load the newest version, and replace what is loaded by it. Goes on when it isn't waited for any more."""
        self._loading = asyncio.ensure_future(self._look_and_adopt(registry))
        self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # so that asyncio reports none
        await asyncio.shield(self._loading)

    async def _look_and_adopt(self, registry: RegistryState) -> None:
        self._adopt(await self._look(registry), registry)

    def _adopt(self, prepared: Prepared, registry: RegistryState) -> None:
        """Replace the loaded state, unless the new one is older: every version in between may be out of reach for a moment."""
        loaded = self._loaded
        if self._began:
            return
        older = loaded is not None and (prepared.start.version or 0) < (loaded.start.version or 0)
        if loaded is not None and older and not registry.rewinds.left(self._loaded_version()):
            raise SnapshotError(
                f"expected a version newer than {loaded.start.version}, which is loaded, found {prepared.start.version} as the "
                "newest that can be read"
            )
        self._loaded, self._loaded_at_s = prepared, time.monotonic()
        version, manifest = prepared.start.version, prepared.start.manifest
        self._metrics.loaded(version, 0 if manifest is None else manifest.created_at_ms)
        self._metrics.loads.labels("loaded").inc()

    def _not_loaded(self, error: Exception) -> None:
        assert self._loaded is not None
        self._metrics.loads.labels("failed").inc()
        expected = isinstance(error, (SnapshotError, NoAnswer, KafkaError, OSError))
        log.warning(
            "a newer version could not be loaded; version %s stays loaded: %s",
            self._loaded.start.version,
            "it took too long" if isinstance(error, TimeoutError) else error,
            exc_info=None if expected else error,
        )

    def _loaded_version(self) -> int:
        return -1 if self._loaded is None or self._loaded.start.version is None else self._loaded.start.version

    async def _cancel_tasks(self, but: asyncio.Task[None] | None = None) -> None:
        tasks, self._tasks = self._tasks, [] if but is None else [but]
        ending = [task for task in tasks if task is not but]
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending)
