"""What a worker answers over HTTP: `/metrics`, `/healthz`, `/readyz`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from stream.settings import HttpSettings

__all__ = ["HttpServer"]


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes every few seconds are no news."""


class HttpServer:
    """Answers in a thread of its own, so that a busy event loop still says how it is.

    Args:
        healthy: None when the process should live on, else what is wrong (`/healthz` answers 503).
        ready: None when it does its work, else what it waits for (`/readyz` answers 503).
    """

    def __init__(
        self,
        settings: HttpSettings,
        registry: CollectorRegistry,
        *,
        healthy: Callable[[], str | None],
        ready: Callable[[], str | None],
    ) -> None:
        metrics = make_wsgi_app(registry)
        checks = {"/healthz": healthy, "/readyz": ready}

        def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            if path == "/metrics":
                return metrics(environ, start_response)
            if path not in checks:
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b"expected /metrics, /healthz or /readyz\n"]
            problem = checks[path]()
            start_response("503 Service Unavailable" if problem else "200 OK", [("Content-Type", "text/plain")])
            return [f"{problem or 'ok'}\n".encode()]

        self._server = make_server(settings.host, settings.port, application, WSGIServer, _Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
