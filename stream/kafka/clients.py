"""Options for every Kafka client, from one settings object; time limits for Kafka's answers, and the error when none comes.

Secrets are unmasked here and nowhere else. What the `…_options` functions return must not be logged.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import SecretStr

from stream.errors import NoAnswer, SecurityError
from stream.kafka import batch_reader, fetched
from stream.settings import KafkaSettings

if TYPE_CHECKING:
    from aiokafka.admin import AIOKafkaAdminClient

__all__ = [
    "STOP_S",
    "admin_client",
    "aiokafka_options",
    "answer",
    "bootstrap_list",
    "faust_options",
    "kafka_python_options",
    "quietly_stopped",
    "ssl_context",
    "started",
    "unreachable",
    "written",
]

log = logging.getLogger(__name__)

T = TypeVar("T")

# How long to wait for one answer, in request timeouts (kafka.request_timeout_ms, 40 s). A request to a broker that has just
# died takes one whole timeout, and the next broker's answer takes a part of another. A limit is needed since aiokafka asks
# again for ever in some places, for instance for the coordinator of a transaction.
PATIENCE = 1.5
# How long to wait for a client to stop while its broker doesn't answer. Two of these fit into a worker's time to drain (9 s).
STOP_S = 4.0


async def answer(kafka: KafkaSettings, asked: Awaitable[T], what: str, *, within_s: float | None = None) -> T:
    """Await an answer from Kafka for a limited time.

    ```python
    ends = await answer(settings, consumer.end_offsets(partitions), "the ends of examples")
    ```

    Args:
        asked: the request; it is cancelled when the time is up.
        what: what was asked for, for the error's text.
        within_s: the limit; by default 1.5 times kafka.request_timeout_ms.

    Raises:
        NoAnswer: no answer came in time.
        aiokafka.errors.KafkaError: as the request raises.
    """
    limit_s = kafka.request_timeout_ms * PATIENCE / 1_000 if within_s is None else within_s
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            return await asked
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise NoAnswer(
            f"Kafka at {kafka.bootstrap_servers}: expected an answer about {what} within {limit_s:g} s, found none. Check that "
            "its brokers run and that each partition has a leader (`headrace doctor`). kafka.request_timeout_ms limits the "
            "wait for one request."
        ) from error


class Client(Protocol):
    """aiokafka's consumer or producer."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


C = TypeVar("C", bound=Client)


async def started(kafka: KafkaSettings, client: C, what: str, *, within_s: float | None = None) -> C:
    """Start a client, and return it. A client that can't be started is stopped again.

    Args:
        what: what the client is for, for the error's text.

    Raises:
        NoAnswer: Kafka can't be reached, or the client couldn't start in time.
        aiokafka.errors.KafkaError: as `start` raises.
    """
    try:
        await _start(kafka, client.start, what, within_s)
    except BaseException:
        await quietly_stopped(client.stop)
        raise
    return client


async def _start(
    kafka: KafkaSettings, start: Callable[[], Awaitable[object]], what: str, within_s: float | None = None
) -> None:
    from aiokafka.errors import KafkaConnectionError

    try:
        await answer(kafka, start(), what, within_s=within_s)
    except KafkaConnectionError as error:
        raise unreachable(kafka, f"an answer about {what}", error) from error


def unreachable(kafka: KafkaSettings, expected: str, found: BaseException | str) -> NoAnswer:
    """The error for a Kafka that can't be reached, or answers with an error. All code raises this one, so its text is the same.

    Args:
        expected: what was to come, such as "an answer about topics".
        found: what came instead: text, or an error of either client library.
    """
    if isinstance(found, BaseException):
        name, text = type(found).__name__, " ".join(str(found).split())
        if not text.startswith(name):  # aiokafka's errors begin with their own name
            text = f"{name}: {text}" if text else name
        found = text
    return NoAnswer(
        f"Kafka at {kafka.bootstrap_servers} ({kafka.security_protocol}): expected {expected}, found {found}. "
        "Check that it runs (`headrace kafka status` for a local one) and that HEADRACE_KAFKA__BOOTSTRAP_SERVERS and the "
        "security settings are right."
    )


async def written(
    kafka: KafkaSettings, futures: Sequence[asyncio.Future[T]], what: str, *, within_s: float | None = None
) -> list[T]:
    """Await the futures of records or batches that a producer was given, for a limited time.

    Without the limit aiokafka's idempotent producer would retry for ever.

    Raises:
        NoAnswer: a record isn't written in time. It may still be written later.
        aiokafka.errors.KafkaError: a broker rejects a record.
    """
    if not futures:
        return []
    # When the time is up, `asyncio.wait` leaves the futures alone. If they were awaited one by one, the time limit would cancel
    # a future that belongs to the producer.
    await answer(kafka, asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION), f"what was sent: {what}", within_s=within_s)
    return [await future for future in futures]


async def quietly_stopped(stop: Callable[[], Awaitable[object]]) -> None:
    """Stop a client that is no longer needed, within `STOP_S` and without raising what the client raises.

    Two things would otherwise hold up or break the caller:

    - A transactional producer waits for its open transaction: for ever where the brokers are gone.
    - A consumer without brokers raises CancelledError from its own tasks, although nobody has cancelled the caller.
    """
    try:
        async with asyncio.timeout(STOP_S):
            await stop()
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        log.debug("a client was left behind: %r", error)
    except Exception as error:  # the connections end with the process, the transaction ends by the broker's own timeout
        log.debug("a client was left behind: %r", error)


