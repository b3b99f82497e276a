"""A link between a worker and a broker that can be cut, and can lose single answers, without any notice to either side."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType

__all__ = ["ADD_OFFSETS", "END_TRANSACTION", "INIT_PRODUCER", "PRODUCE", "TRANSACTION_OFFSETS", "Link"]

# Kafka's API keys of requests whose answers can be lost.
PRODUCE, INIT_PRODUCER, ADD_OFFSETS, END_TRANSACTION, TRANSACTION_OFFSETS = 0, 22, 25, 26, 28

SIZE_BYTES = 4  # before every request and answer


class Link:
    """Forwards Kafka connections on a free port of loopback to `port`; an async context manager.

    Attributes:
        lost: number of answers that were lost.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._losing, self._left, self._silently = -1, 0, False  # see `lose`
        self.lost = 0

    async def __aenter__(self) -> Link:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self._drop()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    def cut(self) -> None:
        """From now on no byte passes in either direction, and new connections get no answer."""
        self._open.clear()

    def restore(self) -> None:
        """Close all connections, as when a router forgets them; new connections pass."""
        self._drop()
        self._open.set()

    def lose(self, request: int, *, times: int, silently: bool) -> None:
        """Lose the next answers to a kind of request. The broker has carried out these requests.

        Args:
            request: its API key.
            times: number of answers.
            silently: the connection stays open without further bytes; otherwise it is closed.
        """
        self._losing, self._left, self._silently = request, times, silently

    def _drop(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        await self._open.wait()
        if writer.is_closing():
            return
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.close()
            return
        self._writers.add(there_writer)
        asked: dict[bytes, int] = {}  # correlation id → API key of the request
        for source, sink, answers in ((reader, there_writer, False), (there_reader, writer, True)):
            task = asyncio.ensure_future(self._pass_on(source, sink, asked, answers=answers))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, asked: dict[bytes, int], *, answers: bool
    ) -> None:
        """Forward frames: requests begin with API key (2 bytes), version (2) and correlation id (4), answers with the id."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                size = await source.readexactly(SIZE_BYTES)
                frame = await source.readexactly(int.from_bytes(size, "big"))
                if not answers:
                    asked[frame[4:8]] = int.from_bytes(frame[:2], "big")
                elif self._loses(asked.pop(frame[:4], -1)):
                    if not self._silently:
                        break
                    await asyncio.Event().wait()  # until this task is cancelled
                await self._open.wait()
                if sink.is_closing():
                    return
                sink.write(size + frame)
                await sink.drain()
        sink.close()

    def _loses(self, request: int) -> bool:
        """Whether the answer to a request is to be lost; counts it."""
        if request != self._losing or not self._left:
            return False
        self._left -= 1
        self.lost += 1
        return True
