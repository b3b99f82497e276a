"""Creates the nine topics, and finds where a cluster's topics differ from the contract.

For programs without a running event loop: `topic_configs` runs in one of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from state.tracks import MAIN
from stream.errors import TopicError
from stream.kafka.clients import kafka_python_options, unreachable
from stream.kafka.cluster import topic_configs
from stream.settings import JoinSettings, KafkaSettings, TopicSettings
from stream.topics.contract import Difference, TopicContract, topic_contracts
from stream.topics.names import TopicNames
from stream.topics.needs import retention_shortfalls, unequal_partitions

if TYPE_CHECKING:
    from kafka.admin import KafkaAdminClient

__all__ = ["Difference", "Found", "Made", "check_topics", "create_topics", "differences", "find_topics"]

POLL_S = 0.2
VISIBLE_TIMEOUT_MS = 30_000  # from creation until all leaders are elected, on a loaded cluster
ALREADY_EXISTS = 36  # Kafka's error code: another client has created the topic at the same moment
ANSWER = "an answer about topics"  # what was asked for, in the error of a Kafka that can't be reached


class Made(msgspec.Struct, frozen=True):
    """What `create_topics` did: topics that it created, topics whose configuration it set, and topics that it left alone."""

    created: list[str]
    mended: list[str]
    kept: list[str]


def create_topics(
    kafka: KafkaSettings,
    topics: TopicSettings,
    join: JoinSettings | None = None,
    *,
    mend: bool = False,
    track: str = MAIN,
) -> Made:
    """Create the topics that are missing. Existing ones are left alone. Safe to repeat, also by two processes at once.

    Args:
        join: the settings that retention must be long enough for; None: don't check retention.
        mend: also set the configuration of existing topics to the contract's. Partitions and replicas of existing topics are
            never changed.

    Raises:
        NoAnswer: the cluster can't be reached.
        TopicError: the cluster rejects a topic, or the join couldn't use the topics.
    """
    contracts, names = topic_contracts(topics, track), TopicNames.of(topics)
    if join is not None:
        _require_retention(names, topics, join)
    with _admin(kafka) as admin:
        found = _describe(kafka, admin, contracts)
        _require_equal_partitions(names, contracts, found)
        missing = [contract for contract in contracts if contract.name not in found]
        if missing:
            _create(kafka, admin, missing)
        mended = _set_configs(kafka, admin, contracts, found) if mend else []
    created = [contract.name for contract in missing]
    kept = [contract.name for contract in contracts if contract.name not in {*created, *mended}]
    return Made(created=created, mended=mended, kept=kept)


def check_topics(
    kafka: KafkaSettings, topics: TopicSettings, join: JoinSettings | None = None, *, track: str = MAIN
) -> list[Difference]:
    """Where the cluster's topics differ from the contract, or from what the join needs. Never writes.

    Args:
        join: the settings that retention must be long enough for; None: don't check retention.
        track: also check the topics of this track.

    Raises:
        NoAnswer: the cluster can't be reached.
    """
    found, names = find_topics(kafka, topics, track), TopicNames.of(topics)
    problems = differences(topic_contracts(topics, track), found)
    unequal = unequal_partitions(names, {name: topic.partitions for name, topic in found.items()})
    if unequal is not None:
        problems.append(unequal)
    if join is not None:
        problems += retention_shortfalls(names, join, {name: topic.configs for name, topic in found.items()})
    return problems


def find_topics(kafka: KafkaSettings, topics: TopicSettings, track: str = MAIN) -> dict[str, Found]:
    """Those of the nine topics, and of the track's own ones, that the cluster has, by name. Never writes.

    Raises:
        NoAnswer: the cluster can't be reached.
        TopicError: the configuration of a topic may not be read.
    """
    with _admin(kafka) as admin:
        return _describe(kafka, admin, topic_contracts(topics, track))


class Found(msgspec.Struct, frozen=True):
    """A topic as the cluster has it."""

    partitions: int
    replicas: int
    """The smallest number of replicas of any partition."""
    configs: Mapping[str, str]


def differences(contracts: Sequence[TopicContract], found: Mapping[str, Found]) -> list[Difference]:
    """Compare topics with their contracts; the part of `check_topics` that sends no request."""
    problems = []
    for contract in contracts:
        topic = found.get(contract.name)
        if topic is None:
            track = "" if contract.track == MAIN else f" --track {contract.track}"
            problems.append(Difference(contract.name, "topic", "present", "absent", f"headrace topics create{track}"))
            continue
        if topic.partitions != contract.partitions:
            cure = _partitions_cure(contract, topic.partitions)
            problems.append(Difference(contract.name, "partitions", str(contract.partitions), str(topic.partitions), cure))
        if topic.replicas != contract.replication_factor:
            cure = (
                f"HEADRACE_TOPICS__REPLICATION_FACTOR={topic.replicas} accepts what is there; to change the topic, move it "
                "with Kafka's kafka-reassign-partitions.sh"
            )
            problems.append(Difference(contract.name, "replicas", str(contract.replication_factor), str(topic.replicas), cure))
        problems.extend(
            Difference(contract.name, key, value, topic.configs.get(key, "unset"), "headrace topics create --mend")
            for key, value in contract.configs.items()
            if not _same(value, topic.configs.get(key))
        )
    return problems


def _require_retention(names: TopicNames, topics: TopicSettings, join: JoinSettings) -> None:
    wanted = {names.impressions: {"retention.ms": str(topics.retention_ms)}}
    for short in retention_shortfalls(names, join, wanted):
        raise TopicError(
            f"topics.retention_ms: expected {short.expected}, found {short.found}. Nothing was made: {short.cure}."
        )


def _require_equal_partitions(names: TopicNames, contracts: Sequence[TopicContract], found: Mapping[str, Found]) -> None:
    """Raise TopicError if missing topics would get another number of partitions than existing ones.

    The join could not start on such topics.
    """
    counts = {contract.name: found[contract.name].partitions for contract in contracts if contract.name in found}
    planned = {contract.name: contract.partitions for contract in contracts} | counts
    unequal = unequal_partitions(names, planned)
    if unequal is None or counts.keys() >= set(unequal.topic.split(", ")):  # `topics check` compares those that exist
        return
    there = sorted({counts[topic] for topic in unequal.topic.split(", ") if topic in counts})
    cure = (
        f"HEADRACE_TOPICS__PARTITIONS={there[0]} makes the missing ones like those that exist"
        if len(there) == 1
        else unequal.cure
    )
    raise TopicError(
        f"topics {unequal.topic}: expected {unequal.expected}; found {unequal.found}, where those that are missing would have "
        f"topics.partitions. Nothing was made: {cure}."
    )


def _partitions_cure(contract: TopicContract, found: int) -> str:
    if contract.partitions_setting is None:
        return (
            f"delete the topic (kafka-topics.sh --delete --topic {contract.name}; what it holds is lost), then "
            "`headrace topics create`"
        )
    variable = "HEADRACE_" + contract.partitions_setting.upper().replace(".", "__")
    return (
        f"{variable}={found} accepts what is there, if every topic it sets has that count; keys would change partition in a "
        "topic that grows, so to change it begin with new topics (another HEADRACE_TOPICS__PREFIX)"
    )


def _same(expected: str, found: str | None) -> bool:
    """Whether two values are equal, where Kafka may write a number in its own way (`0.10` for `0.1`)."""
    if found is None:
        return False
    with contextlib.suppress(ValueError):
        return float(expected) == float(found)
    return expected == found


@contextlib.contextmanager
def _admin(kafka: KafkaSettings) -> Iterator[KafkaAdminClient]:
    from aiokafka.errors import KafkaError as AsyncKafkaError
    from kafka.admin import KafkaAdminClient
    from kafka.errors import KafkaError

    options = kafka_python_options(kafka)
    try:
        _await_listener(options["bootstrap_servers"], kafka.connect_timeout_ms / 1_000)
        admin = KafkaAdminClient(**options, bootstrap_timeout_ms=kafka.connect_timeout_ms)
    except (KafkaError, OSError) as error:
        raise unreachable(kafka, ANSWER, error) from error
    try:
        yield admin
    except (KafkaError, AsyncKafkaError) as error:
        raise unreachable(kafka, ANSWER, error) from error
    finally:
        admin.close()


def _await_listener(servers: Sequence[str], within_s: float) -> None:
    """Wait until one of the servers accepts a connection: kafka-python's client leaks a socket for each refused one."""
    deadline = time.monotonic() + within_s
    while True:
        for server in servers:
            host, _, port = server.rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=within_s).close()
            except OSError as error:
                refusal = error
            else:
                return
        if time.monotonic() > deadline:
            raise refusal
        time.sleep(POLL_S)


