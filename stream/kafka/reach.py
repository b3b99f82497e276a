"""Whether Kafka can be reached: checked once, before a command or a worker does anything else.

Each client library waits in its own way for a Kafka that isn't there: for ever, for 40 s, or with a page of logs. One check
before any client starts gives every command and every worker the same limit, `kafka.connect_timeout_ms`, and the same message.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from stream.errors import NoAnswer
from stream.kafka.clients import aiokafka_options, bootstrap_list, unreachable
from stream.settings import KafkaSettings

__all__ = ["reach"]

# Wait between two attempts at one address. A broker that is just starting refuses connections for some seconds.
RETRY_S = 0.2


async def reach(kafka: KafkaSettings) -> None:
    """Wait until one of the bootstrap servers accepts a connection and speaks Kafka, at most kafka.connect_timeout_ms.

    Raises:
        NoAnswer: none does; the message says what was found at each address. A failed log-in, or a certificate that isn't
            trusted, raises at once.
        SecurityError: the settings can't be used.
    """
    options = aiokafka_options(kafka)
    found = dict.fromkeys(bootstrap_list(kafka), "a connection, but no answer of a Kafka broker")
    with _without_logs():
        attempts = [asyncio.ensure_future(_attempt(kafka, server, options, found)) for server in found]
        try:
            done, _ = await asyncio.wait(
                attempts, timeout=kafka.connect_timeout_ms / 1_000, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for attempt in attempts:
                attempt.cancel()
            await asyncio.gather(*attempts, return_exceptions=True)
    if not done:
        expected = f"a broker that answers within {kafka.connect_timeout_ms / 1_000:g} s"
        raise unreachable(kafka, expected, _by_address(kafka, found))
    for attempt in done:
        attempt.result()


def _by_address(kafka: KafkaSettings, found: dict[str, str]) -> str:
    """What was found at each address; without the address where it is the only one, since the message begins with that."""
    if found.keys() == {kafka.bootstrap_servers}:
        return found[kafka.bootstrap_servers]
    return "; ".join(f"{server}: {what}" for server, what in found.items())


async def _attempt(kafka: KafkaSettings, server: str, options: dict[str, Any], found: dict[str, str]) -> None:
    """Connect to one address again and again until that works. `found` keeps what the last attempt met."""
    from aiokafka.conn import create_conn
    from aiokafka.errors import AuthenticationFailedError, KafkaError, SaslAuthenticationFailed

    host, _, port = server.rpartition(":")
    options = {name: value for name, value in options.items() if name != "bootstrap_servers"}
    while True:
        try:
            connection = await create_conn(host.strip("[]"), int(port), **options)
        except (AuthenticationFailedError, SaslAuthenticationFailed) as error:
            _refused(kafka, server, f"that the log-in failed ({_shown(error)})")
        except ssl.SSLCertVerificationError as error:
            _refused(kafka, server, f"a certificate that isn't trusted ({error.verify_message})")
        except OSError as error:
            found[server] = _shown(error)
        except KafkaError as error:
            found[server] = f"a listener that isn't a Kafka broker, or not one for {kafka.security_protocol} ({_shown(error)})"
        else:
            connection.close()
            return
        await asyncio.sleep(RETRY_S)


def _refused(kafka: KafkaSettings, server: str, what: str) -> NoReturn:
    raise NoAnswer(
        f"Kafka at {server} ({kafka.security_protocol}): expected to be let in, found {what}. Check the settings under kafka: "
        "`headrace config show` prints them, secrets masked."
    )


def _shown(error: Exception) -> str:
    """The error in the operating system's words where it has a code: asyncio's text for a refused connection is longer."""
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0 and not isinstance(error, ssl.SSLError):
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


@contextmanager
def _without_logs() -> Iterator[None]:
    """aiokafka logs each refused connection as an error. Here it is one of the expected answers."""
    logger = logging.getLogger("aiokafka")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
