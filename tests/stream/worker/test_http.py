"""Probes and scrapes are answered whatever other connections do."""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from stream.errors import StreamError
from stream.settings import HttpSettings
from stream.worker import http as server_module
from stream.worker.http import HttpServer

WORDS = {"problem": ""}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    monkeypatch.setattr(server_module, "PATIENCE_S", 1.0)
    registry = CollectorRegistry()
    for number in range(8):  # an answer of 8 MB, more than the buffers of a connection hold
        Gauge(f"gauge_{number}", "x" * 1_000_000, registry=registry)
    WORDS["problem"] = ""
    made = HttpServer(HttpSettings(), registry, healthy=lambda: None, ready=lambda: WORDS["problem"] or None)
    made.start()
    yield made
    made.stop()


def ask(server: HttpServer, path: str, method: str = "GET", within_s: float = 5.0) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=within_s)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()


def opened(server: HttpServer, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    connection.sendall(sent)
    return connection


def test_paths_and_methods(server: HttpServer) -> None:
    assert ask(server, "/healthz") == (200, b"ok\n")
    assert ask(server, "/healthz?from=a-probe") == (200, b"ok\n")
    WORDS["problem"] = "partition 3: taking over"
    assert ask(server, "/readyz") == (503, b"partition 3: taking over\n")
    assert ask(server, "/readyz", "HEAD") == (503, b"")
    status, body = ask(server, "/metrics")
    assert status == 200
    assert body.count(b"# TYPE gauge_") == 8
    assert ask(server, "/metrics", "HEAD") == (200, b"")
    assert ask(server, "/elsewhere")[0] == 404
    assert ask(server, "/healthz", "POST")[0] == 501


def test_another_role_answers_at_the_same_port(server: HttpServer) -> None:
    server.answer_by(healthy=lambda: "stopping", ready=lambda: None, says=lambda: "standby: another leads")
    assert ask(server, "/healthz") == (503, b"stopping\n")
    assert ask(server, "/readyz") == (200, b"standby: another leads\n")


@pytest.mark.parametrize(
    "sent", [b"", b"GET /hea", b"GET /healthz HTTP/1.1\r\nHost: a\r\n"], ids=["idle", "half a line", "half"]
)
def test_probes_are_answered_beside_200_connections_that_hold_on(server: HttpServer, sent: bytes) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(opened(server, sent)) for _ in range(200)]
        for path in ("/healthz", "/readyz", "/metrics"):
            began = time.monotonic()
            assert ask(server, path)[0] == 200
            assert time.monotonic() - began < 2.0
        time.sleep(1.6)
        assert all(connection.recv(100) in (b"",) or sent for connection in held), "those that do nothing are closed"
    assert not server._server._open


def test_a_slow_sender_and_a_slow_reader_are_closed(server: HttpServer) -> None:
    with opened(server) as slow, opened(server, b"GET /metrics HTTP/1.1\r\n\r\n") as deaf:
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 5.0:
                slow.sendall(b"G")
                time.sleep(0.1)
                assert ask(server, "/healthz") == (200, b"ok\n")
        assert time.monotonic() - began < 3.0, "the time-out is of the whole request, not of each byte"
        read = 0
        with contextlib.suppress(OSError):
            while data := deaf.recv(65_536):
                read += len(data)
        assert 0 < read < 8_000_000, "cut off in the middle"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", b"431"),
        (b"GET /healthz HTTP/1.1\r\n" + b"".join(b"X%d: 1\r\n" % n for n in range(500)) + b"\r\n", b"431"),
    ],
    ids=["TLS", "long path", "long header", "many headers"],
)
def test_garbage(server: HttpServer, sent: bytes, status: bytes, caplog: pytest.LogCaptureFixture, capfd) -> None:
    with contextlib.suppress(OSError), opened(server, sent) as connection:
        assert status in connection.recv(4_096)
    assert ask(server, "/healthz") == (200, b"ok\n")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert capfd.readouterr().err == ""


def test_a_broken_check_is_logged(server: HttpServer, caplog: pytest.LogCaptureFixture) -> None:
    WORDS.pop("problem")
    with pytest.raises((http.client.HTTPException, OSError)):
        ask(server, "/readyz")
    assert "answering 127.0.0.1 over HTTP failed" in caplog.text


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = rf"http.port {port}: expected a free port at 127.0.0.1, found: Address already in use\. .* goes on"
        with pytest.raises(StreamError, match=said):
            HttpServer(HttpSettings(port=port), CollectorRegistry(), healthy=lambda: None, ready=lambda: None)


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(StreamError, match=r"http.port 0: expected a free port at 192.0.2.1, found: Cannot assign"):
        HttpServer(HttpSettings(host="192.0.2.1"), CollectorRegistry(), healthy=lambda: None, ready=lambda: None)
