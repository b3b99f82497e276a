"""What every worker shares: the Faust app's options, its life from start to drain, and the way out when something is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NoReturn, Protocol

from aiokafka.errors import KafkaError
from faust.types import TP
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from stream.kafka.clients import faust_options
from stream.kafka.cluster import ClusterWatch
from stream.kafka.transport import RunApp
from stream.settings import HttpSettings, KafkaSettings
from stream.worker.http import HttpServer
from stream.worker.watchdog import Part, Watchdog

__all__ = ["Worker", "build_app", "fatal", "new_registry", "serve", "source_part", "start_time", "tame_collector"]

log = logging.getLogger(__name__)

# When Python looks for cycles among young objects: when so many more were made than went. By default that is 700, and a run of
# records alone is thousands: a quarter of the join's CPU went into looking at records that had no cycles. The hot paths make
# none (tests/stream/worker/test_collector.py), so this is for errors and rebalances; 200,000 objects are some 50 MB.
YOUNG_OBJECTS = 200_000
# How often it is looked whether a worker is ready, so that what it has loaded by then is left out of every later search.
FREEZE_LOOK_S = 1.0

# Draining must end before the supervisor's patience does; docker and Kubernetes kill after 10 and 30 s.
DRAIN_S = 9.0
# An idle partition's fetch is answered four times a second (stream/kafka/transport.py).
STALE_FETCH_MS = 10_000
# aiokafka leaves the group when nothing was fetched for so long, and a rebuild fetches nothing. A day: the watchdog looks after
# progress, and a rebuild of any length must not end by losing what it is for. (How long the others wait for a member that
# doesn't rejoin is the rebalance timeout, 60 s.)
MAX_POLL_INTERVAL_S = 86_400.0


def fatal(what: str, error: BaseException) -> NoReturn:
    """End the process at once: the log is read again by whoever comes next, and nothing half decided goes out.

    The log gets one line; with the traceback where the error is none that is written for people or comes from outside.
    """
    ours = type(error).__module__ in ("model.errors", "state.errors", "stream.errors")
    log.critical(
        "%s: %s The process ends, and takes up its work again from the log when it is started.",
        *(what, error if ours else f"{type(error).__name__}: {error}." if isinstance(error, OSError) else f"{error!r}."),
        exc_info=None if ours or isinstance(error, (KafkaError, OSError)) else error,
    )
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def new_registry() -> CollectorRegistry:
    """A metrics registry with the process' own figures."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def start_time(registry: CollectorRegistry) -> Gauge:
    """The one metric of ours that every worker has."""
    return Gauge("headrace_worker_start_time_seconds", "When this worker started.", ["worker"], registry=registry)


def build_app(
    group: str,
    kafka: KafkaSettings,
    *,
    next_offset: Callable[[TP], int | None],
    session_timeout_ms: int,
    instance_id: str | None = None,
) -> RunApp:
    """A Faust app that does membership, rebalances, agents and supervision, and nothing else: no tables, no web, no commits.

    With an `instance_id` membership is static: a worker that comes back within the session timeout takes up its partitions
    at once and without a rebalance.
    """
    return RunApp(
        group,
        next_offset=next_offset,
        loop=asyncio.get_running_loop(),
        broker_session_timeout=session_timeout_ms / 1000,
        broker_heartbeat_interval=session_timeout_ms / 3000,
        broker_max_poll_interval=MAX_POLL_INTERVAL_S,
        broker_max_poll_records=20_000,  # of one fetch, all partitions together; FETCH_MAX_BYTES bounds each
        # Every start seeks; should a position fall off the log's end, that is an error and never a silent skip.
        consumer_auto_offset_reset="none",
        consumer_group_instance_id=instance_id,
        # Of Faust's queue between its consumer and an agent, in runs: `app.topic(maxsize=…)` is dropped by Faust 0.15.3. What
        # waits is bounded by bytes (stream/kafka/transport.py); this is so that it waits where revoked or paused partitions are
        # let go of at once.
        stream_buffer_maxsize=4,
        stream_wait_empty=False,
        stream_recovery_delay=0.0,
        # With 0 and no tables Faust takes a round-robin assignor, which may split the partitions of two topics.
        table_standby_replicas=1,
        topic_disable_leader=True,
        topic_allow_declare=False,
        web_enabled=False,
        autodiscover=False,
        store="memory://",
        **faust_options(kafka),
    )


