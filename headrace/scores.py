"""Answers of the scorers: decoding them, following them, and waiting for one's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from headrace.connections import connect
from headrace.errors import DeliveryError, HeadraceError

__all__ = ["Answer", "AnswerError", "AnswerRouter", "Score", "ScoreStream", "decode_answer"]

_POLL_MS = 200  # how soon a closed stream notices; records wake the poll at once


class Score(msgspec.Struct, frozen=True):
    """The predicted click probability of one candidate."""

    id: str
    score: float


class AnswerError(msgspec.Struct, frozen=True):
    """Why a request couldn't be scored: a reason code, where in the request, and words for people."""

    reason: str
    path: str = ""
    message: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.reason, self.message) if part)


class _Value(msgspec.Struct, frozen=True):
    request_id: str
    scores: list[Score] = []
    model_version: int | None = None
    snapshot_age_ms: int | float | None = None
    error: AnswerError | None = None
    stale: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """One record of the live score topic.

    Answers come at least once: the same `request_id` may be seen twice. When `error` is not None the request couldn't be
    scored and `scores` is empty. `event` holds the CloudEvents attributes (`id`, `source`, `type`, `time`, …).
    """

    request_id: str
    scores: list[Score]
    model_version: int | None
    snapshot_age_ms: float | None
    error: AnswerError | None = None
    stale: bool = False
    event: dict[str, str] = field(default_factory=dict)
    partition: int = -1
    offset: int = -1

    def best(self) -> Score:
        """The candidate with the highest probability. Raises HeadraceError for an answer without scores."""
        if not self.scores:
            raise HeadraceError(
                f"request {self.request_id!r}: expected scores, found none ({self.error or 'no reason given'}). "
                "Check `answer.error` before asking for the best."
            )
        return max(self.scores, key=lambda score: score.score)


_decode_value = msgspec.json.Decoder(_Value).decode


def decode_answer(record: Any) -> Answer:
    """From a kafka-python record of `scores`.

    Raises:
        HeadraceError: the value is not what the contract says.
    """
    try:
        value = _decode_value(record.value or b"")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HeadraceError(
            f"{record.topic}/{record.partition} offset {record.offset}: expected the answer of a scorer, found: {error}. "
            "Check that only scorers write to this topic."
        ) from error
    return Answer(
        request_id=value.request_id,
        scores=value.scores,
        model_version=value.model_version,
        snapshot_age_ms=value.snapshot_age_ms,
        error=value.error,
        stale=value.stale,
        event={
            name.removeprefix("ce_"): (content or b"").decode("utf-8", "replace")
            for name, content in record.headers
            if name.startswith("ce_")
        },
        partition=record.partition,
        offset=record.offset,
    )


class ScoreStream:
    """The live score topic, all partitions, no consumer group: every stream sees every answer.

    Iterate over it (it never ends by itself; `close` from any thread ends it), or call `poll`. One thread reads.
    Opening it waits until the positions are known: what is asked afterwards is answered where the stream can see it.
    """

    def __init__(self, topic: str, options: dict[str, Any], *, from_beginning: bool = False) -> None:
        self._topic = topic
        self._closing = threading.Event()
        self._consumer = connect(KafkaConsumer, options, enable_auto_commit=False, auto_offset_reset="earliest")
        try:
            partitions = self._consumer.partitions_for_topic(topic)
            if not partitions:
                raise DeliveryError(
                    f"topic {topic!r}: expected the topic of answers, found none. Run `headrace topics create`, or check "
                    "topic_prefix."
                )
            assigned = [TopicPartition(topic, partition) for partition in sorted(partitions)]
            self._consumer.assign(assigned)
            seek = self._consumer.seek_to_beginning if from_beginning else self._consumer.seek_to_end
            seek(*assigned)
            for partition in assigned:
                self._consumer.position(partition)
        except BaseException:
            self._consumer.close()
            raise

    def poll(self, timeout_ms: int = _POLL_MS) -> list[Answer]:
        """The next answers, none when nothing came within the time. Raises HeadraceError."""
        polled = self._consumer.poll(timeout_ms=timeout_ms)
        return [decode_answer(record) for records in polled.values() for record in records]

    def __iter__(self) -> Iterator[Answer]:
        try:
            while not self._closing.is_set():
                yield from self.poll()
        finally:
            self._consumer.close()

    def stop(self) -> None:
        """End the iteration soon; safe from any thread."""
        self._closing.set()

    def close(self) -> None:
        """Leave the topic; for the thread that reads."""
        self.stop()
        self._consumer.close()

    def __enter__(self) -> ScoreStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AnswerRouter:
    """Reads `scores` in a thread of its own and gives each answer to the one who asked.

    An answer to somebody else's request, and a second answer to the same request, are dropped.
    """

    def __init__(self, topic: str, options: dict[str, Any]) -> None:
        self._stream = ScoreStream(topic, options)
        self._waiting: dict[str, Future[Answer]] = {}
        self._lock = threading.Lock()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="headrace-answers", daemon=True)
        self._thread.start()

    def expect(self, request_id: str) -> Future[Answer]:
        """A future for the answer; call it before the request is sent.

        Raises:
            HeadraceError: the same id is already waited for, or the reading thread has died.
        """
        future: Future[Answer] = Future()
        with self._lock:
            if self._failed is not None:
                raise DeliveryError(
                    f"answers: the thread that reads them has stopped ({self._failed}). Make a new Client."
                ) from self._failed
            if request_id in self._waiting:
                raise HeadraceError(
                    f"request {request_id!r}: expected an id that isn't waited for, found it outstanding. Use each id once."
                )
            self._waiting[request_id] = future
        return future

    def forget(self, request_id: str) -> None:
        """Stop waiting for an answer."""
        with self._lock:
            self._waiting.pop(request_id, None)

    def close(self) -> None:
        """Stop reading; whoever still waits gets an error."""
        self._stream.stop()
        self._thread.join()

    def _run(self) -> None:
        reason: BaseException = DeliveryError("answers: the client was closed while a request was outstanding.")
        try:
            for answer in self._stream:
                with self._lock:
                    future = self._waiting.pop(answer.request_id, None)
                if future is not None and future.set_running_or_notify_cancel():
                    future.set_result(answer)
        except (KafkaError, HeadraceError, OSError) as error:
            reason = error
        finally:
            with self._lock:
                self._failed = reason
                left = list(self._waiting.values())
                self._waiting.clear()
            for future in left:
                if future.set_running_or_notify_cancel():
                    future.set_exception(reason)