def _describe(kafka: KafkaSettings, admin: KafkaAdminClient, contracts: Sequence[TopicContract]) -> dict[str, Found]:
    topics = [topic for topic in admin.describe_topics([c.name for c in contracts]) if topic["error_code"] == 0]
    if not topics:
        return {}
    configs = _configs(kafka, [topic["name"] for topic in topics])
    topics = [topic for topic in topics if topic["name"] in configs]  # others were deleted between the two requests
    return {
        topic["name"]: Found(
            partitions=len(topic["partitions"]),
            replicas=min(len(partition["replica_nodes"]) for partition in topic["partitions"]),
            configs=configs[topic["name"]],
        )
        for topic in topics
    }


def _configs(kafka: KafkaSettings, names: Sequence[str]) -> dict[str, dict[str, str]]:
    found = asyncio.run(topic_configs(kafka, names))
    for name, configs in found.items():
        if not configs:
            raise TopicError(
                f"topic {name}: expected its configuration, found none that may be read. Ask for the right to describe the "
                "topic's configuration (DescribeConfigs)."
            )
    return found


def _create(kafka: KafkaSettings, admin: KafkaAdminClient, missing: Sequence[TopicContract]) -> None:
    from kafka.errors import for_code

    wanted = {
        contract.name: {
            "num_partitions": contract.partitions,
            "replication_factor": contract.replication_factor,
            "configs": contract.configs,
        }
        for contract in missing
    }
    answer = admin.create_topics(wanted, timeout_ms=kafka.request_timeout_ms, raise_errors=False)
    for topic in answer["topics"]:
        if topic["error_code"] not in (0, ALREADY_EXISTS):
            contract = next(contract for contract in missing if contract.name == topic["name"])
            raise TopicError(
                f"topic {contract.name}: expected to make it with {contract.partitions} partition(s) and "
                f"{contract.replication_factor} replica(s), found {for_code(topic['error_code']).__name__}: "
                f"{topic.get('error_message') or 'the cluster gives no reason'}. Correct the setting it names under "
                "HEADRACE_TOPICS__ (replication_factor can be no larger than the number of brokers), or ask for the right "
                "to create topics."
            )
    admin.wait_for_topics(list(wanted), timeout_ms=VISIBLE_TIMEOUT_MS)


