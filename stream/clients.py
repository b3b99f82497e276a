"""What each Kafka client is built with, from one settings object: addresses, client id, security.

Secrets are unmasked here and nowhere else; what these functions return must not be logged.
"""

from __future__ import annotations

import ssl
from typing import Any

from pydantic import SecretStr

from stream import batch_reader, fetched
from stream.errors import SecurityError
from stream.settings import KafkaSettings

__all__ = ["aiokafka_options", "bootstrap_list", "faust_options", "kafka_python_options", "ssl_context"]


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
    """The TLS context, or None where the protocol has no TLS. Certificates and host names are always checked.

    Raises:
        SecurityError: a file that is missing or unreadable as PEM, a wrong password, or a key without its certificate.
    """
    if settings.security_protocol not in ("SSL", "SASL_SSL"):
        return None
    for key in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
        file = getattr(settings, key)
        if file is not None and not file.is_file():
            raise SecurityError(f"kafka.{key}: expected a PEM file, found nothing at {file}. Mend the path.")
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
            # A function, since with a plain None OpenSSL would ask on the terminal, and a worker would wait for ever.
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
