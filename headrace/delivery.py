"""The connections of a client: they send its records, count them until Kafka acknowledges them, and flush at the end.

A client has up to three connections, each opened when it is first needed:

- a producer of events, which waits for more events (`linger_ms`) and sends batches;
- a producer of score requests, which doesn't wait, since somebody waits for the answer;
- a reader of answers (`headrace.scores.AnswerRouter`).
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError

from headrace.arguments import Header
from headrace.connections import OPEN_MS, close_producer, connect, one_line
from headrace.errors import DeliveryError, HeadraceError, InvalidEvent
from headrace.lifetime import Lifetime
from headrace.scores import AnswerRouter

__all__ = ["Delivery"]

log = logging.getLogger(__name__)

_BATCH_BYTES = 256 * 1024  # some 500 impressions
_MAX_BLOCK_MS = OPEN_MS  # to learn a topic's partitions; beyond, the topic is missing or the broker is down
_MAX_OUTSTANDING = 50_000  # records; kafka-python itself buffers without limit (50 MB at 1 kB each)
_KEPT_FAILURES = 5  # enough to see a pattern in one line; all of them are counted
_DISCONNECT_S = 5.0  # longest time to disconnect, for each of up to three connections
_EXIT_MS = 10_000  # what a program waits for at its end when nobody closed its clients; supervisors wait longer


class Delivery:
    """Sends records, counts those outstanding, and reads answers. Safe to share between threads.

    Args:
        options: of every connection, as `connection_options` returns them.
        scores: the topic of answers, by its full name.
        linger_ms: how long an event waits for others, so that one batch takes them all.
    """

    def __init__(self, options: dict[str, Any], scores: str, linger_ms: float) -> None:
        self._options = options
        self._scores = scores
        self.lifetime = Lifetime("client", "Make a Client")
        self._state = threading.Condition()
        self._outstanding = 0
        self._failed = 0
        self._failures: list[str] = []
        self._opening = threading.Lock()
        self._router: AnswerRouter | None = None
        self._events = self._producer(linger_ms)
        self._urgent: Any = None
        _open.add(self)

    def send_event(
        self, topic: str, key: bytes | None, value: bytes, headers: list[Header] | None = None, partition: int | None = None
    ) -> None:
        """Send a record in a batch with others.

        Raises:
            InvalidEvent: the record is too large.
            DeliveryError: the topic is missing, or too much is outstanding for 15 s.
        """
        self._send(self._events, topic, key, value, headers, partition)

    def send_request(self, topic: str, key: bytes, value: bytes) -> None:
        """Send a score request at once. Raises as `send_event`."""
        self._send(self.open_requests(), topic, key, value)

    def partitions(self, topic: str) -> set[int]:
        """The numbers of a topic's partitions. Raises DeliveryError: the topic is missing."""
        try:
            return set(self._events.partitions_for(topic))
        except KafkaError as error:
            raise _no_topic(topic, error) from error

    def open_requests(self) -> Any:
        """The producer of score requests; the first call opens it."""
        if self._urgent is None:
            with self._one_opens():
                if self._urgent is None:
                    self._urgent = self._producer(0)
        return self._urgent

    def open_answers(self) -> AnswerRouter:
        """The reader of answers; the first call opens it."""
        if self._router is None:
            with self._one_opens():
                if self._router is None:
                    self._router = AnswerRouter(self._scores, self._options)
        return self._router

    def flush(self, timeout_ms: float) -> None:
        """Wait until every record is acknowledged. Raises DeliveryError: some failed, or are still outstanding."""
        until = time.monotonic() + timeout_ms / 1_000
        for producer in (self._events, self._urgent):
            if producer is not None:
                try:
                    producer.flush(timeout=max(0.0, until - time.monotonic()))
                except KafkaTimeoutError:
                    break  # the records outstanding are counted below
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

    def close(self, timeout_ms: float) -> None:
        """Flush, then disconnect. Raises as `flush`; the connections are closed all the same."""
        if self.lifetime.closed:
            return
        self.lifetime.closed = True  # before the flush: records sent from now on would not be waited for
        try:
            self.flush(timeout_ms)
        except BaseException:
            self._disconnect(0)  # the brokers had their time
            raise
        self._disconnect(_DISCONNECT_S)

    def abandon(self) -> None:
        """Disconnect without a flush, in a `with` block that an error ends: a delivery error would hide that error."""
        self.lifetime.closed = True
        self._disconnect(_DISCONNECT_S)

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
        # At the interpreter's end kafka-python closes its producers after one second, silently. Functions registered last run
        # first, so registering again after each producer puts `_finish` before kafka-python's own.
        atexit.unregister(_finish)
        atexit.register(_finish)
        return made

    @contextlib.contextmanager
    def _one_opens(self) -> Iterator[None]:
        """Let one thread open a connection while the others wait for it.

        The wait is limited, so that threads don't wait one after another for a broker that is down.
        """
        if not self._opening.acquire(timeout=OPEN_MS / 1_000):
            raise DeliveryError(
                f"connections: expected another thread to open them within {OPEN_MS} ms, found it still waiting for a broker. "
                "Check the brokers."
            )
        try:
            yield
        finally:
            self._opening.release()

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
            self.lifetime.check()  # another thread may have closed the client
            if isinstance(error, KafkaError):
                raise _no_topic(topic, error) from error
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


def _no_topic(topic: str, error: BaseException) -> DeliveryError:
    return DeliveryError(
        f"topic {topic!r}: expected its partitions, found none ({one_line(error)}). Run `headrace topics create`, or check "
        "topic_prefix and the brokers."
    )


# What this process has opened and is still in use: held by a client, or by the futures of outstanding records.
_open: weakref.WeakSet[Delivery] = weakref.WeakSet()


def _finish() -> None:
    """At the interpreter's end: send what clients that nobody closed still hold, within `_EXIT_MS` for all of them."""
    until = time.monotonic() + _EXIT_MS / 1_000
    for delivery in list(_open):
        if delivery.lifetime.forked:
            continue
        try:
            delivery.close(max(0, int((until - time.monotonic()) * 1_000)))
        except HeadraceError as error:
            log.error("client: expected close() before the program ended, found it open and events that may be lost. %s", error)
