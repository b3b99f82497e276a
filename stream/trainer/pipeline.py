"""Two threads between the event loop and the model: one decodes runs, one trains. The event loop waits for neither.

    event loop ── runs ──▶ decoding ── columns ──▶ training
        ▲                     │ dead letters          │ captures
        └─────────────────────┴───────────────────────┘

Torch and Arrow release the GIL, so the three overlap. Both queues are short: a full queue holds back the event loop, the loop
holds back Faust's queue, and Faust's queue holds back the fetcher.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import torch

from stream.kafka.transport import Run
from stream.records.dead_letter import DeadLetter
from stream.trainer.examples import DecodedRun, ExampleDecoder
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.training import Training

__all__ = ["Owner", "Pipeline"]

T = TypeVar("T")

# Most runs from Kafka that wait: enough to keep the decoder busy. Each is up to 4 MiB.
RUNS_WAITING = 3
# Most decoded runs that wait: the training thread has its next one at hand while another is being decoded.
DECODED_WAITING = 2
# Longest sleep of an idle thread. It may notice a stop or a capture this much later.
NAP_S = 0.02


class Owner(Protocol):
    """What a pipeline reports to the worker that owns it."""

    def take_letters(self, letters: list[DeadLetter]) -> None:
        """Take dead letters. Called on the event loop.

        The letters of a run come before the run is trained, those of examples that were set aside in training before the next
        capture is answered.
        """

    def failed(self, what: str, error: BaseException) -> None:
        """A thread has failed. Must end the process, since runs are lost without that thread. Called in that thread."""


class Pipeline:
    """Runs `Training` in threads. Must be built on the event loop.

    Args:
        threads: number of threads that torch uses for training; 0 lets torch choose.
    """

    def __init__(
        self, owner: Owner, training: Training, decoder: ExampleDecoder, metrics: TrainerMetrics, *, threads: int = 0
    ) -> None:
        self.training = training
        self._owner, self._decoder, self._metrics = owner, decoder, metrics
        self._torch_threads = threads
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(RUNS_WAITING)
        self._runs: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._decoded: queue.Queue[DecodedRun] = queue.Queue(DECODED_WAITING)
        self._captures: queue.SimpleQueue[tuple[Future[Any], Callable[[Training], Any]]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(self._decode_runs,), name="decoding", daemon=True),
            threading.Thread(target=self._guarded, args=(self._train,), name="training", daemon=True),
        ]

    def start(self) -> None:
        """Start both threads."""
        self._metrics.watch_queue(self.waiting)
        for thread in self._threads:
            thread.start()

    def waiting(self) -> int:
        """Runs that were taken and are not in the training thread yet."""
        return self._runs.qsize() + self._decoded.qsize()

    async def put(self, run: Run) -> None:
        """Hand over a run; waits while RUNS_WAITING runs are waiting."""
        await self._room.acquire()
        self._runs.put(run)

    async def between_batches(self, capture: Callable[[Training], T]) -> T:
        """What `capture` returns. It runs in the training thread, as soon as the batch under way is trained.

        What it raises is raised here, and training goes on: the caller knows whether it can do without. A caller that doesn't
        handle it ends the process, since all of them are guarded (`stream.worker.guards`).
        """
        wanted: Future[T] = Future()
        self._captures.put((wanted, capture))
        return await asyncio.wrap_future(wanted)

    async def stop(self) -> None:
        """End both threads after the batch under way. What waits is not trained. The caller may use `training` afterwards."""
        self._stopping.set()
        self._runs.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._room.release()  # whoever waits to hand over a run goes on; nobody takes the run
        while not self._captures.empty():
            self._captures.get()[0].cancel()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._owner.failed(f"{threading.current_thread().name} thread", error)

    def _decode_runs(self) -> None:
        while (run := self._runs.get()) is not None and not self._stopping.is_set():
            began = time.perf_counter()
            decoded = self._decoder.decode(run)
            self._metrics.decode_seconds.observe(time.perf_counter() - began)
            if decoded.letters:
                self._loop.call_soon_threadsafe(self._owner.take_letters, decoded.letters)
            while not self._stopping.is_set():
                try:
                    self._decoded.put(decoded, timeout=NAP_S)
                    break
                except queue.Full:
                    continue
            self._loop.call_soon_threadsafe(self._room.release)

    def _train(self) -> None:
        if self._torch_threads:
            torch.set_num_threads(self._torch_threads)
        training = self.training
        while not self._stopping.is_set():
            self._answer_captures()
            now = time.monotonic()
            if training.step(now, more_at_hand=not self._decoded.empty()):
                if letters := training.take_set_aside():
                    self._loop.call_soon_threadsafe(self._owner.take_letters, letters)
                continue
            due = training.due_in_s(now)
            try:
                training.add(self._decoded.get(timeout=NAP_S if due is None else min(NAP_S, due)))
            except queue.Empty:
                continue

    def _answer_captures(self) -> None:
        while not self._captures.empty():
            wanted, capture = self._captures.get()
            if wanted.set_running_or_notify_cancel():
                try:
                    wanted.set_result(capture(self.training))
                except Exception as error:
                    wanted.set_exception(error)
