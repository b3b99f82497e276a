"""The report of settings: each value with its source, and which values do not work together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from pydantic import BaseModel, SecretStr
from pydantic_settings import EnvSettingsSource, TomlConfigSettingsSource

from deploy.errors import DeployError
from deploy.local_kafka.java import find_java
from deploy.settings import Settings, settings_file
from stream.errors import StreamError
from stream.formats import open_formats
from stream.kafka.clients import aiokafka_options
from stream.topics.contract import topic_contracts
from stream.topics.needs import RETENTION_FORMULA

__all__ = ["Entry", "Finding", "entries", "findings"]

# How many intervals between versions `deltas` must be kept for: a version is announced up to one interval late while its store
# is slow, and a scorer needs up to one more to load it.
VERSIONS_KEPT = 3
MASK = "**********"


class Entry(msgspec.Struct, frozen=True):
    """One setting: its key (`kafka.client_id`), its value with secrets masked, and where the value came from."""

    key: str
    value: Any
    source: Literal["default", "file", "environment"]
    variable: str
    """The environment variable that sets it."""


class Finding(msgspec.Struct, frozen=True):
    """A remark on a setting: an `error` stops a worker or loses data; a `hint` may be intended."""

    level: Literal["error", "hint"]
    key: str
    message: str


def entries(settings: Settings) -> list[Entry]:
    """Every setting, in the order of the tree."""
    environment = EnvSettingsSource(Settings)()
    file = TomlConfigSettingsSource(Settings, settings_file())()
    found = []
    for path, value in _leaves(settings):
        source: Literal["default", "file", "environment"] = (
            "environment" if _has(environment, path) else "file" if _has(file, path) else "default"
        )
        variable = "HEADRACE_" + "__".join(path).upper()
        found.append(Entry(".".join(path), _shown(value), source, variable))
    return found


def findings(settings: Settings) -> list[Finding]:
    """Settings that do not work together, and settings that are likely a mistake. Opens no connection."""
    return [finding for check in _CHECKS for finding in check(settings)]


def _leaves(model: BaseModel, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _has(tree: Any, path: tuple[str, ...]) -> bool:
    for part in path:
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


def _shown(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, tuple):
        return [_shown(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _features(settings: Settings) -> Iterator[Finding]:
    if not settings.features.fields:
        yield Finding(
            "hint",
            "features.fields",
            "no features are named, so there is nothing to learn from: trainers and scorers need them (the demo and `headrace "
            "replay` name those of their data set). Add [[features.fields]] tables to the file.",
        )


def _retention(settings: Settings) -> Iterator[Finding]:
    needed, kept = settings.join.reaches_back_ms, settings.topics.retention_ms
    if needed > kept:
        yield Finding(
            "error",
            "topics.retention_ms",
            f"expected at least what the join needs, {needed} ms ({RETENTION_FORMULA}), found {kept}: impressions would be "
            "deleted before they are labelled, or a join that lost its local state could not remember every label. Raise it, "
            "or lower join.window_ms or join.dedupe_horizon_ms.",
        )
    elif needed * 2 > kept:
        yield Finding(
            "hint",
            "topics.retention_ms",
            f"{kept} ms is less than twice what the join needs, {needed} ms ({RETENTION_FORMULA}): little is left for "
            "downtime. Raise it.",
        )


def _deltas(settings: Settings) -> Iterator[Finding]:
    kept, interval = settings.topics.deltas_retention_ms, settings.snapshots.interval_ms
    if kept < VERSIONS_KEPT * interval:
        yield Finding(
            "error",
            "topics.deltas_retention_ms",
            f"expected at least {VERSIONS_KEPT} times snapshots.interval_ms ({interval}), found {kept}: deltas would be "
            "deleted before a scorer that loads the version before them could read them. Raise it, or lower the interval.",
        )


def _topics(settings: Settings) -> Iterator[Finding]:
    try:
        topic_contracts(settings.topics)
    except StreamError as error:
        yield Finding("error", "topics.min_insync_replicas", str(error))
    hosts = [server.strip().rsplit(":", 1)[0] for server in settings.kafka.bootstrap_servers.split(",")]
    if settings.topics.replication_factor == 1 and any(host not in ("127.0.0.1", "localhost", "[::1]") for host in hosts):
        yield Finding(
            "hint",
            "topics.replication_factor",
            "1, on brokers that are not on this machine: the loss of one broker loses events. With three brokers or more, 3 "
            "replicas and topics.min_insync_replicas 2 survive the loss.",
        )


def _security(settings: Settings) -> Iterator[Finding]:
    kafka = settings.kafka
    try:
        aiokafka_options(kafka)
    except StreamError as error:
        yield Finding("error", "kafka", str(error))
    if kafka.security_protocol == "SASL_PLAINTEXT":
        yield Finding(
            "hint",
            "kafka.security_protocol",
            "SASL_PLAINTEXT sends the data, and with PLAIN the password, in the clear. SASL_SSL encrypts them.",
        )
    sasl = kafka.security_protocol.startswith("SASL_")
    tls = kafka.security_protocol.endswith("SSL")
    for key, used in (("sasl_username", sasl), ("sasl_password", sasl), ("ssl_cafile", tls), ("ssl_certfile", tls)):
        if getattr(kafka, key) is not None and not used:
            yield Finding(
                "hint", f"kafka.{key}", f"set, but kafka.security_protocol is {kafka.security_protocol}, which doesn't use it."
            )
    file = TomlConfigSettingsSource(Settings, settings_file())()
    for key in ("sasl_password", "ssl_keyfile_password"):
        if _has(file, ("kafka", key)):
            yield Finding(
                "hint",
                f"kafka.{key}",
                f"in {settings_file()}, where everyone who reads the file sees it. HEADRACE_KAFKA__{key.upper()} keeps it out.",
            )


def _schema_registry(settings: Settings) -> Iterator[Finding]:
    chosen = settings.schema_registry
    try:
        open_formats(chosen)
    except StreamError as error:
        key = "ssl_cafile" if str(error).startswith("schema_registry.ssl_cafile") else "url"
        yield Finding("error", f"schema_registry.{key}", str(error))
    file = TomlConfigSettingsSource(Settings, settings_file())()
    for key in ("password", "token"):
        if _has(file, ("schema_registry", key)):
            yield Finding(
                "hint",
                f"schema_registry.{key}",
                f"in {settings_file()}, where everyone who reads the file sees it. HEADRACE_SCHEMA_REGISTRY__{key.upper()} "
                "keeps it out.",
            )
    if (chosen.username or chosen.token) and any(each.strip().startswith("http:") for each in (chosen.url or "").split(",")):
        yield Finding("hint", "schema_registry.url", "http:// sends the login in the clear. https:// encrypts it.")


def _scorer(settings: Settings) -> Iterator[Finding]:
    scorer = settings.scorer
    if scorer.lease_ms < 2 * scorer.heartbeat_ms:
        yield Finding(
            "error",
            "scorer.lease_ms",
            f"expected at least twice scorer.heartbeat_ms ({scorer.heartbeat_ms}), found {scorer.lease_ms}: one late heartbeat "
            "would make a scorer count as unconfirmed. Raise the lease.",
        )


def _snapshots(settings: Settings) -> Iterator[Finding]:
    low, high = settings.snapshots.served_calibration_band
    if not 0 <= low < 1 < high:
        yield Finding(
            "error",
            "snapshots.served_calibration_band",
            f"expected a band around 1, as [0.8, 1.25], found [{low}, {high}]: the alarm would never end. Correct the band.",
        )


def _java(settings: Settings) -> Iterator[Finding]:
    if settings.local_kafka.java is not None:
        try:
            find_java(settings.local_kafka.java)
        except DeployError as error:
            yield Finding("error", "local_kafka.java", str(error))


_CHECKS: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
    _features,
    _retention,
    _deltas,
    _topics,
    _security,
    _schema_registry,
    _scorer,
    _snapshots,
    _java,
)
