"""A worker's HTTP server: `/metrics`, `/healthz`, `/readyz`."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from socketserver import ThreadingTCPServer
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, MetricsHandler

from stream.errors import StreamError
from stream.settings import HttpSettings

__all__ = ["HttpServer"]

log = logging.getLogger(__name__)

# Longest time from a connection to the end of its answer. A scrape of some hundred series takes milliseconds, and Prometheus
# waits 10 s.
PATIENCE_S = 10.0
# Most connections at once; each has a thread. Beyond that the oldest is closed, so that a probe is answered however many
# connections send nothing.
MOST_CONNECTIONS = 64
# How often the age of connections is checked.
LOOK_EVERY_S = 0.25


class Check(NamedTuple):
    """What a path answers by: the problem or None, and the text when there is none."""

    problem: Callable[[], str | None]
    says: Callable[[], str]


class HttpServer:
    """Answers in threads of its own, so that a worker with a busy event loop still answers.

    A connection that sends nothing, sends slowly or doesn't read its answer delays no other, and is closed after 10 s.

    Args:
        healthy: returns None when the process should live on, else what is wrong (`/healthz` answers 503).
        ready: returns None when the worker does its work, else what it waits for (`/readyz` answers 503).
        says: the text of `/readyz` when it answers 200.

    Raises:
        StreamError: the address can't be listened on.
    """

    def __init__(
        self,
        settings: HttpSettings,
        prometheus: CollectorRegistry,
        *,
        healthy: Callable[[], str | None],
        ready: Callable[[], str | None],
        says: Callable[[], str] = lambda: "ok",
    ) -> None:
        self._checks: dict[str, Check] = {}
        self.answer_by(healthy=healthy, ready=ready, says=says)
        kind = type("Handler", (_Handler,), {"registry": prometheus, "checks": self._checks})
        self._server = _listening(settings, kind)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(LOOK_EVERY_S,), name="http", daemon=True)

    def answer_by(
        self, *, healthy: Callable[[], str | None], ready: Callable[[], str | None], says: Callable[[], str] = lambda: "ok"
    ) -> None:
        """Answer by other functions from now on: a trainer that stood by and now leads keeps its port."""
        self._checks["/healthz"] = Check(healthy, lambda: "ok")
        self._checks["/readyz"] = Check(ready, says)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _listening(settings: HttpSettings, handler: type[_Handler]) -> _Server:
    try:
        return (
            _Server6((settings.host, settings.port), handler)
            if ":" in settings.host
            else _Server((settings.host, settings.port), handler)
        )
    except (OSError, OverflowError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise StreamError(
            f"http.port {settings.port}: expected a free port at {settings.host}, found: {found}. Nothing was changed, and a "
            "worker that has the port goes on. Set HEADRACE_HTTP__PORT to another port, or to 0 for a free one; or set the "
            "address, HEADRACE_HTTP__HOST, to one of this machine's."
        ) from error


class _Handler(MetricsHandler):
    """Answers one request for each connection."""

    checks: dict[str, Check]
    server_version = "Headrace"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.split("?", 1)[0]
        if path == "/metrics" and self.command == "GET":
            super().do_GET()
        elif path == "/metrics":
            self._answer(HTTPStatus.OK, "")
        elif path in self.checks:
            problem = self.checks[path].problem()
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE if problem else HTTPStatus.OK, problem or self.checks[path].says())
        else:
            self._answer(HTTPStatus.NOT_FOUND, "expected /metrics, /healthz or /readyz")

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, text: str) -> None:
        body = f"{text}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingTCPServer):
    """A thread for each connection, with limits on how long one lasts and on how many there are."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self._open: dict[socket.socket, float] = {}  # connection → when it was opened (monotonic), oldest first
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(PATIENCE_S)
        with self._lock:
            for oldest in list(self._open)[: len(self._open) + 1 - MOST_CONNECTIONS]:
                self._drop(oldest)
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Close connections that are too old: a socket's own time-out starts again with every byte.

        The server calls this after each new connection and every LOOK_EVERY_S.
        """
        with self._lock:
            for request, since in list(self._open.items()):
                if time.monotonic() - since > PATIENCE_S:
                    self._drop(request)

    def _drop(self, request: socket.socket) -> None:
        """Shut a connection down. Its thread then wakes with an error and closes the socket."""
        self._open.pop(request, None)
        try:
            request.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other end has closed it
            return

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error of ours. Connections that break off are not logged."""
        if not isinstance(sys.exception(), OSError):
            log.warning("answering %s over HTTP failed", client_address[0], exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6
