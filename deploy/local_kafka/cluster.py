"""Apache Kafka itself on this machine, in KRaft mode, one broker or three.

```python
with LocalKafka(settings.local_kafka) as kafka:
    print(kafka.bootstrap_servers)      # 127.0.0.1:23817
```

Everything is in `settings.dir`: `state.json` (cluster, ports, processes), `node-N/` (data), `logs/`. Any process that knows
the folder can look at the brokers, stop them and start them again. Ports are chosen once and kept. A broker runs in its own
folder and has only relative paths, so that the folder may have any name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from deploy.errors import LocalKafkaError
from deploy.local_kafka.brokers import STOP_TIMEOUT_MS, Brokers, brokers_seen, last_lines, node_folder, reap
from deploy.local_kafka.jars import in_utf8, jars, kafka_version
from deploy.local_kafka.java import find_java
from deploy.local_kafka.ports import answers
from deploy.local_kafka.state import STATE, ClusterState, plan, read_state, write_state
from deploy.processes.background import stop_all
from deploy.settings import LocalKafkaSettings

__all__ = ["KafkaStatus", "LocalKafka"]

POLL_S = 0.05
# A path has at most 4,095 bytes on Linux: below the folder come `/node-1/data/`, a topic's name (249), and its files' names.
LONGEST_DIR = 3_700


class KafkaStatus(msgspec.Struct, frozen=True):
    """What is known of a local Kafka: `running` (all brokers), `degraded` (some), `stopped`, or `absent` (no data)."""

    state: str
    bootstrap_servers: str
    dir: str
    version: str
    brokers: int
    pids: dict[int, int]


class LocalKafka:
    """A local Kafka under `settings.dir`.

    Used as a context manager, its brokers end with this process, however the process ends, kill -9 included: a small helper
    process waits for that. Without the context manager, `start` leaves the brokers running in the background.

    Args:
        settings: where, how much memory, which Java.
        brokers: 1, or 3 for a cluster that survives the loss of one.
        on_progress: called with what is being done, how much of it is done, and how much there is (0 and 0 where unknown).
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
        state = read_state(self.dir)
        return "" if state is None else state.bootstrap_servers

    @property
    def pids(self) -> dict[int, int]:
        """Node → pid of the brokers that run: for tests that kill, pause and resume one. `start` starts dead ones again."""
        reap()
        state = read_state(self.dir)
        return {} if state is None else {node: process.pid for node, process in state.alive().items()}

    def start(self) -> str:
        """Start the brokers that don't run, and wait until all answer.

        Returns:
            The bootstrap servers.

        Raises:
            LocalKafkaError: there is no Java or no jar, the folder can't be written or holds another number of brokers, or a
                broker died or did not answer in time (the error has the last lines of its log).
        """
        with self._own_errors(), self._locked():
            reap()
            state = read_state(self.dir)
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
            state = plan(state, self.brokers)
            write_state(self.dir, state)
            brokers = Brokers(self.dir, self.settings.heap_mb, java, classpath)
            brokers.write_files(state.nodes)
            self._on_progress("starting Apache Kafka", 0, 0)
            before = state.alive()
            try:
                for node in state.nodes:
                    if node.id not in before:
                        brokers.format(state.cluster_id, node)
                for node in state.nodes:
                    if node.id not in before:
                        process = brokers.spawn(node)
                        if process is not None:
                            state.processes[node.id] = process
                        write_state(self.dir, state)
                self._await(state)
            except BaseException:
                started = [process for node, process in state.alive().items() if node not in before]
                stop_all(started, timeout_ms=STOP_TIMEOUT_MS)
                reap(ended=started)
                raise
            return state.bootstrap_servers

    def stop(self) -> list[int]:
        """Stop every broker that runs; data and ports stay.

        Returns:
            The pids of brokers that did not stop when asked, and were killed.
        """
        with self._own_errors():
            if not self.dir.exists():
                return []
            with self._locked():
                state = read_state(self.dir)
                running = [] if state is None else list(state.alive().values())
                try:
                    killed = stop_all(running, timeout_ms=STOP_TIMEOUT_MS)
                except PermissionError as error:
                    pids = ", ".join(str(process.pid) for process in running)
                    raise LocalKafkaError(
                        f"{self.dir}: expected brokers of this user, found another user's (pid {pids}). Stop them as that user."
                    ) from error
                reap(ended=running)
                return killed

    def status(self) -> KafkaStatus:
        """What runs now. Never writes."""
        reap()
        with self._own_errors():
            state = read_state(self.dir)
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
                state = read_state(self.dir)
                for node in [] if state is None else state.nodes:
                    if node_folder(self.dir, node).exists():
                        shutil.rmtree(node_folder(self.dir, node))
                    for log in self._logs.glob(f"node-{node.id}.*"):
                        log.unlink()
                with contextlib.suppress(OSError):  # there is no such folder, or it holds logs that aren't ours
                    self._logs.rmdir()
                (self.dir / STATE).unlink(missing_ok=True)

    def log(self, node: int) -> Path:
        """The log file of a broker."""
        return self._logs / f"node-{node}.log"

    @property
    def _logs(self) -> Path:
        return self.dir / "logs"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock: one process at a time starts, stops or resets."""
        self.dir.mkdir(parents=True, exist_ok=True)
        with (self.dir / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Turn an error of the operating system into a LocalKafkaError."""
        try:
            yield
        except OSError as error:
            what = f"{error.strerror} at {error.filename}" if error.filename else str(error)
            raise LocalKafkaError(
                f"{self.dir}: expected a folder where a local Kafka can keep its data, found: {what}. Choose another with "
                "`--dir` or HEADRACE_LOCAL_KAFKA__DIR, or change its owner or its mode."
            ) from error

    def _await(self, state: ClusterState) -> None:
        """Wait until an admin client sees every broker."""
        deadline = time.monotonic() + self.settings.start_timeout_ms / 1_000
        while not all(answers(node.port) for node in state.nodes):
            self._look(state, deadline)
        while brokers_seen(state.bootstrap_servers) < len(state.nodes):
            self._look(state, deadline)

    def _look(self, state: ClusterState, deadline: float) -> None:
        reap()
        for node in state.nodes:
            process = state.processes.get(node.id)
            if process is None or not process.alive:
                raise LocalKafkaError(
                    f"broker {node.id} in {self.dir}: expected it to start, found that it ended. The last lines of its log "
                    f"({self.log(node.id)}):\n{last_lines(self.dir, node)}\nCorrect what they name and start again; "
                    "`headrace kafka reset` begins with empty data, and HEADRACE_KAFKA__BOOTSTRAP_SERVERS uses another "
                    "cluster."
                )
        if time.monotonic() > deadline:
            node = state.nodes[0]
            raise LocalKafkaError(
                f"local Kafka in {self.dir}: expected {len(state.nodes)} broker(s) to answer within "
                f"{self.settings.start_timeout_ms} ms, found that they did not. Give it longer with "
                "HEADRACE_LOCAL_KAFKA__START_TIMEOUT_MS. The last lines of the log "
                f"({self.log(node.id)}):\n{last_lines(self.dir, node)}"
            )
        time.sleep(POLL_S)

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
