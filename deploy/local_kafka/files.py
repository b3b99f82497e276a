"""The files that a local Kafka is started from: each broker's properties and its logging."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

__all__ = ["DATA", "LOGGING", "SERVER", "Node", "logging_properties", "server_properties"]

# Names in the folder of a node.
DATA, LOGGING, SERVER = "data", "log4j2.properties", "server.properties"

# The internal topics hold little here; with Kafka's defaults (50 partitions each) they cost seconds at the first group.
INTERNAL_PARTITIONS = 8
# 1 MiB and 64 KiB: topics set their own limit (`stream/topics/contract.py`), this one holds for the rest.
MESSAGE_MAX_BYTES = 1_048_588 + 65_536


class Node(msgspec.Struct, frozen=True):
    """One broker, which is a controller too."""

    id: int
    port: int
    controller_port: int


def server_properties(node: Node, nodes: Sequence[Node]) -> str:
    """The properties of one node among `nodes`, which runs in its own folder.

    Its data lies in `data` there. The properties hold no path from outside the folder, which could have any name: `log.dirs`
    is split at commas, and a file of properties has its own rules for backslashes and for whatever isn't Latin-1.
    """
    replicas = min(3, len(nodes))
    in_sync = min(2, replicas)
    voters = ",".join(f"{other.id}@127.0.0.1:{other.controller_port}" for other in nodes)
    properties = {
        "process.roles": "broker,controller",
        "node.id": node.id,
        "controller.quorum.voters": voters,
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "listeners": f"PLAINTEXT://127.0.0.1:{node.port},CONTROLLER://127.0.0.1:{node.controller_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{node.port}",
        "log.dirs": DATA,
        # A mistyped name must be an error, not a new topic.
        "auto.create.topics.enable": "false",
        "default.replication.factor": replicas,
        "min.insync.replicas": in_sync,
        "message.max.bytes": MESSAGE_MAX_BYTES,
        "group.initial.rebalance.delay.ms": 0,
        # Tests of failures can't wait for the default of 6 s.
        "group.min.session.timeout.ms": 1_000,
        # By default Kafka looks every 10 s for transactions that have timed out, such as that of a killed worker.
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": 1_000,
        # A killed broker is declared dead, and may come back, after 6 s instead of 9.
        "broker.heartbeat.interval.ms": 1_000,
        "broker.session.timeout.ms": 6_000,
        # Kafka takes 128 MiB for this by default; 16 MiB compact half a million keys at a time.
        "log.cleaner.dedupe.buffer.size": 16 * 1024 * 1024,
        "num.network.threads": 2,
        "num.io.threads": 4,
        "background.threads": 2,
    }
    for topic in ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic"):
        properties[f"{topic}.num.partitions"] = INTERNAL_PARTITIONS
        properties[f"{topic}.replication.factor"] = replicas
        if topic != "offsets.topic":
            properties[f"{topic}.min.isr"] = in_sync
    return "".join(f"{key}={value}\n" for key, value in properties.items())


def logging_properties(node: Node) -> str:
    """log4j2's properties of a node that runs in its own folder: one file, rolled at 16 MiB, four kept."""
    log = f"../logs/node-{node.id}.log"
    return f"""\
status = error
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = {log}
appender.file.filePattern = {log}.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d{{ISO8601}} %-5p %m (%c{{1}})%n
appender.file.policies.type = Policies
appender.file.policies.size.type = SizeBasedTriggeringPolicy
appender.file.policies.size.size = 16MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 4
rootLogger.level = info
rootLogger.appenderRef.file.ref = file
"""