@asynccontextmanager
async def admin_client(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    """A started aiokafka admin client. Each of its requests may take kafka.request_timeout_ms.

    Raises:
        NoAnswer: Kafka can't be reached.
    """
    from aiokafka.admin import AIOKafkaAdminClient

    admin = AIOKafkaAdminClient(**aiokafka_options(kafka))
    try:
        await _start(kafka, admin.start, "the cluster")
        yield admin
    finally:
        await quietly_stopped(admin.close)


def bootstrap_list(settings: KafkaSettings) -> list[str]:
    """The bootstrap servers, one `host:port` each.

    Raises:
        SecurityError: no address, or one without a port.
    """
    servers = [server.strip() for server in settings.bootstrap_servers.split(",") if server.strip()]
    if not servers:
        raise SecurityError(
            "kafka.bootstrap_servers: expected host:port, found nothing. Set HEADRACE_KAFKA__BOOTSTRAP_SERVERS, or run "
            "`headrace kafka start`, which prints the address of a local Kafka."
        )
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or not port.isdigit():
            raise SecurityError(
                f"kafka.bootstrap_servers: expected host:port, several separated by commas, found {server!r}. "
                "Add the port (Kafka's own default is 9092)."
            )
    return servers


def ssl_context(settings: KafkaSettings) -> ssl.SSLContext | None:
    """The TLS context; None for a protocol without TLS. Certificates and host names are always verified.

    Raises:
        SecurityError: a file that is missing or unreadable as PEM, a wrong password, or a key without its certificate.
    """
    if settings.security_protocol not in ("SSL", "SASL_SSL"):
        return None
    for key in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
        file = getattr(settings, key)
        if file is not None and not file.is_file():
            raise SecurityError(f"kafka.{key}: expected a PEM file, found nothing at {file}. Correct the path.")
    if settings.ssl_keyfile is not None and settings.ssl_certfile is None:
        raise SecurityError(
            "kafka.ssl_keyfile: expected kafka.ssl_certfile beside it, found none. Set both, or neither when the brokers "
            "ask for no client certificate."
        )
    try:
        context = ssl.create_default_context(cafile=settings.ssl_cafile)
    except ssl.SSLError as error:
        raise SecurityError(
            f"kafka.ssl_cafile: expected certificates in PEM, found {settings.ssl_cafile} ({error}). Convert it with "
            "`openssl x509 -in FILE -out FILE.pem`."
        ) from error
    if settings.ssl_certfile is not None:
        try:
            # The password is given by a function: with None, OpenSSL asks on the terminal for it, and a worker would hang.
            context.load_cert_chain(
                settings.ssl_certfile, settings.ssl_keyfile, lambda: _unmasked(settings.ssl_keyfile_password) or ""
            )
        except (ssl.SSLError, ValueError) as error:
            raise SecurityError(
                f"kafka.ssl_certfile {settings.ssl_certfile}, kafka.ssl_keyfile {settings.ssl_keyfile}: expected a "
                f"certificate and its key in PEM, found: {error}. Check that they belong together, and "
                "kafka.ssl_keyfile_password when the key is encrypted."
            ) from error
    return context


def aiokafka_options(settings: KafkaSettings) -> dict[str, Any]:
    """Keyword arguments for aiokafka's consumer, producer and admin client."""
    fetched.install()
    batch_reader.install()
    return _options(settings)


def kafka_python_options(settings: KafkaSettings) -> dict[str, Any]:
    """Keyword arguments for kafka-python's consumer, producer and admin client."""
    return _options(settings)


def faust_options(settings: KafkaSettings) -> dict[str, Any]:
    """Keyword arguments for `faust.App`: broker URLs, client id, timeout in seconds, credentials."""
    import faust

    fetched.install()
    batch_reader.install()
    options: dict[str, Any] = {
        "broker": [f"kafka://{server}" for server in bootstrap_list(settings)],
        "broker_client_id": settings.client_id,
        "broker_request_timeout": settings.request_timeout_ms / 1_000,
    }
    context = ssl_context(settings)
    if settings.security_protocol.startswith("SASL_"):
        username, password = _sasl(settings)
        options["broker_credentials"] = faust.SASLCredentials(
            username=username, password=password, ssl_context=context, mechanism=settings.sasl_mechanism
        )
    elif context is not None:
        options["broker_credentials"] = faust.SSLCredentials(context)
    return options


def _options(settings: KafkaSettings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "bootstrap_servers": bootstrap_list(settings),
        "client_id": settings.client_id,
        "request_timeout_ms": settings.request_timeout_ms,
        "security_protocol": settings.security_protocol,
    }
    context = ssl_context(settings)
    if context is not None:
        options["ssl_context"] = context
    if settings.security_protocol.startswith("SASL_"):
        username, password = _sasl(settings)
        options["sasl_mechanism"] = settings.sasl_mechanism
        options["sasl_plain_username"] = username
        options["sasl_plain_password"] = password
    return options


def _sasl(settings: KafkaSettings) -> tuple[str, str]:
    username, password = settings.sasl_username, _unmasked(settings.sasl_password)
    for key, value in (("sasl_username", username), ("sasl_password", password)):
        if not value:
            raise SecurityError(
                f"kafka.{key}: expected a value, since kafka.security_protocol is {settings.security_protocol}, found "
                f"none. Set HEADRACE_KAFKA__{key.upper()}, or another protocol."
            )
    assert username is not None and password is not None
    return username, password


def _unmasked(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
