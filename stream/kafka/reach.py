"""Whether Kafka can be reached at all: asked once, before a command or a worker does anything else.

The clients under us each wait in their own way: some for ever, some for 40 s, some with a page of logs. One question before any
of them starts gives every command and every worker the same limit, `kafka.connect_timeout_ms`, and the same message.
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
from stream.kafka.clients import aiokafka_options, bootstrap_list
from stream.settings import KafkaSettings

__all__ = ["reach", "unreachable"]

# Between two attempts at one address: a broker that is just starting refuses connections for some seconds.
RETRY_S = 0.2


async def reach(kafka: KafkaSettings) -> None:
    """Wait until one of the bootstrap servers takes our connection and speaks Kafka, at most kafka.connect_timeout_ms.

    Raises:
        NoAnswer: none does; the message says what was found at each address. A failed log-in or certificate raises at once.
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
        raise unreachable(kafka, found)
    for attempt in done:
        attempt.result()


def unreachable(kafka: KafkaSettings, found: dict[str, str]) -> NoAnswer:
    """What a user reads when no broker answers: what was found at each address."""
    told = (
        found[kafka.bootstrap_servers]
        if found.keys() == {kafka.bootstrap_servers}
        else "; ".join(f"{server}: {what}" for server, what in found.items())
    )
    return NoAnswer(
        f"Kafka at {kafka.bootstrap_servers} ({kafka.security_protocol}): expected a broker that answers within "
        f"{kafka.connect_timeout_ms / 1_000:g} s, found {told}. Check that it runs (`headrace kafka status` for a local one) "
        "and that HEADRACE_KAFKA__BOOTSTRAP_SERVERS and the security settings are right."
    )


async def _attempt(kafka: KafkaSettings, server: str, options: dict[str, Any], found: dict[str, str]) -> None:
    """Connect to one address again and again until it works."""
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
    """A refused connection comes as one of several addresses' errors, in words of asyncio's: the system's are plainer."""
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0 and not isinstance(error, ssl.SSLError):
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


@contextmanager
def _without_logs() -> Iterator[None]:
    """aiokafka reports each refused connection as an error; here it is an answer."""
    logger = logging.getLogger("aiokafka")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
