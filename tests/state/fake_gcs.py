"""A stand-in for Google Cloud Storage's XML API on the loopback, since no emulator of it can be installed with the tests.

It was written from Google's documentation and from the requests that obstore sends. So it shows that Headrace writes with the
condition `x-goog-if-generation-match: 0`, and works with a store that honours it. It doesn't show that Google's store does what
the documentation says, and it checks no credentials but that some are sent. It knows whole objects and byte ranges, listings by
prefix and delimiter in pages, and deletions.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

__all__ = ["TOKEN", "fake_gcs"]

TOKEN = "a bearer token of the tests"
PAGE = 3
"""Most names in one page of a listing, so that each test reads several pages. Google's store gives 1,000."""


class _Object(NamedTuple):
    data: bytes
    generation: int


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, _Object]
    lock: threading.Lock
    generations: Iterator[int]

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.headers["Authorization"] == f"Bearer {TOKEN}":
            return True
        self.send_error(401)
        return False

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            expected = self.headers["x-goog-if-generation-match"]
            found = self.objects.get(self._name)
            if expected is not None and int(expected) != (found.generation if found else 0):
                self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            self.objects[self._name] = made = _Object(data, next(self.generations))
        self._answer(200, b"", made)

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            self._list({name: values[0] for name, values in query.items()})
            return
        found = self.objects.get(self._name)
        if found is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        elif "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            part = found.data[int(first) : int(last) + 1]
            where = f"bytes {first}-{int(first) + len(part) - 1}/{len(found.data)}"
            self._answer(206, part, found, {"Content-Range": where})
        else:
            self._answer(200, found.data, found)

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        with self.lock:
            gone = self.objects.pop(self._name, None)
        self._answer(404 if gone is None else 204, b"")

    @property
    def _name(self) -> str:
        """Bucket and name of an object."""
        return unquote(urlsplit(self.path).path).lstrip("/")

    def _list(self, query: dict[str, str]) -> None:
        bucket, prefix, delimiter = self._name.strip("/"), query.get("prefix", ""), query.get("delimiter")
        with self.lock:
            objects = {name.removeprefix(f"{bucket}/"): each for name, each in self.objects.items()}
        entries: dict[str, _Object | None] = {}
        for name in sorted(name for name in objects if name.startswith(prefix)):
            folder, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            entries[f"{prefix}{folder}{delimiter}" if found else name] = None if found else objects[name]
        after = query.get("continuation-token", "")
        left = [name for name in entries if name > after]
        parts = []
        for name in left[:PAGE]:
            each = entries[name]
            if each is None:
                parts.append(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>")
                continue
            about = (
                f"<LastModified>2026-11-28T00:00:00.000Z</LastModified><ETag>{_tag(each)}</ETag><Size>{len(each.data)}</Size>"
            )
            parts.append(f"<Contents><Key>{escape(name)}</Key>{about}</Contents>")
        more = f"<NextContinuationToken>{escape(left[PAGE - 1])}</NextContinuationToken>" if len(left) > PAGE else ""
        self._answer(200, f"<ListBucketResult>{''.join(parts)}{more}</ListBucketResult>".encode())

    def _answer(self, status: int, data: bytes, found: _Object | None = None, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if found is not None:
            self.send_header("ETag", _tag(found))
            self.send_header("x-goog-generation", str(found.generation))
            self.send_header("Last-Modified", "Sat, 28 Nov 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


def _tag(found: _Object) -> str:
    return f'"{hashlib.md5(found.data).hexdigest()}"'


@contextlib.contextmanager
def fake_gcs() -> Iterator[str]:
    """The address of an empty store until the end of the block."""
    own = {"objects": {}, "lock": threading.Lock(), "generations": itertools.count(1)}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_OwnHandler", (_Handler,), own))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
