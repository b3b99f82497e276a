"""The broker processes of a local Kafka: their files, their start, their logs, and their exit statuses."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from deploy.errors import LocalKafkaError
from deploy.local_kafka.files import DATA, LOGGING, SERVER, Node, logging_properties, server_properties
from deploy.local_kafka.java import java_version
from deploy.processes.background import Process, mark

__all__ = ["STOP_TIMEOUT_MS", "Brokers", "brokers_seen", "last_lines", "node_folder", "reap"]

STOP_TIMEOUT_MS = 15_000  # a broker closes its logs in under a second here; a loaded machine may need many times that
LAST_LINES = 15
LINE_WIDTH = 400  # some of Kafka's lines hold its whole configuration

# pid → each broker that this process started and that has not ended. Any process may stop a broker, but this one is its parent
# and must take its exit status.
_children: dict[int, subprocess.Popen[bytes]] = {}


class Brokers:
    """The brokers of one folder.

    Args:
        folder: of the cluster, as an absolute path.
        heap_mb: largest heap of each broker, in MiB.
        java, classpath: the java binary and the jars that run them.
    """

    def __init__(self, folder: Path, heap_mb: int, java: Path, classpath: list[Path]) -> None:
        self._dir = folder
        self._heap_mb = heap_mb
        self._java = java
        self._classpath = classpath

    def write_files(self, nodes: Sequence[Node]) -> None:
        """Make the folders of all nodes, with their properties."""
        (self._dir / "logs").mkdir(exist_ok=True)
        for node in nodes:
            folder = node_folder(self._dir, node)
            folder.mkdir(exist_ok=True)
            (folder / SERVER).write_text(server_properties(node, nodes))
            (folder / LOGGING).write_text(logging_properties(node))

    def format(self, cluster_id: str, node: Node) -> None:
        """Prepare a node's data folder, once. Raises LocalKafkaError with Kafka's own words."""
        data = node_folder(self._dir, node) / DATA
        if (data / "meta.properties").exists():
            return
        command = [*self._command(heap_mb=128), "kafka.tools.StorageTool", "format"]
        answer = subprocess.run(
            [*command, "--cluster-id", cluster_id, "--config", SERVER],
            cwd=node_folder(self._dir, node),
            env=_environment(),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if answer.returncode != 0:
            raise LocalKafkaError(
                f"{data}: expected to prepare it for broker {node.id}, found:\n"
                f"{_tail(answer.stdout + answer.stderr)}\n"
                "Correct what it names, or start with empty data: `headrace kafka reset`."
            )
        if not (data / "meta.properties").exists():
            raise LocalKafkaError(
                f"{data}: expected what Kafka had just written there, found nothing: this Java ({self._java}) reads the path "
                "differently. Choose a folder with an ASCII name by `--dir`."
            )

    def spawn(self, node: Node) -> Process | None:
        """Start one broker in the background; None when it ended at once."""
        # The folder is an argument for people who look for a broker among the processes.
        command = [*self._command(heap_mb=self._heap_mb), f"-Dheadrace.dir={self._dir}", "kafka.Kafka"]
        with (self._dir / "logs" / f"node-{node.id}.out").open("w") as out:
            # In a session of its own, so that Ctrl-C on the terminal reaches the programs that use the broker, not the broker.
            child = subprocess.Popen(
                [*command, SERVER],
                cwd=node_folder(self._dir, node),
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _children[child.pid] = child
        return mark(child.pid)

    def _command(self, *, heap_mb: int) -> list[str]:
        # Measured on two cores beside everything else: a scorer's p99 was 35 ms with the serial collector, and 50 ms with G1,
        # whose threads want the cores all the time, and which takes 40 MB more. The compiler C2 stays on, though a
        # start without it is 0.4 s shorter.
        options = [f"-Xmx{heap_mb}m", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError", "-Djava.awt.headless=true"]
        options.append(f"-Dlog4j2.configurationFile={LOGGING}")
        if (java_version(self._java) or 0) >= 24:
            options.append("--enable-native-access=ALL-UNNAMED")  # else zstd, lz4 and snappy print a warning each
        return [str(self._java), *options, "-cp", ":".join(str(jar) for jar in self._classpath)]


def node_folder(folder: Path, node: Node) -> Path:
    """Where a node's files lie below the cluster's folder."""
    return folder / f"node-{node.id}"


def last_lines(folder: Path, node: Node) -> str:
    """The end of a broker's log and of what its process printed."""
    text = ""
    for file in (folder / "logs" / f"node-{node.id}.log", folder / "logs" / f"node-{node.id}.out"):
        with contextlib.suppress(FileNotFoundError):
            text += file.read_text(errors="replace")
    return _tail(text)


def reap(ended: Sequence[Process] = ()) -> None:
    """Take the exit status of brokers that this process started, so that none stays behind as a zombie.

    Processes in `ended` are waited for: the system may show a process as gone a moment before its status can be taken.
    """
    for process in ended:
        if process.pid in _children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _children[process.pid].wait(timeout=STOP_TIMEOUT_MS / 1_000)
    for pid, child in list(_children.items()):
        if child.poll() is not None:
            del _children[pid]


def brokers_seen(bootstrap_servers: str) -> int:
    """How many brokers an admin client's metadata holds; 0 when nobody answers."""
    from kafka import KafkaAdminClient
    from kafka.errors import KafkaError

    try:
        admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers.split(","), bootstrap_timeout_ms=2_000)
    except KafkaError:
        return 0
    try:
        return len(admin.describe_cluster()["brokers"])
    except KafkaError:
        return 0
    finally:
        admin.close()


def _environment() -> dict[str, str]:
    """This process's environment in a UTF-8 locale: in the plain C locale Java reads an é in a path as `?`."""
    return {**os.environ, "LC_ALL": "C.UTF-8"}


def _tail(text: str) -> str:
    """The last lines, without the frames of Java's stack traces, which would push out what happened."""
    lines = [line for line in text.splitlines() if not line.startswith("\tat ")]
    return "\n".join(f"  {line[:LINE_WIDTH]}" for line in lines[-LAST_LINES:])
