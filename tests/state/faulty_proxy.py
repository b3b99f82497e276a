"""An HTTP proxy before an object store that fails requests on purpose: it refuses, cuts off, is slow, ignores conditions."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit

__all__ = ["Fault", "FaultyProxy", "Request", "faulty_proxy"]

Fault = Literal[
    "unavailable",  # 503, and the store never hears of it
    "forbidden",  # 403
    "cut request",  # the connection ends in the middle of the request's body
    "cut answer",  # the store does it, and the connection ends before its answer
    "half answer",  # the connection ends in the middle of the answer's body
    "ignore condition",  # as a store does that doesn't know conditional puts
    "reject condition",  # 501, as a store does that doesn't have them
    "small pages",  # three names in a page of a listing
]


class Request(NamedTuple):
    """A request: its method, its path with the query, and whether it is a conditional put."""

    method: str
    path: str
    conditional: bool


class FaultyProxy:
    """What a proxy does: `plan` names the fault of each request, and `requests` has all of them."""

    def __init__(self) -> None:
        self.address = ""
        self.plan: Callable[[Request], Fault | None] = lambda request: None
        self.before_answer: Callable[[Request], None] = lambda request: None
        self.requests: list[Request] = []

    def fail(self, fault: Fault, *, times: int, method: str = "PUT", name: str = "") -> None:
        """Fail the next `times` requests of a method whose path ends with `name`, and pass the others on."""
        left = [times]

        def plan(request: Request) -> Fault | None:
            if request.method != method or not unquote(urlsplit(request.path).path).endswith(name) or not left[0]:
                return None
            left[0] -= 1
            return fault

        self.plan = plan

    def count(self, method: str, name: str = "") -> int:
        """How many requests of a method came whose path ends with `name`."""
        return sum(each.method == method and unquote(urlsplit(each.path).path).endswith(name) for each in self.requests)


@contextlib.contextmanager
def faulty_proxy(behind: str) -> Iterator[FaultyProxy]:
    """A proxy before the server at an address, until the end of the block."""
    proxy = FaultyProxy()
    target = urlsplit(behind).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are written apart, and each would wait 40 ms for the other

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _handle(self) -> None:
            request = Request(self.command, self.path, self.headers.get("If-None-Match") == "*")
            proxy.requests.append(request)
            fault = proxy.plan(request)
            length = int(self.headers.get("Content-Length") or 0)
            if fault == "cut request":
                self.rfile.read(length // 2)
                return self._cut()
            body = self.rfile.read(length)
            if fault in ("unavailable", "forbidden") or (fault == "reject condition" and request.conditional):
                code, name = {
                    "unavailable": (503, "SlowDown"),
                    "forbidden": (403, "AccessDenied"),
                    "reject condition": (501, "NotImplemented"),
                }[str(fault)]
                text = f"<Error><Code>{name}</Code><Message>on purpose</Message></Error>".encode()
                return self._answer(code, {"Content-Type": "application/xml"}, text)
            path = f"{self.path}&max-keys=3" if fault == "small pages" and "list-type=2" in self.path else self.path
            headers = dict(self.headers.items())
            if fault == "ignore condition":
                headers.pop("If-None-Match", None) or headers.pop("if-none-match", None)
            connection = http.client.HTTPConnection(target, timeout=60)
            try:
                connection.request(self.command, path, body=body, headers=headers)
                answer = connection.getresponse()
                data = answer.read()
            finally:
                connection.close()
            proxy.before_answer(request)
            if fault == "cut answer":
                return self._cut()
            found = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
            if fault == "half answer":
                self._answer(answer.status, found, data, send=len(data) // 2)
                return self._cut()
            size = answer.getheader("Content-Length") if self.command == "HEAD" else None
            return self._answer(answer.status, found, data, size=size)

        def _answer(
            self, code: int, headers: dict[str, str], data: bytes, *, send: int | None = None, size: str | None = None
        ) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", size or str(len(data)))
            self.end_headers()
            self.wfile.write(data[:send])

        def _cut(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _handle

    server = _Server(("127.0.0.1", 0), Handler)
    proxy.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that ends its connection early, after a time-out say, is no error here."""


_HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length")
