"""The client: sends events and score requests, hears the answers."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from headrace.arguments import Header, check_prefix, check_raw, check_wait, encode_source, request_id_or_new
from headrace.connections import connection_options
from headrace.delivery import Delivery
from headrace.errors import InvalidEvent, NoAnswer
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
from headrace.scores import Answer, ScoreStream

__all__ = ["Client"]

_LINGER_MS = 20  # events wait this long for company: they matter in seconds, and a batch costs one round trip


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
        check_prefix(topic_prefix)
        self._impressions = f"{topic_prefix}impressions"
        self._clicks = f"{topic_prefix}clicks"
        self._requests = f"{topic_prefix}score-requests"
        self._scores = f"{topic_prefix}scores"
        self._headers: list[Header] = [] if source is None else [("source", encode_source(source))]
        self._delivery = Delivery(self._options, self._scores, check_wait(linger_ms, "linger_ms"))

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
        self._delivery.lifetime.check()
        when = now_ms() if timestamp_ms is None else timestamp_ms
        key, value = encode_impression(impression_id, when, features, score, model_version)
        self._delivery.send_event(self._impressions, key, value, self._headers)

    def send_click(self, impression_id: str, *, timestamp_ms: int | None = None) -> None:
        """What was shown as `impression_id` was clicked at `timestamp_ms` (now when None). Raises as `send_impression`."""
        self._delivery.lifetime.check()
        key, value = encode_click(impression_id, now_ms() if timestamp_ms is None else timestamp_ms)
        self._delivery.send_event(self._clicks, key, value, self._headers)

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
        self._delivery.lifetime.check()
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
            for partition in sorted(self._delivery.partitions(topic)):
                self._delivery.send_event(topic, None, b"", [header], partition)

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
        self._delivery.lifetime.check()
        key, value = encode_request(request_id_or_new(request_id), context, candidates, deadline_ms)
        self._delivery.send_request(self._requests, key, value)
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
        self._delivery.lifetime.check()
        key, value = encode_request(request_id_or_new(request_id), context, candidates, deadline_ms)
        name = key.decode()
        router = self._delivery.open_answers()
        future = router.expect(name)
        future.add_done_callback(lambda done: router.forget(name) if done.cancelled() else None)
        try:
            self._delivery.send_request(self._requests, key, value)
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
        self._delivery.lifetime.check()
        timeout_ms = check_wait(timeout_ms, "timeout_ms")
        name = request_id_or_new(request_id)
        self._delivery.open_answers()  # before the deadline is set: the first call takes longer
        self._delivery.open_requests()
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
        self._delivery.lifetime.check()
        return ScoreStream(self._scores, self._options, from_beginning=from_beginning)

    def send_raw(self, topic: str, key: bytes | None, value: bytes, headers: Iterable[Header] = ()) -> None:
        """Send bytes as they are to `topic` (full name, no prefix added): for replays of what was encoded before.

        What the bytes say is not checked.

        Raises:
            InvalidOption: an argument is of the wrong type.
            InvalidEvent: the record is too large.
            DeliveryError, UnusableClient: as `send_impression`.
        """
        self._delivery.lifetime.check()
        self._delivery.send_event(*check_raw(topic, key, value, headers))

    def flush(self, timeout_ms: int = 60_000) -> None:
        """Wait until everything sent so far is acknowledged.

        Raises:
            DeliveryError: records that failed since the last flush, or are still outstanding after `timeout_ms`.
            InvalidOption: `timeout_ms` is not a number of milliseconds.
            UnusableClient: as `send_impression`.
        """
        self._delivery.lifetime.check()
        self._delivery.flush(check_wait(timeout_ms, "timeout_ms"))

    def close(self, timeout_ms: int = 60_000) -> None:
        """Flush, then disconnect, which takes at most 15 s more. Closing again does nothing.

        Raises as `flush`; the connections are closed all the same.
        """
        self._delivery.lifetime.check_process()
        self._delivery.close(check_wait(timeout_ms, "timeout_ms"))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif not self._delivery.lifetime.closed and not self._delivery.lifetime.forked:
            # The error of the block must neither be hidden by a delivery error nor wait a minute for one.
            self._delivery.abandon()

    def __reduce__(self) -> Any:
        raise self._delivery.lifetime.refuse_to_travel()
