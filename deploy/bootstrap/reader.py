"""Reads a data set in a process of its own, which encodes and decodes it while this process trains.

A thread would share the interpreter's lock with the training thread, whose many short operations would wait for the lock again
and again. The columns come through a pipe. When this process ends, even by kill -9, the other one ends at its next write.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, repeat
from multiprocessing.connection import Connection, Pipe
from types import TracebackType
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from deploy.bootstrap.source import Source, history
from deploy.errors import DataSetError, DeployError
from model.errors import ModelError
from model.features import FeatureBatch, FeatureDecoder

__all__ = ["Columns", "HistoryReader", "HistoryRecord", "Records"]

# Chunks that wait: the training thread has its next one at hand while another one comes through the pipe. Each has up to 8,192
# rows; 34 single-valued features are 2.2 MB.
WAITING = 3


class HistoryRecord(NamedTuple):
    """An impression of history in place of a record on the log. `offset` is its row in event-time order, from 0."""

    topic: str
    offset: int
    timestamp: int
    key: bytes
    partition: int = 0
    value: bytes | None = None
    headers: tuple[()] = ()


@dataclass(frozen=True, slots=True)
class Records(Sequence[HistoryRecord]):
    """The records of a chunk's rows, each made when it is asked for."""

    source: str
    first_row: int
    ids: Sequence[str]
    times_ms: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[HistoryRecord]:
        # Training asks for all of them: this takes a third of the time that one index after another takes.
        columns = count(self.first_row), self.times_ms.tolist(), map(str.encode, self.ids)
        return map(HistoryRecord, repeat(self.source), *columns)

    @overload
    def __getitem__(self, at: int) -> HistoryRecord: ...
    @overload
    def __getitem__(self, at: slice) -> Records: ...
    def __getitem__(self, at: int | slice) -> HistoryRecord | Records:
        if isinstance(at, slice):
            start, stop, _ = at.indices(len(self))
            return Records(self.source, self.first_row + start, self.ids[start:stop], self.times_ms[start:stop])
        if not 0 <= at < len(self):
            raise IndexError(at)
        return HistoryRecord(self.source, self.first_row + at, int(self.times_ms[at]), self.ids[at].encode())


@dataclass(frozen=True, slots=True)
class Columns:
    """N decoded impressions: row number of the first one, features, labels (N,) and event times (N,)."""

    first_row: int
    batch: FeatureBatch
    clicked: npt.NDArray[np.bool_]
    times_ms: npt.NDArray[np.int64]
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class _Request:
    source: Source
    first_row: int


@dataclass(frozen=True, slots=True)
class _Opened:
    total: int | None


@dataclass(frozen=True, slots=True)
class _Failed:
    message: str


class HistoryReader:
    """Reads a source from one of its rows on.

        with HistoryReader(source, first_row=0) as reader:
            reader.total                # impressions, about; None where that isn't known
            for columns in reader:
                ...

    Raises:
        DataSetError: on entering or while reading: there is no such data set, the pipeline would reject something in it, or the
            other process ended.
    """

    def __init__(self, source: Source, *, first_row: int = 0) -> None:
        self._source, self._first_row = source, first_row
        self._waiting: queue.Queue[Columns | _Failed | None] = queue.Queue(WAITING)
        self._closing = threading.Event()
        self.total: int | None = None

    def __enter__(self) -> HistoryReader:
        self._pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "deploy.bootstrap.reader", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the process has ended, as `_receive` finds
                self._pipe.send(_Request(self._source, self._first_row))
            opened = self._receive()
            if isinstance(opened, _Failed):
                raise DataSetError(opened.message)
            assert isinstance(opened, _Opened)
        except BaseException:
            self._end()
            raise
        self.total = opened.total
        self._thread = threading.Thread(target=self._fetch, name="history", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.set()
        self._process.kill()  # it holds nothing but what it reads
        self._thread.join()
        self._end()

    def __iter__(self) -> Iterator[Columns]:
        while (found := self._waiting.get()) is not None:
            if isinstance(found, _Failed):
                raise DataSetError(found.message)
            yield found

    def _end(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def _fetch(self) -> None:
        """Move what comes through the pipe into the queue."""
        while True:
            found = self._receive()
            assert not isinstance(found, _Opened)
            while not self._closing.is_set():
                with contextlib.suppress(queue.Full):
                    self._waiting.put(found, timeout=0.1)
                    break
            if self._closing.is_set() or not isinstance(found, Columns):
                return

    def _receive(self) -> _Opened | Columns | _Failed | None:
        try:
            found: _Opened | Columns | _Failed | None = self._pipe.recv()
            return found
        except (EOFError, OSError):
            return _Failed(
                f"{self._source.name}: expected the process that reads it to go on, found that it ended with exit code "
                f"{self._process.wait()}. Its own error is above; -9 means that it was killed, perhaps for want of memory."
            )


def _serve(pipe: Connection) -> None:
    """The other process: read, encode, decode, send."""
    request = pipe.recv()
    assert isinstance(request, _Request)
    source = request.source
    try:
        data_set = source.open()
        pipe.send(_Opened(source.total(data_set)))
        decoder = FeatureDecoder(source.schema)
        row = request.first_row
        for chunk in history(source, data_set, row):
            decoded = decoder.impressions(
                [b'{"impression_id":"","timestamp":0,"features":%b}' % each for each in chunk.features], chunk.timestamps_ms
            )
            if decoded.bad:
                first = decoded.bad[0]
                raise DataSetError(
                    f"{source.name}, impression {chunk.ids[first.index]!r}: expected features that the model can read, found "
                    f"{first.reason} at {first.path}: {first.message}. Fix the row, or the settings' features."
                )
            delays_ms = chunk.click_timestamps_ms - chunk.timestamps_ms
            clicked = chunk.clicked & (delays_ms <= source.window_ms)
            pipe.send(Columns(row, decoded.batch, clicked, chunk.timestamps_ms, chunk.ids))
            row += len(chunk)
        pipe.send(None)
    except (DeployError, ModelError) as error:
        pipe.send(_Failed(str(error)))
    except OSError as error:
        if isinstance(error, (BrokenPipeError, ConnectionResetError)):
            raise
        pipe.send(_Failed(f"{source.name}: expected to read it, found: {error}. Check the path."))


if __name__ == "__main__":
    import deploy.bootstrap.reader as reader  # so that the classes that go through the pipe have one name

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reads from here
    with contextlib.suppress(BrokenPipeError, EOFError, ConnectionResetError):
        reader._serve(Connection(int(sys.argv[1])))