async def tame_collector(ready: Callable[[], str | None]) -> None:
    """Let the cyclic garbage collector run seldom, and once the worker is ready no more over what it began with."""
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)
    while ready() is not None:  # noqa: ASYNC110
        await asyncio.sleep(FREEZE_LOOK_S)
    gc.collect()
    gc.freeze()


def source_part(app: RunApp, watch: ClusterWatch, tp: TP, position: int) -> Part:
    """A partition of a source, for the watchdog: up to `position` its records are worked up and committed.

    It has work while its log goes on beyond that, and also while no fetch has been answered for a while: then nobody knows.
    """
    name, end = f"{tp.topic}, partition {tp.partition}", app.consumer.log_end(tp)
    waiting = None
    if end is not None and end.offset > position:
        waiting = f"records from offset {position} to {end.offset} waiting"
    elif end is None or time.time() * 1000 - end.seen_at_ms > STALE_FETCH_MS:
        waiting = "no fetch answered"
    outside = None
    if (tp.topic, tp.partition) in watch.leaderless:
        outside = "no broker leads it"
    elif watch.unanswered_s:
        outside = f"Kafka has not answered for {watch.unanswered_s:.0f} s"
    return Part(name, position, waiting, outside)


class Worker(Protocol):
    """What `serve` runs."""

    app: RunApp

    def ready(self) -> str | None:
        """What it is still waiting for, None when nothing."""

    async def drain(self) -> None:
        """End what is under way, and close everything."""

    def parts(self) -> Iterable[Part]:
        """What the watchdog looks after."""


async def serve(
    worker: Worker,
    *,
    name: str,
    http: HttpSettings,
    registry: CollectorRegistry,
    first: Callable[[], Awaitable[None]] | None = None,
    beside: Sequence[Callable[[], Awaitable[None]]] = (),
) -> None:
    """Run a worker until SIGTERM or SIGINT, then drain it. Returns when all is closed; a crash ends the process with 1.

    Args:
        first: what must be done before the worker joins its group; `/metrics` and `/healthz` answer already. It is cancelled
            when the worker is stopped meanwhile.
        beside: what runs from the start until the draining begins; an exception of it ends the process.
    """
    app, stop = worker.app, asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    start_time(registry).labels(name).set_to_current_time()
    dog = Watchdog(worker.parts, fatal)
    server = HttpServer(
        http,
        registry,
        healthy=lambda: "stopping" if stop.is_set() else None,
        ready=lambda: "; ".join(filter(None, (worker.ready(), dog.stalled))) or None,
    )
    server.start()
    log.info("%s: http://%s:%d/metrics", name, http.host, server.port, extra={"http_port": server.port})
    tasks = [asyncio.ensure_future(waiting) for waiting in (stop.wait(), app._crashed.wait(), dog.run())]
    tasks += [asyncio.ensure_future(work()) for work in beside]
    collector = asyncio.ensure_future(tame_collector(worker.ready))
    try:
        starting = asyncio.ensure_future(_start(app, first))
        await asyncio.wait([starting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            for task in tasks[2:]:
                if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                    fatal(name, error)
            reason = app.crash_reason or RuntimeError("Faust crashed")
            fatal(f"{name}: Faust crashed", reason)
        log.info("%s: draining", name)
        try:
            async with asyncio.timeout(DRAIN_S):
                if not app.started:
                    starting.cancel()
                    await asyncio.wait([starting])
                await worker.drain()
                with contextlib.suppress(asyncio.CancelledError):
                    if app.started:
                        await app.stop()
        except TimeoutError as error:
            fatal(f"{name}: did not drain within {DRAIN_S:.0f} s", error)
    finally:
        for task in (*tasks, collector):
            task.cancel()
        server.stop()
    log.info("%s: stopped", name)


async def _start(app: RunApp, first: Callable[[], Awaitable[None]] | None) -> None:
    if first is not None:
        await first()
    await app.start()