def _set_configs(
    kafka: KafkaSettings, admin: KafkaAdminClient, contracts: Sequence[TopicContract], found: Mapping[str, Found]
) -> list[str]:
    """Set the configurations that differ from the contract. Returns the topics that were changed.

    This uses kafka-python, whose request changes only the configurations that it names. aiokafka's request would reset all
    others to their defaults.
    """
    from kafka.admin import ConfigResource, ConfigResourceType

    resources = []
    for contract in contracts:
        topic = found.get(contract.name)
        if topic is None:
            continue
        wrong = {key: value for key, value in contract.configs.items() if not _same(value, topic.configs.get(key))}
        if wrong:
            resources.append(ConfigResource(ConfigResourceType.TOPIC, contract.name, wrong))
    if not resources:
        return []
    for name, result in admin.alter_configs(resources)["topic"].items():
        if result != "OK":
            raise TopicError(
                f"topic {name}: expected to change its configuration, found {result}. Ask for the right to alter it, or "
                "change it with Kafka's kafka-configs.sh (`headrace topics check` lists what)."
            )
    names = [resource.name for resource in resources]
    _await_configs(kafka, [contract for contract in contracts if contract.name in names])
    return names


def _await_configs(kafka: KafkaSettings, contracts: Sequence[TopicContract]) -> None:
    """Wait until the brokers show what the controller has accepted: the controller answers before the brokers know."""
    deadline = time.monotonic() + VISIBLE_TIMEOUT_MS / 1_000
    while time.monotonic() < deadline:
        shown = _configs(kafka, [contract.name for contract in contracts])
        if all(_same(value, shown[c.name].get(key)) for c in contracts for key, value in c.configs.items()):
            return
        time.sleep(POLL_S)
