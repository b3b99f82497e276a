"""Dead letters of the trainer: written at least once, and before any version that relies on them.

They aren't part of a transaction, since the trainer's progress is in its versions and not in Kafka. After a crash, examples
since the last version are read again and their dead letters are written again. `source_topic`, `source_partition` and
`source_offset` name the record, so that a reader can recognise a repeat.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence

from aiokafka import AIOKafkaProducer

from stream.kafka.batches import BATCH_BYTES, send_batches
from stream.kafka.clients import aiokafka_options, quietly_stopped, started, written
from stream.records.dead_letter import DeadLetter
from stream.settings import KafkaSettings
from stream.topics.limits import DEFAULT_MAX_MESSAGE_BYTES, letter_limit
from stream.trainer.metrics import TrainerMetrics

__all__ = ["LetterBox"]


class LetterBox:
    """Sends letters in the order in which they are handed in. All methods belong to the event loop.

    Args:
        fatal: called when the broker doesn't take a letter. It must not return.
        wanted: whether letters are sent; else they are only counted. Of the trainers of several tracks, which read the same
            examples, that of the track that serves sends them.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        topic: str,
        partitions: int,
        metrics: TrainerMetrics,
        fatal: Callable[[str, BaseException], object],
        *,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._kafka, self._topic, self._partitions = kafka, topic, partitions
        self._metrics, self._fatal, self._wanted = metrics, fatal, wanted
        self._waiting: list[DeadLetter] = []
        self._arrived = asyncio.Event()
        self._progress = asyncio.Condition()
        self._max_bytes = DEFAULT_MAX_MESSAGE_BYTES
        self._producer: AIOKafkaProducer | None = None
        self._task: asyncio.Task[None] | None = None
        self.written = 0
        """Number of letters that the broker has."""
        self._taken = 0

    async def start(self) -> None:
        self._max_bytes = await letter_limit(self._kafka, self._topic)
        producer = AIOKafkaProducer(
            **aiokafka_options(self._kafka),
            enable_idempotence=True,
            max_batch_size=BATCH_BYTES,
            max_request_size=1 << 30,  # the topic's limit decides
        )
        self._producer = await started(self._kafka, producer, "a producer of dead letters")
        self._task = asyncio.ensure_future(self._send_all())

    def put(self, letters: Sequence[DeadLetter]) -> None:
        """Take letters, to be sent in the background."""
        self._taken += len(letters)
        self._waiting.extend(letters)
        self._arrived.set()

    async def written_up_to(self, count: int) -> None:
        """Wait until the first `count` letters ever handed in are written, and also all that are handed in by now.

        `count` alone is not enough: letters of examples that were set aside in training lie anywhere among those of decoded
        runs.
        """
        count = max(count, self._taken)
        async with self._progress:
            await self._progress.wait_for(lambda: self.written >= count)

    async def _send_all(self) -> None:
        try:
            while True:
                await self._arrived.wait()
                self._arrived.clear()
                letters, self._waiting = self._waiting, []
                await self._send(letters)
                async with self._progress:
                    self.written += len(letters)
                    self._progress.notify_all()
        except Exception as error:
            self._fatal(f"writing dead letters to {self._topic}", error)

    async def _send(self, letters: list[DeadLetter]) -> None:
        by_partition: dict[int, list[DeadLetter]] = defaultdict(list)
        for letter in letters:
            by_partition[letter.partition % self._partitions].append(letter)
            self._metrics.dead_letters.labels(letter.reason).inc()
        if not self._wanted():
            return
        futures = [
            future
            for partition, group in by_partition.items()
            for future in await send_batches(
                self._producer, self._topic, partition, (each.outgoing(self._max_bytes) for each in group)
            )
        ]
        await written(self._kafka, futures, f"dead letters to {self._topic}")

    async def close(self) -> None:
        """Disconnect. Letters that aren't written yet are made again after the next start."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._producer is not None:
            await quietly_stopped(self._producer.stop)
