from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from functools import partial
from pathlib import Path

import pytest

from stream.errors import SecurityError
from stream.kafka.clients import (
    aiokafka_options,
    bootstrap_list,
    faust_options,
    kafka_python_options,
    quietly_stopped,
    ssl_context,
)
from stream.settings import KafkaSettings

SASL = {"sasl_username": "headrace", "sasl_password": "s3cret"}


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A self-signed certificate and its key, encrypted with the password `open`."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the test's certificate, is not on this machine")
    folder = tmp_path_factory.mktemp("pem")
    certificate, key = folder / "client.pem", folder / "client.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-subj", "/CN=localhost"),
            *("-passout", "pass:open", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return {"certificate": certificate, "key": key}


def test_plaintext_is_an_address_and_a_name() -> None:
    settings = KafkaSettings(bootstrap_servers="a:1, b:2,", client_id="me", request_timeout_ms=5_000)
    expected = {
        "bootstrap_servers": ["a:1", "b:2"],
        "client_id": "me",
        "request_timeout_ms": 5_000,
        "security_protocol": "PLAINTEXT",
    }
    assert aiokafka_options(settings) == expected
    assert kafka_python_options(settings) == expected
    assert faust_options(settings) == {
        "broker": ["kafka://a:1", "kafka://b:2"],
        "broker_client_id": "me",
        "broker_request_timeout": 5.0,
    }


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("protocol", ["SASL_PLAINTEXT", "SASL_SSL"])
def test_sasl_reaches_every_client(protocol: str, mechanism: str) -> None:
    settings = KafkaSettings.model_validate({"security_protocol": protocol, "sasl_mechanism": mechanism} | SASL)
    for options in (aiokafka_options(settings), kafka_python_options(settings)):
        assert options["security_protocol"] == protocol
        assert options["sasl_mechanism"] == mechanism
        assert (options["sasl_plain_username"], options["sasl_plain_password"]) == ("headrace", "s3cret")
        assert ("ssl_context" in options) == (protocol == "SASL_SSL")
    credentials = faust_options(settings)["broker_credentials"]
    assert (credentials.protocol.value, credentials.mechanism.value) == (protocol, mechanism)
    assert (credentials.username, credentials.password) == ("headrace", "s3cret")
    assert "s3cret" not in repr(credentials)
    assert "s3cret" not in repr(settings)


def test_tls_checks_certificates_and_names(pem: dict[str, Path]) -> None:
    settings = KafkaSettings.model_validate({"security_protocol": "SSL", "ssl_cafile": pem["certificate"]})
    context = ssl_context(settings)
    assert context is not None
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert [dict(name[0] for name in ca["subject"])["commonName"] for ca in context.get_ca_certs()] == ["localhost"]  # type: ignore[misc]
    credentials = faust_options(settings)["broker_credentials"]
    assert credentials.protocol.value == "SSL"
    assert isinstance(credentials.context, ssl.SSLContext)


def test_client_certificate_with_password(pem: dict[str, Path]) -> None:
    files = {"security_protocol": "SSL", "ssl_certfile": pem["certificate"], "ssl_keyfile": pem["key"]}
    assert ssl_context(KafkaSettings.model_validate(files | {"ssl_keyfile_password": "open"})) is not None
    for wrong in ({"ssl_keyfile_password": "shut"}, {}):
        with pytest.raises(SecurityError, match=r"ssl_keyfile_password when the key is encrypted"):
            ssl_context(KafkaSettings.model_validate(files | wrong))


def test_clients_accept_the_options(pem: dict[str, Path]) -> None:
    from aiokafka.admin import AIOKafkaAdminClient
    from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth

    settings = KafkaSettings.model_validate(
        {"security_protocol": "SASL_SSL", "sasl_mechanism": "SCRAM-SHA-512", "ssl_cafile": pem["certificate"]} | SASL
    )
    faust_auth = credentials_to_aiokafka_auth(faust_options(settings)["broker_credentials"])
    direct = aiokafka_options(settings)
    del direct["bootstrap_servers"], direct["client_id"], direct["request_timeout_ms"]
    assert faust_auth.keys() == direct.keys()
    assert {k: v for k, v in faust_auth.items() if k != "ssl_context"} == {
        k: v for k, v in direct.items() if k != "ssl_context"
    }
    assert "sasl_plain_password" in AIOKafkaAdminClient.__init__.__kwdefaults__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bootstrap_servers": " , "}, r"bootstrap_servers: expected host:port, found nothing.*headrace kafka start"),
        ({"bootstrap_servers": "a:1,broker"}, r"expected host:port.*found 'broker'.*9092"),
        (
            {"security_protocol": "SASL_SSL"},
            r"sasl_username: expected a value.*SASL_SSL.*HEADRACE_KAFKA__SASL_USERNAME",
        ),
        (
            {"security_protocol": "SASL_PLAINTEXT", "sasl_username": "me"},
            r"sasl_password: expected a value.*HEADRACE_KAFKA__SASL_PASSWORD",
        ),
        (
            {"security_protocol": "SSL", "ssl_cafile": "/nowhere/ca.pem"},
            r"ssl_cafile.*found nothing at /nowhere/ca.pem",
        ),
    ],
)
def test_errors_name_the_setting(change: dict[str, str], message: str) -> None:
    settings = KafkaSettings.model_validate(change)
    for options in (aiokafka_options, kafka_python_options, faust_options):
        with pytest.raises(SecurityError, match=message):
            options(settings)


def test_a_key_needs_its_certificate(tmp_path: Path) -> None:
    key = tmp_path / "client.key"
    key.write_text("not a key")
    with pytest.raises(SecurityError, match=r"ssl_keyfile: expected kafka.ssl_certfile beside it"):
        ssl_context(KafkaSettings(security_protocol="SSL", ssl_keyfile=key))
    with pytest.raises(SecurityError, match=r"ssl_cafile: expected certificates in PEM.*openssl x509"):
        ssl_context(KafkaSettings(security_protocol="SSL", ssl_cafile=key))


def test_tls_files_are_not_read_without_tls() -> None:
    assert ssl_context(KafkaSettings(ssl_cafile=Path("/nowhere"))) is None


def test_ipv6_addresses() -> None:
    assert bootstrap_list(KafkaSettings(bootstrap_servers="[::1]:9092")) == ["[::1]:9092"]


def test_a_client_that_lets_its_own_cancelling_out_is_left_behind() -> None:
    """As aiokafka's consumer does when its fetches sleep between two tries; the worker's own end must not be one of it."""

    async def stop() -> None:
        sleeping = asyncio.ensure_future(asyncio.sleep(60))
        await asyncio.sleep(0)
        sleeping.cancel()
        await sleeping

    async def check() -> None:
        await quietly_stopped(stop)
        outer = asyncio.ensure_future(quietly_stopped(partial(asyncio.sleep, 60)))
        await asyncio.sleep(0.01)
        outer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await outer

    asyncio.run(check())
