"""Answers of the scorers: decodes them, follows all of them, and waits for the answers to one's own requests."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import msgspec
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, UnsupportedCodecError

from headrace.arguments import check_wait
from headrace.connections import OPEN_MS, connect, one_line
from headrace.errors import DeliveryError, HeadraceError, InvalidAnswer
from headrace.lifetime import Lifetime

__all__ = ["Answer", "AnswerError", "AnswerRouter", "Score", "ScoreStream", "decode_answer"]

log = logging.getLogger(__name__)

_POLL_MS = 200  # how soon a closed stream ends; a record ends the poll at once


class Score(msgspec.Struct, frozen=True):
    """The predicted click probability of one candidate. `shadow` is that by a version on trial, where there is one."""

    id: str
    score: float
    shadow: float | None = None


class AnswerError(msgspec.Struct, frozen=True):
    """Why a request couldn't be scored: a reason code, the path within the request, and a message for people."""

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
    delta: int = 0
    shadow_version: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One record of the live score topic.

    Answers are sent at least once: the same `request_id` may arrive twice. When `error` is not None, the request couldn't be
    scored and `scores` is empty. `delta` is the number of updates of the weights since `model_version`. `shadow_version`
    is a version on trial, which gave the scores called `shadow`. `event` holds the CloudEvents attributes (`id`, `source`,
    `type`, `time`, …).
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
    delta: int = 0
    shadow_version: int | None = None

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
    """The answer in a kafka-python record of the topic `scores`.

    Raises:
        InvalidAnswer: the value is not an answer as the contract defines it.
    """
    try:
        value = _decode_value(record.value or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidAnswer(
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
        delta=value.delta,
        shadow_version=value.shadow_version,
    )


class ScoreStream:
    """A reader of the live score topic, all partitions, without a consumer group: every stream reads every answer.

    Iterate over the stream, or call `poll`. The iteration ends only after `close`, which any thread may call. One thread at a
    time reads.

    The constructor waits until the positions are known, so that the stream reads the answer to every later request.
    """

    def __init__(self, topic: str, options: dict[str, Any], *, from_beginning: bool = False) -> None:
        self._topic = topic
        self._lifetime = Lifetime("scores", "Subscribe again")
        self._reading = threading.Lock()  # kafka-python's consumer takes one thread at a time
        self._records: deque[Any] = deque()
        self._failed: HeadraceError | None = None
        self._consumer = connect(KafkaConsumer, options, enable_auto_commit=False, auto_offset_reset="earliest")
        try:
            self._find_positions(from_beginning)
        except KafkaError as error:
            self._consumer.close(timeout_ms=_POLL_MS)
            raise self._unreadable(error) from error
        except BaseException:
            self._consumer.close(timeout_ms=_POLL_MS)
            raise

    def poll(self, timeout_ms: int = _POLL_MS) -> list[Answer]:
        """The next answers; an empty list when none came within the time.

        Raises:
            InvalidAnswer: a record is not an answer. The next call continues with the record after it.
            HeadraceError: the topic can't be read; the message has the reason. Every later call raises it, too: subscribe anew.
            UnusableClient: the stream is closed, or was made before this process was forked.
        """
        until = time.monotonic() + check_wait(timeout_ms, "timeout_ms") / 1_000
        while True:
            self._lifetime.check_process()
            with self._reading:  # for a moment at a time, so that `close` gets its turn
                self._lifetime.check()
                if not self._records:
                    left_ms = max(0.0, until - time.monotonic()) * 1_000
                    self._records.extend(self._fetch(min(_POLL_MS, left_ms)))
                answers = self._decoded()
            if answers or time.monotonic() >= until:
                return answers

    def __iter__(self) -> Iterator[Answer]:
        while not self._lifetime.closed:
            yield from self.poll()

    def close(self) -> None:
        """Disconnect, from any thread. Closing a closed stream does nothing."""
        self._lifetime.check_process()
        self._lifetime.closed = True
        with self._reading:
            self._consumer.close(timeout_ms=_POLL_MS)

    def __enter__(self) -> ScoreStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or not self._lifetime.forked:
            self.close()

    def __reduce__(self) -> Any:
        raise self._lifetime.refuse_to_travel()

    def _find_positions(self, from_beginning: bool) -> None:
        partitions = self._consumer.partitions_for_topic(self._topic)
        if not partitions:
            raise DeliveryError(
                f"topic {self._topic!r}: expected the topic of answers, found none. Run `headrace topics create`, or check "
                "topic_prefix."
            )
        assigned = [TopicPartition(self._topic, partition) for partition in sorted(partitions)]
        self._consumer.assign(assigned)
        seek = self._consumer.seek_to_beginning if from_beginning else self._consumer.seek_to_end
        seek(*assigned)
        for partition in assigned:
            if self._consumer.position(partition, timeout_ms=OPEN_MS) is None:
                raise DeliveryError(
                    f"{self._topic}/{partition.partition}: expected its end within {OPEN_MS} ms, found no answer of its "
                    "leader. Check the brokers."
                )

    def _fetch(self, timeout_ms: float) -> list[Any]:
        if self._failed is not None:
            raise self._failed
        try:
            polled = self._consumer.poll(timeout_ms=timeout_ms)
        except Exception as error:  # kafka-python passes on what its decompressors raise, and each has errors of its own
            # After a batch that kafka-python couldn't unpack, its next poll would never return.
            self._failed = self._unreadable(error)
            raise self._failed from error
        return [record for records in polled.values() for record in records]

    def _decoded(self) -> list[Answer]:
        """The fetched answers before the first record that isn't one. The next call raises InvalidAnswer for that record."""
        answers: list[Answer] = []
        while self._records:
            try:
                answers.append(decode_answer(self._records[0]))
            except InvalidAnswer:
                if answers:
                    break
                self._records.popleft()
                raise
            self._records.popleft()
        return answers

    def _unreadable(self, error: Exception) -> HeadraceError:
        if isinstance(error, UnsupportedCodecError):
            return HeadraceError(
                f"topic {self._topic!r}: expected records that this Python can decompress, found a codec without its package "
                f"({one_line(error)}). Install it: pip install 'kafka-python[lz4,snappy,zstd]'."
            )
        return HeadraceError(
            f"topic {self._topic!r}: expected to read it, found: {one_line(error)}. Check the topic, its brokers and this "
            "client's rights."
        )


class AnswerRouter:
    """Reads the topic `scores` in a thread of its own, and gives each answer to the future of its request.

    Answers to other programs' requests, and second answers to the same request, are dropped. A record that isn't an answer
    is logged and skipped.
    """

    def __init__(self, topic: str, options: dict[str, Any]) -> None:
        self._stream = ScoreStream(topic, options)
        self._waiting: dict[str, Future[Answer]] = {}
        self._lock = threading.Lock()
        self._failed: BaseException | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headrace-answers", daemon=True)
        self._thread.start()

    def expect(self, request_id: str) -> Future[Answer]:
        """A future for the answer to a request. Call `expect` before the request is sent.

        Raises:
            HeadraceError: the same id is already waited for, or the reading thread has ended.
        """
        future: Future[Answer] = Future()
        with self._lock:
            if self._failed is not None:
                raise DeliveryError(
                    f"answers: expected a thread that reads them, found it ended. {self._failed} Then make a new Client."
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

    def close(self, timeout_s: float) -> None:
        """Stop reading. Every future that still waits gets an error."""
        self._closing.set()
        if threading.current_thread() is not self._thread:  # that thread runs the callbacks of answers, which may call this
            self._thread.join(timeout_s)

    def _run(self) -> None:
        reason: BaseException = DeliveryError(
            "answers: the client was closed while a request was outstanding. Close it after the last answer."
        )
        try:
            while not self._closing.is_set():
                try:
                    answers = self._stream.poll()
                except InvalidAnswer as error:
                    log.warning("%s The record is skipped.", error)
                    continue
                for answer in answers:
                    self._give(answer)
        except HeadraceError as error:
            reason = error
        finally:
            self._stream.close()
            with self._lock:
                self._failed = reason
                left = list(self._waiting.values())
                self._waiting.clear()
            for future in left:
                if future.set_running_or_notify_cancel():
                    future.set_exception(reason)

    def _give(self, answer: Answer) -> None:
        with self._lock:
            future = self._waiting.pop(answer.request_id, None)
        if future is not None and future.set_running_or_notify_cancel():
            future.set_result(answer)
