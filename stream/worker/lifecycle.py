"""The life of a worker's process: start, serve until a signal comes, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal

from prometheus_client import CollectorRegistry

from stream.settings import HttpSettings
from stream.worker.collector import tame_collector
from stream.worker.guards import fatal, guarded
from stream.worker.http import HttpServer
from stream.worker.metrics import start_time
from stream.worker.skeleton import Worker
from stream.worker.watchdog import Watchdog

__all__ = ["serve"]

log = logging.getLogger(__name__)

# Longest time for draining. It must be shorter than the supervisor waits: docker kills after 10 s, Kubernetes after 30 s.
DRAIN_S = 9.0


async def serve(worker: Worker, *, http: HttpSettings, prometheus: CollectorRegistry, server: HttpServer | None = None) -> None:
    """Run a worker until SIGTERM or SIGINT, then drain it. Returns when all is closed; a crash ends the process with 1.

    The order is: `start`, the HTTP server, `before_joining`, the Faust app (which joins the group), and after a signal `drain`,
    the background tasks, the app. A signal that comes before the app has started cancels `before_joining`.

    Args:
        server: the process' HTTP server, if it answers already. From now on it answers for the worker; the caller stops it.
    """
    await worker.start()
    app, name, stop = worker.app, worker.name, asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    start_time(prometheus).labels(name).set_to_current_time()
    dog = Watchdog(worker.parts, fatal)

    def healthy() -> str | None:
        return "stopping" if stop.is_set() else None

    def ready() -> str | None:
        return "; ".join(filter(None, (worker.ready(), dog.stalled))) or None

    own = None
    if server is None:
        own = HttpServer(http, prometheus, healthy=healthy, ready=ready)
        own.start()
        log.info("%s: http://%s:%d/metrics", name, http.host, own.port, extra={"http_port": own.port})
    else:
        server.answer_by(healthy=healthy, ready=ready)
    ends = [asyncio.ensure_future(waiting) for waiting in (stop.wait(), app._crashed.wait())]
    helpers = [guarded(dog.run(), name), asyncio.ensure_future(tame_collector(worker.ready))]
    try:
        starting = asyncio.ensure_future(_join_group(worker))
        await asyncio.wait([starting, *ends], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            fatal(f"{name}: Faust crashed", app.crash_reason or RuntimeError("Faust crashed"))
        log.info("%s: draining", name)
        try:
            async with asyncio.timeout(DRAIN_S):
                if not app.started:
                    starting.cancel()
                    await asyncio.wait([starting])
                await worker.drain()
                await worker.cancel_background()
                with contextlib.suppress(asyncio.CancelledError):
                    if app.started:
                        await app.stop()
        except TimeoutError as error:
            fatal(f"{name}: did not drain within {DRAIN_S:.0f} s", error)
    finally:
        for task in (*ends, *helpers):
            task.cancel()
        await worker.cancel_background()
        if own is not None:
            own.stop()
    log.info("%s: stopped", name)


async def _join_group(worker: Worker) -> None:
    await worker.before_joining()
    worker.joins = True
    await worker.app.start()
