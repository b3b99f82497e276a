"""The client: sends events and score requests, and reads the answers."""

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

_LINGER_MS = 20  # an event waits this long for others: a batch costs one round trip, and freshness is counted in seconds


class Client:
    """A producer of events and score requests, and a reader of answers. Safe to share between threads.

    ```python
    with Client("broker:9092", topic_prefix="shop-", security_protocol="SASL_SSL", sasl_mechanism="PLAIN", …) as client:
        client.send_impression("imp-1", features={"user_id": "u7", "price": 9.5, "tags": ["red", "new"]})
        client.send_click("imp-1")
        answer = client.ask({"user_id": "u7"}, [("item-1", {"price": 9.5}), ("item-2", {"price": 4.0})])
    ```

    - `bootstrap_servers` is `host:port`; several addresses stand in a list or are separated by commas.
    - `topic_prefix` is the pipeline's setting `topics.prefix`.
    - `source` names this producer. Impressions and clicks carry the name in a header `source`, and `headrace doctor` prints it
      beside wrong events.
    - `linger_ms` is how long an event waits for others, so that a batch takes them all.
    - Further options are kafka-python's (`security_protocol`, `sasl_mechanism`, `sasl_plain_username`, `sasl_plain_password`,
      `ssl_cafile`, `client_id`, `request_timeout_ms`, …) and go to every connection.

    Records are keyed by id, partitioned by murmur2, sent in batches by an idempotent producer, and acknowledged by all in-sync
    replicas. Sending returns at once. `flush`, and leaving the `with` block, wait for acknowledgements and raise an error when
    records failed.

    A client belongs to the process that made it: make a client after a fork, not before. A program that ends without `close`
    still sends outstanding records, for at most 10 s, and logs an error when that fails.

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
        delta: int | None = None,
        shadow_score: float | None = None,
        shadow_version: int | None = None,
        propensity: float | None = None,
    ) -> None:
        """Send an impression: something was shown.

        Args:
            features: name → value: a string, a finite number, a list of strings or None.
            timestamp_ms: when it was shown, in ms since 1970-01-01 UTC; now when None.
            score, model_version, delta: what the scorer answered for it, where it was asked: `score` of the candidate shown,
                `answer.model_version` and `answer.delta`. Pass all three as they are. The trainer finds skew with them, and
                compares a canary.
            shadow_score, shadow_version: `shadow` of the candidate shown and `answer.shadow_version`, None in most answers. The
                trainer compares a version on trial with the champion by them.
            propensity: the probability with which this was chosen to be shown, where it was drawn. Examples keep it.

        Raises:
            InvalidEvent: the pipeline would reject the event; nothing was sent.
            DeliveryError: the topic is missing, or too much is outstanding for 15 s.
            UnusableClient: the client is closed, or was made before this process was forked.
        """
        self._delivery.lifetime.check()
        when = now_ms() if timestamp_ms is None else timestamp_ms
        key, value = encode_impression(
            impression_id, when, features, score, model_version, delta, shadow_score, shadow_version, propensity
        )
        self._delivery.send_event(self._impressions, key, value, self._headers)

    def send_click(self, impression_id: str, *, timestamp_ms: int | None = None) -> None:
        """Send a click on the impression of that id, at `timestamp_ms` (now when None). Raises as `send_impression`."""
        self._delivery.lifetime.check()
        key, value = encode_click(impression_id, now_ms() if timestamp_ms is None else timestamp_ms)
        self._delivery.send_event(self._clicks, key, value, self._headers)

    def send_watermark(self, watermark_ms: int | None = None, *, lateness_ms: int = 0) -> None:
        """Promise every partition of impressions and clicks that no older event will come.

        Without a watermark the join waits for the next event before it sends labels. Two cases need one:

        - A producer of a sparse stream calls `send_watermark(lateness_ms=…)` on a timer. `headrace watermarks` does the same.
        - The end of a stream needs a watermark beyond the last window, so that the last impressions get their labels.

        The watermark arrives after everything that this client has sent before.

        Args:
            watermark_ms: ms since 1970-01-01 UTC; now less `lateness_ms` when None.
            lateness_ms: longest time from an event to its arrival in Kafka, in ms; only without a `watermark_ms`.

        Raises:
            InvalidEvent: the watermark or the lateness is not a valid time; nothing was sent.
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
        timestamp_ms: int | None = None,
    ) -> str:
        """Ask for scores without waiting. The answer arrives on the topic `scores` (see `subscribe_scores`).

        Args:
            context: features that all candidates share (the user, the page).
            candidates: pairs (id, features). A candidate's feature takes the place of the context's feature of the same name.
            request_id: a unique id; a random one when None. The same id sent twice may be answered twice.
            deadline_ms: ms since 1970-01-01 UTC, after which an answer is of no use.
            timestamp_ms: ms since 1970-01-01 UTC, the time whose hour and weekday the model reads; when None, the request's
                arrival.

        Returns:
            The request's id. Raises as `send_impression`.
        """
        self._delivery.lifetime.check()
        key, value = encode_request(request_id_or_new(request_id), context, candidates, deadline_ms, timestamp_ms)
        self._delivery.send_request(self._requests, key, value)
        return key.decode()

    def ask_later(
        self,
        context: Features,
        candidates: Iterable[Candidate],
        *,
        request_id: str | None = None,
        deadline_ms: int | None = None,
        timestamp_ms: int | None = None,
    ) -> Future[Answer]:
        """Ask for scores, and get the answer by a future. Any number of requests may be outstanding.

        The future ends with the answer, or with an error when the client is closed. To wait for less, pass a timeout to its
        `result`. Arguments and errors are those of `request_scores`.
        """
        self._delivery.lifetime.check()
        key, value = encode_request(request_id_or_new(request_id), context, candidates, deadline_ms, timestamp_ms)
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
        timestamp_ms: int | None = None,
    ) -> Answer:
        """Ask for scores and wait. The request carries the deadline, so that scorers don't answer after it.

        The first call also opens the connections for requests and starts the thread that reads answers, which takes about
        100 ms. It raises DeliveryError when no broker answers within 15 s (`bootstrap_timeout_ms`).

        Args:
            timestamp_ms: as for `request_scores`.

        Raises:
            NoAnswer: no answer came within `timeout_ms`.
            InvalidOption: `timeout_ms` is not a number of milliseconds.
            InvalidEvent, DeliveryError, UnusableClient: as `send_impression`.
        """
        self._delivery.lifetime.check()
        timeout_ms = check_wait(timeout_ms, "timeout_ms")
        name = request_id_or_new(request_id)
        self._delivery.open_answers()  # before the deadline is set: the first call takes longer
        self._delivery.open_requests()
        deadline_ms = now_ms() + int(timeout_ms)
        future = self.ask_later(context, candidates, request_id=name, deadline_ms=deadline_ms, timestamp_ms=timestamp_ms)
        try:
            return future.result(timeout_ms / 1_000)
        except TimeoutError as error:
            future.cancel()
            raise NoAnswer(
                f"request {name!r} on {self._requests!r}: expected an answer on {self._scores!r} within {timeout_ms} ms, "
                "found none. Check that a scorer runs (`headrace run scorer`), or raise timeout_ms."
            ) from error

    def subscribe_scores(self, *, from_beginning: bool = False) -> ScoreStream:
        """Follow all answers, from now on or from the oldest that Kafka keeps. Iterate over the stream, and close it.

        Raises:
            DeliveryError: no broker answers within 15 s (`bootstrap_timeout_ms`), or the topic is missing.
            UnusableClient: as `send_impression`.
        """
        self._delivery.lifetime.check()
        return ScoreStream(self._scores, self._options, from_beginning=from_beginning)

    def send_raw(self, topic: str, key: bytes | None, value: bytes, headers: Iterable[Header] = ()) -> None:
        """Send bytes as they are to `topic`, by its full name, for replays of encoded events. The bytes are not checked.

        Raises:
            InvalidOption: an argument is of the wrong type.
            InvalidEvent: the record is too large.
            DeliveryError, UnusableClient: as `send_impression`.
        """
        self._delivery.lifetime.check()
        self._delivery.send_event(*check_raw(topic, key, value, headers))

    def flush(self, timeout_ms: int = 60_000) -> None:
        """Wait until every record sent so far is acknowledged.

        Raises:
            DeliveryError: records failed since the last flush, or are still outstanding after `timeout_ms`.
            InvalidOption: `timeout_ms` is not a number of milliseconds.
            UnusableClient: as `send_impression`.
        """
        self._delivery.lifetime.check()
        self._delivery.flush(check_wait(timeout_ms, "timeout_ms"))

    def close(self, timeout_ms: int = 60_000) -> None:
        """Flush, then disconnect, which takes at most 15 s more. Closing a closed client does nothing.

        Raises as `flush`; the connections are closed even then.
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
