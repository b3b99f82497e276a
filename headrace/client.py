"""The client: sends events and score requests, hears the answers."""

from __future__ import annotations

import atexit
import contextlib
import logging
import re
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError

from headrace.connections import OPEN_MS, close_producer, connect, connection_options, one_line
from headrace.errors import DeliveryError, HeadraceError, InvalidEvent, InvalidOption, NoAnswer
from headrace.events import (
    WATERMARK_HEADER,
    Candidate,
    Features,
    check_time,
    encode_click,
    encode_impression,
    encode_request,
    now_ms,
    plain,
    shown,
)
from headrace.lifetime import Lifetime
from headrace.scores import Answer, AnswerRouter, ScoreStream, check_wait

__all__ = ["Client"]

log = logging.getLogger(__name__)

_LINGER_MS = 20  # events wait this long for company: they matter in seconds, and a batch costs one round trip
_BATCH_BYTES = 256 * 1024  # some 500 impressions
_MAX_BLOCK_MS = OPEN_MS  # to learn a topic's partitions; beyond, the topic is missing or the broker is down
_MAX_OUTSTANDING = 50_000  # records; kafka-python itself buffers without limit (50 MB at 1 kB each)
_KEPT_FAILURES = 5  # enough to see a pattern in one line; all of them are counted
_DISCONNECT_S = 5.0  # for a goodbye to the brokers, each of up to three connections
_EXIT_MS = 10_000  # what a program waits for at its end when nobody closed its clients; a supervisor's patience is longer
_TOPIC = re.compile(r"[A-Za-z0-9._-]+")
_LONGEST_PREFIX = 249 - len("score-requests")  # Kafka's limit for a topic's name

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

    A client belongs to the process that made it: make it after a fork, not before. A program that ends without `close` still
    sends what is outstanding, for at most 10 s, and logs an error when that fails.

    Raises:
        InvalidOption: an argument or an option is wrong.
        DeliveryError: no broker answered within `bootstrap_timeout_ms`, 15,000 when not given.
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
        self._options = connection_options(bootstrap_servers, options)
        _check_prefix(topic_prefix)
        self._impressions = f"{topic_prefix}impressions"
        self._clicks = f"{topic_prefix}clicks"
        self._requests = f"{topic_prefix}score-requests"
        self._scores = f"{topic_prefix}scores"
        self._headers: list[Header] = [] if source is None else [("source", _source(source))]
        self._state = threading.Condition()
        self._outstanding = 0
        self._failed = 0
        self._failures: list[str] = []
        self._opening = threading.Lock()
        self._router: AnswerRouter | None = None
        self._lifetime = Lifetime("client", "Make a Client")
        self._events = self._producer(check_wait(linger_ms, "linger_ms"))
        self._urgent: Any = None  # for score requests: somebody waits, so they don't linger
        _clients.add(self)

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
            DeliveryError: the topic is missing, or too much is outstanding for 15 s.
            UnusableClient: the client is closed, or was made before this process was forked.
        """
        self._lifetime.check()
        when = now_ms() if timestamp_ms is None else timestamp_ms
        key, value = encode_impression(impression_id, when, features, score, model_version)
        self._send(self._events, self._impressions, key, value, self._headers)

    def send_click(self, impression_id: str, *, timestamp_ms: int | None = None) -> None:
        """What was shown as `impression_id` was clicked at `timestamp_ms` (now when None). Raises as `send_impression`."""
        self._lifetime.check()
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
            DeliveryError, UnusableClient: as `send_impression`.
        """
        self._lifetime.check()
        lateness_ms = plain(lateness_ms)
        if watermark_ms is None:
            if not isinstance(lateness_ms, int) or isinstance(lateness_ms, bool) or lateness_ms < 0:
                raise InvalidEvent(
                    f"lateness_ms: expected whole milliseconds, 0 or more, found {shown(lateness_ms)}. Pass how long an event "
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
        self._lifetime.check()
        key, value = encode_request(_name(request_id), context, candidates, deadline_ms)
        self._send(self._asking(), self._requests, key, value)
        return key.decode()

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
        self._lifetime.check()
        key, value = encode_request(_name(request_id), context, candidates, deadline_ms)
        name = key.decode()
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

        The first call also opens the connections for it and starts the thread that reads answers, some 100 ms. It raises
        DeliveryError when no broker answers within 15 s (`bootstrap_timeout_ms`).

        Raises:
            NoAnswer: none came within `timeout_ms`.
            InvalidOption: `timeout_ms` is not a number of milliseconds.
            InvalidEvent, DeliveryError, UnusableClient: as `send_impression`.
        """
        self._lifetime.check()
        timeout_ms = check_wait(timeout_ms, "timeout_ms")
        name = _name(request_id)
        self._answers()  # before the deadline is set: the first call takes longer
        self._asking()
        future = self.ask_later(context, candidates, request_id=name, deadline_ms=now_ms() + int(timeout_ms))
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
            DeliveryError: no broker answers within 15 s (`bootstrap_timeout_ms`), or the topic is missing.
            UnusableClient: as `send_impression`.
        """
        self._lifetime.check()
        return ScoreStream(self._scores, self._options, from_beginning=from_beginning)

    def send_raw(self, topic: str, key: bytes | None, value: bytes, headers: Iterable[Header] = ()) -> None:
        """Send bytes as they are to `topic` (full name, no prefix added): for replays of what was encoded before.

        What the bytes say is not checked.

        Raises:
            InvalidOption: an argument is of the wrong type.
            InvalidEvent: the record is too large.
            DeliveryError, UnusableClient: as `send_impression`.
        """
        self._lifetime.check()
        self._send(self._events, *_raw(topic, key, value, headers))

    def flush(self, timeout_ms: int = 60_000) -> None:
        """Wait until everything sent so far is acknowledged.

        Raises:
            DeliveryError: records that failed since the last flush, or are still outstanding after `timeout_ms`.
            InvalidOption: `timeout_ms` is not a number of milliseconds.
            UnusableClient: as `send_impression`.
        """
        self._lifetime.check()
        self._flush(check_wait(timeout_ms, "timeout_ms"))

    def close(self, timeout_ms: int = 60_000) -> None:
        """Flush, then disconnect, which takes at most 15 s more. Closing again does nothing.

        Raises as `flush`; the connections are closed all the same.
        """
        self._lifetime.check_process()
        timeout_ms = check_wait(timeout_ms, "timeout_ms")
        if self._lifetime.closed:
            return
        self._lifetime.closed = True  # before the flush: what is sent from now on would not be waited for
        try:
            self._flush(timeout_ms)
        except BaseException:
            self._disconnect(0)  # the brokers had their time
            raise
        self._disconnect(_DISCONNECT_S)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif not self._lifetime.closed and not self._lifetime.forked:
            # What went wrong in the block must not be hidden by a delivery error, nor wait a minute for it.
            self._lifetime.closed = True
            self._disconnect(_DISCONNECT_S)

    def __reduce__(self) -> Any:
        raise self._lifetime.refuse_to_travel()

    def _flush(self, timeout_ms: float) -> None:
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
            more = f"; and {failed - len(failures)} more" if failed > len(failures) else ""
            raise DeliveryError(
                f"flush: expected every record acknowledged, found {failed} that were not: {'; '.join(failures)}{more}. Remove "
                "the cause and send them again: an event that arrives twice is counted once."
            )
        if outstanding:
            raise DeliveryError(
                f"flush: expected every record acknowledged within {timeout_ms:g} ms, found {outstanding} outstanding. Check "
                "the brokers, and flush again: an open client goes on trying."
            )

    def _disconnect(self, timeout_s: float) -> None:
        if self._router is not None:
            self._router.close(_DISCONNECT_S)
        for producer in (self._events, self._urgent):
            if producer is not None:
                close_producer(producer, timeout_s)

    def _producer(self, linger_ms: float) -> Any:
        made = connect(
            KafkaProducer,
            self._options,
            acks="all",
            enable_idempotence=True,
            linger_ms=linger_ms,
            batch_size=_BATCH_BYTES,
            max_block_ms=_MAX_BLOCK_MS,
        )
        # kafka-python closes its producers at the interpreter's end, after one second and silently; what was registered last
        # runs first, and is ours.
        atexit.unregister(_finish)
        atexit.register(_finish)
        return made

    def _asking(self) -> Any:
        if self._urgent is None:
            with self._one_opens():
                if self._urgent is None:
                    self._urgent = self._producer(0)
        return self._urgent

    def _answers(self) -> AnswerRouter:
        if self._router is None:
            with self._one_opens():
                if self._router is None:
                    self._router = AnswerRouter(self._scores, self._options)
        return self._router

    @contextlib.contextmanager
    def _one_opens(self) -> Iterator[None]:
        """One thread opens a connection; the others wait for it, but not one after another for a broker that is down."""
        if not self._opening.acquire(timeout=OPEN_MS / 1_000):
            raise DeliveryError(
                f"connections: expected another thread to open them within {OPEN_MS} ms, found it still waiting for a broker. "
                "Check the brokers."
            )
        try:
            yield
        finally:
            self._opening.release()

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
            self._lifetime.check()  # another thread may have closed the client
            if isinstance(error, KafkaError):
                raise self._no_topic(topic, error) from error
            if isinstance(error, Exception):
                raise DeliveryError(
                    f"topic {topic!r}: expected to send a record, found that kafka-python can't: {one_line(error)}. Check the "
                    "options of the connection."
                ) from error
            raise
        future.add_both(self._delivered, topic, key)

    def _delivered(self, topic: str, key: bytes | None, outcome: Any) -> None:
        with self._state:
            self._outstanding -= 1
            if isinstance(outcome, BaseException):
                self._failed += 1
                if len(self._failures) < _KEPT_FAILURES:
                    name = "a record without a key" if key is None else f"key {key[:80].decode('utf-8', 'replace')!r}"
                    self._failures.append(f"{topic}, {name}: {one_line(outcome)}")
            if self._outstanding == 0 or self._outstanding == _MAX_OUTSTANDING - 1:
                self._state.notify_all()

    def _no_topic(self, topic: str, error: BaseException) -> DeliveryError:
        return DeliveryError(
            f"topic {topic!r}: expected its partitions, found none ({one_line(error)}). Run `headrace topics create`, or check "
            "topic_prefix and the brokers."
        )


# Clients of this process that somebody still holds or that have records outstanding.
_clients: weakref.WeakSet[Client] = weakref.WeakSet()


def _finish() -> None:
    """At the interpreter's end: send what clients that nobody closed still hold, within `_EXIT_MS` for all."""
    until = time.monotonic() + _EXIT_MS / 1_000
    for client in list(_clients):
        if client._lifetime.forked:
            continue
        try:
            client.close(max(0, int((until - time.monotonic()) * 1_000)))
        except HeadraceError as error:
            log.error("client: expected close() before the program ended, found it open and events that may be lost. %s", error)


def _name(request_id: Any) -> Any:
    return uuid.uuid4().hex if request_id is None else request_id


def _check_prefix(prefix: Any) -> None:
    if not isinstance(prefix, str) or (prefix and not _TOPIC.fullmatch(prefix)) or len(prefix) > _LONGEST_PREFIX:
        raise InvalidOption(
            f"topic_prefix: expected at most {_LONGEST_PREFIX} ASCII letters, digits, '.', '_' and '-', found {prefix!r}. Pass "
            "the pipeline's topics.prefix."
        )


def _source(source: Any) -> bytes:
    try:
        return str.encode(source)
    except (TypeError, UnicodeEncodeError):
        raise InvalidOption(
            f"source: expected the name of this producer as text, found {shown(source)}. Pass a string."
        ) from None


def _raw(topic: Any, key: Any, value: Any, headers: Any) -> tuple[str, bytes | None, bytes, list[Header]]:
    """The arguments of `send_raw`. Raises InvalidOption."""
    if not isinstance(topic, str) or not _TOPIC.fullmatch(topic):
        raise InvalidOption(f"topic: expected a topic's full name, found {shown(topic)}. Pass it with the prefix.")
    for name, found in (("key", key), ("value", value)):
        if not isinstance(found, bytes) and not (name == "key" and found is None):
            raise InvalidOption(f"{name}: expected bytes, found {type(found).__name__}. Encode it first.")
    try:
        pairs = [(name, content) for name, content in headers]
    except (TypeError, ValueError):
        pairs = [(None, None)]
    for name, content in pairs:
        if not isinstance(name, str) or not isinstance(content, bytes):
            raise InvalidOption("headers: expected pairs (name, bytes), found others. Pass [('name', b'value'), …].")
    return topic, key, value, pairs
