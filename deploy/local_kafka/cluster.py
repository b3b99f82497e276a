"""Apache Kafka itself on this machine, in KRaft mode, one broker or three.

```python
with LocalKafka(settings.local_kafka) as kafka:
    print(kafka.bootstrap_servers)      # 127.0.0.1:23817
```

Everything lives under `settings.dir`: `state.json` (cluster, ports, processes), `node-N/` (data), `logs/`. Any process that
knows the folder can ask, stop or start again; ports are chosen once and kept. A broker runs in its own folder and has only
relative paths, so that the folder may have any name.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from deploy.errors import LocalKafkaError
from deploy.local_kafka.files import DATA, LOGGING, SERVER, Node, logging_properties, server_properties
from deploy.local_kafka.jars import in_utf8, jars, kafka_version
from deploy.local_kafka.java import find_java, java_version
from deploy.processes.background import Process, mark, stop_all
from deploy.settings import LocalKafkaSettings

__all__ = ["KafkaStatus", "LocalKafka"]

# Below the ranges from which systems take the ports of outgoing connections, so that none of those is in the way.
PORTS = range(20_000, 32_000)
STOP_TIMEOUT_MS = 15_000  # a broker closes its logs in under a second here; a loaded machine may need many times that
POLL_S = 0.05
LAST_LINES = 15
LINE_WIDTH = 400  # some of Kafka's lines hold its whole configuration
# A path has at most 4,095 bytes on Linux: below the folder come `/node-1/data/`, a topic's name (249), and its files' names.
LONGEST_DIR = 3_700

# pid → every broker that this process started and that has not ended: whichever object stops one, it must be waited for here.
_children: dict[int, subprocess.Popen[bytes]] = {}


class KafkaStatus(msgspec.Struct, frozen=True):
    """What is known of a local Kafka: `running` (all brokers), `degraded` (some), `stopped`, or `absent` (no data)."""

    state: str
    bootstrap_servers: str
    dir: str
    version: str
    brokers: int
    pids: dict[int, int]


class _State(msgspec.Struct):
    version: str
    cluster_id: str
    nodes: list[Node]
    processes: dict[int, Process] = {}

    def alive(self) -> dict[int, Process]:
        return {node: process for node, process in self.processes.items() if process.alive}

    @property
    def bootstrap_servers(self) -> str:
        return ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)


class LocalKafka:
    """A local Kafka under `settings.dir`.

    As a context manager it is tied to this process: however the process ends, kill -9 included, the brokers end with it,
    by a small helper process that waits for that. Without, `start` leaves them running in the background.

    Args:
        settings: where, how much memory, which Java.
        brokers: 1, or 3 for a cluster that survives the loss of one.
        on_progress: called with what is being done, and how much of how much (0 of 0 where that isn't known).
    """

    def __init__(
        self,
        settings: LocalKafkaSettings,
        brokers: int = 1,
        *,
        on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        if brokers not in (1, 3):
            raise LocalKafkaError(
                f"brokers: expected 1 or 3 (two can't outvote one another), found {brokers}. Choose one of them."
            )
        self.settings = settings
        self.brokers = brokers
        self.dir = _folder(settings.dir)
        self._on_progress = on_progress
        self._leash: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._leash = subprocess.Popen(
            [sys.executable, "-m", "deploy.local_kafka.leash", str(self.dir)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` of every broker, separated by commas; empty before the first start."""
        state = self._read()
        return "" if state is None else state.bootstrap_servers

    @property
    def pids(self) -> dict[int, int]:
        """Node → pid of the brokers that run: for tests that kill, pause and resume one. `start` brings back the dead."""
        self._reap()
        state = self._read()
        return {} if state is None else {node: process.pid for node, process in state.alive().items()}

    def start(self) -> str:
        """Start the brokers that don't run, and wait until all answer.

        Returns:
            The bootstrap servers.

        Raises:
            LocalKafkaError: no Java, no jars, a folder that can't be written, other brokers than asked for in it, or a broker
                that died or did not answer in time (with the last lines of its log).
        """
        with self._own_errors(), self._locked():
            self._reap()
            state = self._read()
            if state is not None and len(state.nodes) != self.brokers:
                raise LocalKafkaError(
                    f"{self.dir}: expected {self.brokers} broker(s), found the data of {len(state.nodes)}. Start with "
                    f"`--brokers {len(state.nodes)}`, choose another `--dir`, or throw the data away with "
                    "`headrace kafka reset`."
                )
            java = find_java(self.settings.java)
            classpath = jars(
                self.settings, on_progress=lambda done, total: self._on_progress("Apache Kafka's jars", done, total)
            )
            state = self._planned(state)
            self._on_progress("starting Apache Kafka", 0, 0)
            before = state.alive()
            try:
                for node in state.nodes:
                    if node.id not in before:
                        self._format(state, node, java, classpath)
                for node in state.nodes:
                    if node.id not in before:
                        self._spawn(state, node, java, classpath)
                self._await(state)
            except BaseException:
                started = [process for node, process in state.alive().items() if node not in before]
                stop_all(started, timeout_ms=STOP_TIMEOUT_MS)
                self._reap(ended=started)
                raise
            return state.bootstrap_servers

    def stop(self) -> list[int]:
        """Stop every broker that runs; data and ports stay.

        Returns:
            The pids that had to be killed, since they did not stop when asked.
        """
        with self._own_errors():
            if not self.dir.exists():
                return []
            with self._locked():
                state = self._read()
                running = [] if state is None else list(state.alive().values())
                try:
                    killed = stop_all(running, timeout_ms=STOP_TIMEOUT_MS)
                except PermissionError as error:
                    pids = ", ".join(str(process.pid) for process in running)
                    raise LocalKafkaError(
                        f"{self.dir}: expected brokers of this user, found another user's (pid {pids}). Stop them as that user."
                    ) from error
                self._reap(ended=running)
                return killed

    def status(self) -> KafkaStatus:
        """What is there now; never writes."""
        self._reap()
        with self._own_errors():
            state = self._read()
        if state is None:
            return KafkaStatus("absent", "", str(self.dir), kafka_version(), 0, {})
        alive = state.alive()
        word = "stopped" if not alive else "running" if len(alive) == len(state.nodes) else "degraded"
        pids = {node: process.pid for node, process in alive.items()}
        return KafkaStatus(word, state.bootstrap_servers, str(self.dir), state.version, len(state.nodes), pids)

    def reset(self) -> None:
        """Stop, and remove the data, the logs and the ports: the next start makes a new cluster. Other files stay."""
        self.stop()
        with self._own_errors():
            if not self.dir.exists():
                return
            with self._locked():
                state = self._read()
                for node in [] if state is None else state.nodes:
                    if self._node(node).exists():
                        shutil.rmtree(self._node(node))
                    for log in self._logs.glob(f"node-{node.id}.*"):
                        log.unlink()
                with contextlib.suppress(OSError):  # none, or somebody keeps other logs there
                    self._logs.rmdir()
                self._state_file.unlink(missing_ok=True)

    def log(self, node: int) -> Path:
        """The log file of a broker."""
        return self._logs / f"node-{node}.log"

    @property
    def _logs(self) -> Path:
        return self.dir / "logs"

    @property
    def _state_file(self) -> Path:
        return self.dir / "state.json"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time starts, stops or resets."""
        self.dir.mkdir(parents=True, exist_ok=True)
        with (self.dir / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        """What the system refuses, as an error of ours."""
        try:
            yield
        except OSError as error:
            what = f"{error.strerror} at {error.filename}" if error.filename else str(error)
            raise LocalKafkaError(
                f"{self.dir}: expected a folder where a local Kafka can keep its data, found: {what}. Choose another with "
                "`--dir` or HEADRACE_LOCAL_KAFKA__DIR, or change its owner or its mode."
            ) from error

    def _read(self) -> _State | None:
        try:
            return msgspec.json.decode(self._state_file.read_bytes(), type=_State)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise LocalKafkaError(
                f"{self._state_file}: expected what `headrace kafka start` wrote, found: {error}. Remove the folder "
                f"{self.dir} after making sure that no broker runs from it (`pgrep -f kafka.Kafka`)."
            ) from error

    def _write(self, state: _State) -> None:
        aside = self._state_file.with_suffix(".new")
        aside.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
        aside.replace(self._state_file)

    def _planned(self, state: _State | None) -> _State:
        """The cluster to run: the one there was, with new ports where somebody took the old ones; or a new one."""
        if state is None:
            ports = _free_ports(2 * self.brokers)
            nodes = [
                Node(index + 1, port, controller)
                for index, (port, controller) in enumerate(zip(ports[::2], ports[1::2], strict=True))
            ]
            state = _State(kafka_version(), _cluster_id(), nodes)
        elif not state.alive():
            used = {port for node in state.nodes for port in (node.port, node.controller_port)}
            taken = [port for port in used if not _free(port)]
            instead = dict(zip(taken, _free_ports(len(taken), without=used), strict=True))
            state.nodes = [
                Node(node.id, instead.get(node.port, node.port), instead.get(node.controller_port, node.controller_port))
                for node in state.nodes
            ]
            state.version = kafka_version()
        self._write(state)
        self._logs.mkdir(exist_ok=True)
        for node in state.nodes:
            self._node(node).mkdir(exist_ok=True)
            (self._node(node) / SERVER).write_text(server_properties(node, state.nodes))
            (self._node(node) / LOGGING).write_text(logging_properties(node))
        return state

    def _node(self, node: Node) -> Path:
        return self.dir / f"node-{node.id}"

    def _format(self, state: _State, node: Node, java: Path, classpath: list[Path]) -> None:
        data = self._node(node) / DATA
        if (data / "meta.properties").exists():
            return
        command = [*self._java(java, classpath, heap_mb=128), "kafka.tools.StorageTool", "format"]
        answer = subprocess.run(
            [*command, "--cluster-id", state.cluster_id, "--config", SERVER],
            cwd=self._node(node),
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
                "Mend what it names, or begin anew with `headrace kafka reset`."
            )
        if not (data / "meta.properties").exists():
            raise LocalKafkaError(
                f"{data}: expected what Kafka had just written there, found nothing: this Java ({java}) reads the path "
                "otherwise. Choose a folder with an ASCII name by `--dir`."
            )

    def _spawn(self, state: _State, node: Node, java: Path, classpath: list[Path]) -> None:
        # The folder is there for people who look for a broker among the processes.
        command = [*self._java(java, classpath, heap_mb=self.settings.heap_mb), f"-Dheadrace.dir={self.dir}", "kafka.Kafka"]
        with (self._logs / f"node-{node.id}.out").open("w") as out:
            # In a session of its own: Ctrl-C on the terminal reaches the brokers' users first, and they can still finish.
            child = subprocess.Popen(
                [*command, SERVER],
                cwd=self._node(node),
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _children[child.pid] = child
        process = mark(child.pid)
        if process is not None:
            state.processes[node.id] = process
        self._write(state)

    def _java(self, java: Path, classpath: list[Path], *, heap_mb: int) -> list[str]:
        # Measured on two cores, everything else running: with the serial collector a scorer's p99 was 35 ms, with G1, whose
        # threads want the cores all the time, 50 ms. It takes 40 MB more. C2 stays: without, a broker starts 0.4 s sooner.
        options = [f"-Xmx{heap_mb}m", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError", "-Djava.awt.headless=true"]
        options.append(f"-Dlog4j2.configurationFile={LOGGING}")
        if (java_version(java) or 0) >= 24:
            options.append("--enable-native-access=ALL-UNNAMED")  # zstd, lz4 and snappy; without, a warning each
        return [str(java), *options, "-cp", ":".join(str(jar) for jar in classpath)]

    def _await(self, state: _State) -> None:
        """Wait until an admin client sees every broker."""
        deadline = time.monotonic() + self.settings.start_timeout_ms / 1_000
        while not all(_answers(node.port) for node in state.nodes):
            self._look(state, deadline)
        while _brokers_seen(state.bootstrap_servers) < len(state.nodes):
            self._look(state, deadline)

    def _look(self, state: _State, deadline: float) -> None:
        self._reap()
        for node in state.nodes:
            process = state.processes.get(node.id)
            if process is None or not process.alive:
                raise LocalKafkaError(
                    f"broker {node.id} in {self.dir}: expected it to start, found that it ended. The last lines of its log "
                    f"({self.log(node.id)}):\n{self._last_lines(node)}\nMend what they name and start again; "
                    "`headrace kafka reset` begins with empty data, and HEADRACE_KAFKA__BOOTSTRAP_SERVERS uses another "
                    "cluster."
                )
        if time.monotonic() > deadline:
            node = state.nodes[0]
            raise LocalKafkaError(
                f"local Kafka in {self.dir}: expected {len(state.nodes)} broker(s) to answer within "
                f"{self.settings.start_timeout_ms} ms, found that they did not. Give it longer with "
                "HEADRACE_LOCAL_KAFKA__START_TIMEOUT_MS. The last lines of the log "
                f"({self.log(node.id)}):\n{self._last_lines(node)}"
            )
        time.sleep(POLL_S)

    def _last_lines(self, node: Node) -> str:
        text = ""
        for file in (self.log(node.id), self._logs / f"node-{node.id}.out"):
            with contextlib.suppress(FileNotFoundError):
                text += file.read_text(errors="replace")
        return _tail(text)

    def _reap(self, ended: Sequence[Process] = ()) -> None:
        """Take the exit status of brokers that this process started, so that none stays behind as a zombie.

        Those in `ended` are waited for: the system may show a process as gone a moment before it can be waited for.
        """
        for process in ended:
            if process.pid in _children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _children[process.pid].wait(timeout=STOP_TIMEOUT_MS / 1_000)
        for pid, child in list(_children.items()):
            if child.poll() is not None:
                del _children[pid]

    def _end(self) -> None:
        try:
            self.stop()
        finally:
            if self._leash is not None:
                self._leash.kill()
                assert self._leash.stdin is not None
                self._leash.stdin.close()
                self._leash.wait()
                self._leash = None


def _folder(given: Path) -> Path:
    """The folder as an absolute path. Raises LocalKafkaError for one that Java or Kafka couldn't use."""
    try:
        folder = given.expanduser().absolute()
    except RuntimeError as error:
        raise LocalKafkaError(f"{given}: expected a folder, found: {error} Write the path without `~`.") from error
    if not in_utf8(folder):
        raise LocalKafkaError(
            f"{str(folder)!r}: expected a folder with a name in UTF-8, which Java can read, found other bytes. Choose another "
            "with `--dir` or HEADRACE_LOCAL_KAFKA__DIR."
        )
    if len(os.fsencode(folder)) > LONGEST_DIR:
        raise LocalKafkaError(
            f"{str(folder)[:60]}…: expected a path of at most {LONGEST_DIR} bytes, found {len(os.fsencode(folder))}. Choose "
            "another with `--dir` or HEADRACE_LOCAL_KAFKA__DIR."
        )
    return folder


def _environment() -> dict[str, str]:
    """Java decodes the paths of its working folder and its jars by the locale; in the plain C locale, é becomes `?`."""
    return {**os.environ, "LC_ALL": "C.UTF-8"}


def _cluster_id() -> str:
    """A random id as Kafka writes them: 16 bytes in URL-safe base64, not beginning like an option."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not text.startswith("-"):
            return text


def _free(port: int) -> bool:
    with socket.socket() as probe:
        # As Java does: a port that only waits for old connections to fade is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _free_ports(count: int, without: set[int] | frozenset[int] = frozenset()) -> list[int]:
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        if len(found) == count:
            break
        if port not in without and _free(port):
            found.append(port)
    return found


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _brokers_seen(bootstrap_servers: str) -> int:
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


def _tail(text: str) -> str:
    """The last lines, without the frames of Java's stack traces, which would push out what happened."""
    lines = [line for line in text.splitlines() if not line.startswith("\tat ")]
    return "\n".join(f"  {line[:LINE_WIDTH]}" for line in lines[-LAST_LINES:])
