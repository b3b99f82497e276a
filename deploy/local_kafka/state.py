"""The state of a local Kafka, kept in its folder as `state.json`: the cluster's id, its nodes and ports, and its processes."""

from __future__ import annotations

import base64
import uuid
from pathlib import Path

import msgspec

from deploy.errors import LocalKafkaError
from deploy.local_kafka.files import Node
from deploy.local_kafka.jars import kafka_version
from deploy.local_kafka.ports import free_ports, is_free
from deploy.processes.background import Process

__all__ = ["STATE", "ClusterState", "plan", "read_state", "write_state"]

STATE = "state.json"


class ClusterState(msgspec.Struct):
    """A cluster of one broker or three: what `state.json` holds."""

    version: str
    cluster_id: str
    nodes: list[Node]
    processes: dict[int, Process] = {}
    """Node → the process that was started for it last."""

    def alive(self) -> dict[int, Process]:
        """Node → process, of the brokers that run."""
        return {node: process for node, process in self.processes.items() if process.alive}

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` of every broker, separated by commas."""
        return ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)


def read_state(folder: Path) -> ClusterState | None:
    """The cluster of this folder; None when there is none yet.

    Raises:
        LocalKafkaError: `state.json` can't be decoded.
    """
    file = folder / STATE
    try:
        return msgspec.json.decode(file.read_bytes(), type=ClusterState)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise LocalKafkaError(
            f"{file}: expected what `headrace kafka start` wrote, found: {error}. Remove the folder "
            f"{folder} after making sure that no broker runs from it (`pgrep -f kafka.Kafka`)."
        ) from error


def write_state(folder: Path, state: ClusterState) -> None:
    """Replace `state.json` as a whole: a reader finds the old text or the new."""
    aside = (folder / STATE).with_suffix(".new")
    aside.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
    aside.replace(folder / STATE)


def plan(state: ClusterState | None, brokers: int) -> ClusterState:
    """The cluster to start: a new one where `state` is None, else the same one.

    A cluster whose brokers are all stopped gets new ports in place of those that other programs have taken meanwhile.
    """
    if state is None:
        ports = free_ports(2 * brokers)
        nodes = [
            Node(index + 1, port, controller)
            for index, (port, controller) in enumerate(zip(ports[::2], ports[1::2], strict=True))
        ]
        return ClusterState(kafka_version(), _cluster_id(), nodes)
    if not state.alive():
        used = {port for node in state.nodes for port in (node.port, node.controller_port)}
        taken = [port for port in used if not is_free(port)]
        instead = dict(zip(taken, free_ports(len(taken), without=used), strict=True))
        state.nodes = [
            Node(node.id, instead.get(node.port, node.port), instead.get(node.controller_port, node.controller_port))
            for node in state.nodes
        ]
        state.version = kafka_version()
    return state


def _cluster_id() -> str:
    """A random id as Kafka writes them: 16 bytes in URL-safe base64, not beginning like an option."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not text.startswith("-"):
            return text
