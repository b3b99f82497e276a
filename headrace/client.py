"""The client: sends events and score requests, hears the answers."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError

from headrace.connections import connect
from headrace.errors import DeliveryError, InvalidEvent, NoAnswer
from headrace.events import (
    WATERMARK_HEADER,
    Candidate,
    Features,
    check_time,
    encode_click,
    encode_impression,
    encode_request,
    now_ms,
)
from headrace.scores import Answer, AnswerRouter, ScoreStream

__all__ = ["Client"]

_LINGER_MS = 20  # events wait this long for company: they matter in seconds, and a batch costs one round trip
_BATCH_BYTES = 256 * 1024  # some 500 impressions
_MAX_BLOCK_MS = 15_000  # to learn a topic's partitions; beyond, the topic is missing or the broker is down
_MAX_OUTSTANDING = 50_000  # records; kafka-python itself buffers without limit (50 MB at 1 kB each)
_KEPT_FAILURES = 20  # enough to see a pattern; all of them are counted

Header = tuple[str, bytes]


class Client:
    """A producer of events and score requests, and a reader of answers. Safe to share between threads.

    ```python
    with Client("broker:9092", topic_prefix="shop-", security_protocol="SASL_SSL", sasl_mechanism="PLAIN", …) as client:
        client.send_impression("imp-1", features={"user_id": "u7", "price": 9.5, "tags": ["red", "new"]})
        client.send_click("imp-1")
        answer = client.ask({"user_id": "u7"}, [("item-1", {"price": 9.5}), ("item-2", {"price": 4.0})])
    ```

    `bootstrap_servers` is `host:port`, several in a list or separated by commas. `topic_prefix` is the pipeline's own
    setting of that name. `source` names this producer: impressions and clicks carry it in a header of that name, by which
    `headrace doctor` names who sends what is wrong. Further options are kafka-python's (`security_protocol`, `sasl_mechanism`,
    `sasl_plain_username`, `sasl_plain_password`, `ssl_cafile`, `client_id`, `request_timeout_ms`, …) and go to every
    connection. Records are keyed by id, placed by murmur2, sent in batches by an idempotent producer and acknowledged by
    all in-sync replicas. Sending returns at once; `flush`, and leaving the `with` block, wait and raise what failed.

    Raises:
        DeliveryError: no broker answers.
    """

    def __init__(
        self,
        bootstrap_servers: str | list[str],
        *,
        topic_prefix: str = "",
        source: str | None = None,
        linger_ms: int = _LINGER_MS,
        **options: Any,
    ) -> None:
        servers = bootstrap_servers.split(",") if isinstance(bootstrap_servers, str) else list(bootstrap_servers)
        self._options = {"bootstrap_servers": servers, **options}
        self._impressions = f"{topic_prefix}impressions"
        self._clicks = f"{topic_prefix}clicks"
        self._requests = f"{topic_prefix}score-requests"
        self._scores = f"{topic_prefix}scores"
        self._headers: list[Header] = [] if source is None else [("source", source.encode())]
        self._state = threading.Condition()
        self._outstanding = 0
        self._failed = 0
        self._failures: list[str] = []
        self._opening = threading.Lock()
        self._router: AnswerRouter | None = None
        self._events = self._producer(linger_ms)
        self._urgent: Any = None  # for score requests: somebody waits, so they don't linger

    def send_impression(
        self,
        impression_id: str,
        *,
        features: Features,
        timestamp_ms: int | None = None,
        score: float | None = None,
        model_version: int | None = None,
    ) -> None:
        """Something was shown. `score` and `model_version` say what the scorer had answered, if it was asked.

        Args:
            timestamp_ms: when it was shown, ms since 1970-01-01 UTC; now when None.

        Raises:
            InvalidEvent: the pipeline would refuse it; nothing was sent.
            DeliveryError: the topic is missing, or too much is outstanding for too long.
        """
        when = now_ms() if timestamp_ms is None else timestamp_ms
        key, value = encode_impression(impression_id, when, features, score, model_version)
        self._send(self._events, self._impressions, key, value, self._headers)

    def send_click(self, impression_id: str, *, timestamp_ms: int | None = None) -> None:
        """What was shown as `impression_id` was clicked at `timestamp_ms` (now when None). Raises as `send_impression`."""
        key, value = encode_click(impression_id, now_ms() if timestamp_ms is None else timestamp_ms)
        self._send(self._events, self._clicks, key, value, self._headers)

    def send_watermark(self, watermark_ms: int | None = None, *, lateness_ms: int = 0) -> None:
        """Promise that no older event comes any more, to every partition of impressions and clicks.

        Without a watermark the join waits for the next event, and so do the labels. A producer of a sparse stream calls
        `send_watermark(lateness_ms=…)` on a timer (`headrace watermarks` does the same); whatever ends a stream sends a
        watermark beyond the last window, so that the last impressions get their labels. It comes after everything that this
        client has sent before.

        Args:
            watermark_ms: ms since 1970-01-01 UTC; now less `lateness_ms` when None.
            lateness_ms: longest time from an event to its arrival in Kafka; only without a `watermark_ms`.

        Raises:
            InvalidEvent: the watermark or the lateness is no such time; nothing was sent.
            DeliveryError: the topic is missing, or too much is outstanding for too long.
        """
        if watermark_ms is None:
            if not isinstance(lateness_ms, int) or lateness_ms < 0:
                raise InvalidEvent(
                    f"lateness_ms: expected whole milliseconds, 0 or more, found {lateness_ms!r}. Pass how long an event "
                    "takes to arrive at most.",
                    path="lateness_ms",
                )
            when = check_time(now_ms() - lateness_ms, "lateness_ms")
        elif lateness_ms:
            raise InvalidEvent(
                f"lateness_ms: expected none beside watermark_ms, found {lateness_ms}. Subtract it, or leave watermark_ms out.",
                path="lateness_ms",
            )
        else:
            when = check_time(watermark_ms, "watermark_ms")
        header = (WATERMARK_HEADER, str(when).encode())
        for topic in (self._impressions, self._clicks):
            for partition in sorted(self._partitions(topic)):
                self._send(self._events, topic, None, b"", [header], partition)

    def request_scores(
        self,
        context: Features,
        candidates: Iterable[Candidate],
        *,
        request_id: str | None = None,
        deadline_ms: int | None = None,
    ) -> str:
        """Ask for scores without waiting; the answer comes on `scores` (see `subscribe_scores`).

        Args:
            context: features that all candidates share (the user, the page).
            candidates: pairs (id, features); a candidate's feature wins over the context's of the same name.
            request_id: unique; drawn when None. The same id sent twice may be answered twice.
            deadline_ms: ms since 1970-01-01 UTC, after which the answer is not wanted any more.

        Returns:
            The request's id. Raises as `send_impression`.
        """
        name = uuid.uuid4().hex if request_id is None else request_id
        key, value = encode_request(name, context, candidates, deadline_ms)
        self._send(self._asking(), self._requests, key, value)
        return name

    def ask_later(
        self,
        context: Features,
        candidates: Iterable[Candidate],
        *,
        request_id: str | None = None,
        deadline_ms: int | None = None,
    ) -> Future[Answer]:
        """Ask for scores; the future gets the answer. Any number may be outstanding.

        The future ends by an answer or by `close`; a caller who gives up earlier passes a timeout to `result`.
        Arguments and errors as of `request_scores`.
        """
        name = uuid.uuid4().hex if request_id is None else request_id
        key, value = encode_request(name, context, candidates, deadline_ms)
        router = self._answers()
        future = router.expect(name)
        future.add_done_callback(lambda done: router.forget(name) if done.cancelled() else None)
        try:
            self._send(self._asking(), self._requests, key, value)
        except BaseException:
            router.forget(name)
            raise
        return future

    def ask(
        self,
        context: Features,
        candidates: Iterable[Candidate],
        *,
        timeout_ms: int = 1_000,
        request_id: str | None = None,
    ) -> Answer:
        """Ask for scores and wait. The request carries the deadline, so that scorers don't answer when it has passed.

        The first call also starts the thread that reads answers, some 100 ms.

        Raises:
            NoAnswer: none came within `timeout_ms`.
            InvalidEvent, DeliveryError: as `send_impression`.
        """
        name = uuid.uuid4().hex if request_id is None else request_id
        self._answers()  # before the deadline is set: the first call takes longer
        future = self.ask_later(context, candidates, request_id=name, deadline_ms=now_ms() + timeout_ms)
        try:
            return future.result(timeout_ms / 1_000)
        except TimeoutError as error:
            future.cancel()
            raise NoAnswer(
                f"request {name!r} on {self._requests!r}: expected an answer on {self._scores!r} within {timeout_ms} ms, "
                "found none. Check that a scorer runs (`headrace run scorer`), or raise timeout_ms."
            ) from error

    def subscribe_scores(self, *, from_beginning: bool = False) -> ScoreStream:
        """Follow all answers, from now on or from the oldest kept. Iterate over what it returns, and close it.

        Raises:
            DeliveryError: no broker answers, or the topic is missing.
        """
        return ScoreStream(self._scores, self._options, from_beginning=from_beginning)

    def send_raw(self, topic: str, key: bytes | None, value: bytes, headers: Iterable[Header] = ()) -> None:
        """Send bytes as they are to `topic` (full name, no prefix added): for replays of what was encoded before.

        Nothing is checked. Raises DeliveryError.
        """
        self._send(self._events, topic, key, value, list(headers))

    def flush(self, timeout_ms: int = 60_000) -> None:
        """Wait until everything sent so far is acknowledged.

        Raises:
            DeliveryError: records that failed since the last flush, or are still outstanding after `timeout_ms`.
        """
        until = time.monotonic() + timeout_ms / 1_000
        for producer in (self._events, self._urgent):
            if producer is not None:
                try:
                    producer.flush(timeout=max(0.0, until - time.monotonic()))
                except KafkaTimeoutError:
                    break  # counted below
        with self._state:
            self._state.wait_for(lambda: self._outstanding == 0, timeout=max(0.0, until - time.monotonic()))
            outstanding, failed, failures = self._outstanding, self._failed, self._failures
            self._failed, self._failures = 0, []
        if failed:
            more = f"\n  and {failed - len(failures)} more" if failed > len(failures) else ""
            raise DeliveryError(
                f"{failed} records were not acknowledged:\n  " + "\n  ".join(failures) + f"{more}\nSend them again once the "
                "cause is mended: an event that arrives twice is counted once."
            )
        if outstanding:
            raise DeliveryError(
                f"flush: expected every record acknowledged within {timeout_ms} ms, found {outstanding} outstanding. The "
                "client goes on trying; check the brokers, and flush again."
            )

    def close(self, timeout_ms: int = 60_000) -> None:
        """Flush, then disconnect. Raises DeliveryError as `flush`; the connections are closed all the same."""
        try:
            self.flush(timeout_ms)
        finally:
            self._disconnect(timeout_s=5)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:  # what went wrong in the block must not be hidden by a delivery error, nor wait a minute for it
            self._disconnect(timeout_s=5)

    def _disconnect(self, timeout_s: float) -> None:
        if self._router is not None:
            self._router.close()
        for producer in (self._events, self._urgent):
            if producer is not None:
                try:
                    producer.close(timeout=timeout_s)
                except KafkaTimeoutError:  # flush is part of its close; the second call only forces
                    producer.close(timeout=0)

    def _producer(self, linger_ms: int) -> Any:
        return connect(
            KafkaProducer,
            self._options,
            acks="all",
            enable_idempotence=True,
            linger_ms=linger_ms,
            batch_size=_BATCH_BYTES,
            max_block_ms=_MAX_BLOCK_MS,
        )

    def _asking(self) -> Any:
        with self._opening:
            if self._urgent is None:
                self._urgent = self._producer(0)
            return self._urgent

    def _answers(self) -> AnswerRouter:
        with self._opening:
            if self._router is None:
                self._router = AnswerRouter(self._scores, self._options)
            return self._router

    def _partitions(self, topic: str) -> set[int]:
        try:
            return set(self._events.partitions_for(topic))
        except KafkaError as error:
            raise self._no_topic(topic, error) from error

    def _send(
        self,
        producer: Any,
        topic: str,
        key: bytes | None,
        value: bytes,
        headers: list[Header] | None = None,
        partition: int | None = None,
    ) -> None:
        with self._state:
            if not self._state.wait_for(lambda: self._outstanding < _MAX_OUTSTANDING, timeout=_MAX_BLOCK_MS / 1_000):
                raise DeliveryError(
                    f"topic {topic!r}: expected room to send, found {self._outstanding} records not acknowledged for "
                    f"{_MAX_BLOCK_MS} ms. Check the brokers, or send more slowly."
                )
            self._outstanding += 1
        try:
            future = producer.send(topic, value=value, key=key, headers=headers, partition=partition)
        except BaseException as error:
            with self._state:
                self._outstanding -= 1
            if isinstance(error, MessageSizeTooLargeError):
                raise InvalidEvent(
                    f"$: expected a record of at most {producer.config['max_request_size']} bytes, found {len(value)} in the "
                    "value alone. Send fewer or shorter features.",
                    path="$",
                ) from error
            if isinstance(error, KafkaError):
                raise self._no_topic(topic, error) from error
            raise
        future.add_both(self._delivered, topic, key)

    def _delivered(self, topic: str, key: bytes | None, outcome: Any) -> None:
        with self._state:
            self._outstanding -= 1
            if isinstance(outcome, BaseException):
                self._failed += 1
                if len(self._failures) < _KEPT_FAILURES:
                    name = "a watermark" if key is None else f"key {key.decode('utf-8', 'replace')!r}"
                    self._failures.append(f"{topic}, {name}: {outcome}")
            if self._outstanding == 0 or self._outstanding == _MAX_OUTSTANDING - 1:
                self._state.notify_all()

    def _no_topic(self, topic: str, error: BaseException) -> DeliveryError:
        return DeliveryError(
            f"topic {topic!r}: expected its partitions, found none ({error}). Run `headrace topics create`, or check "
            "topic_prefix and the brokers."
        )
