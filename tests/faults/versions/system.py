"""A release's files, its workers, and a client that sends events and asks for scores all the time."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from kafka import KafkaConsumer, TopicPartition

from deploy.processes.workers import _free_port
from headrace import Client
from headrace.errors import HeadraceError
from tests.faults.code import ROOT

__all__ = ["Examples", "Traffic", "Worker", "environment", "examples_of", "files_of", "headrace", "wait_for"]

READY_S, STOP_S = 120.0, 60.0
WINDOW_MS, LATENESS_MS = 1_500, 300
IMPRESSIONS_S, ASKS_S = 40.0, 5.0


def files_of(revision: str, folder: Path) -> Path:
    """The files of a revision, unpacked; no revision: this checkout."""
    if not revision:
        return ROOT
    packed = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    target = folder / f"release-{revision[:12]}"
    with tarfile.open(fileobj=BytesIO(packed)) as files:
        files.extractall(target, filter="data")
    return target


def environment(servers: str, folder: Path) -> dict[str, str]:
    """Settings that both releases know."""
    fields = [{"name": "user"}, {"name": "item"}]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HEADRACE_", "PYTHON"))},
        "HEADRACE_KAFKA__BOOTSTRAP_SERVERS": servers,
        "HEADRACE_TOPICS__PREFIX": "v-",
        "HEADRACE_TOPICS__PARTITIONS": "1",
        "HEADRACE_TOPICS__REQUEST_PARTITIONS": "1",
        "HEADRACE_JOIN__WINDOW_MS": str(WINDOW_MS),
        "HEADRACE_JOIN__LATENESS_MS": str(LATENESS_MS),
        "HEADRACE_JOIN__HOLD_MS": str(WINDOW_MS),
        "HEADRACE_SNAPSHOTS__URL": str(folder / "snapshots"),
        "HEADRACE_SNAPSHOTS__INTERVAL_MS": "1500",
        "HEADRACE_STATE_DIR": str(folder / "state"),
        "HEADRACE_FEATURES__FIELDS": json.dumps(fields),
        "HEADRACE_FEATURES__EMBEDDING_DIM": "4",
        "HEADRACE_MODEL__HIDDEN": "[8]",
        "HEADRACE_TRAINER__DEVICE": "cpu",
        "HEADRACE_TRAINER__THREADS": "1",
        "HEADRACE_SCORER__DEVICE": "cpu",
    }


def _as_before(release: Path) -> dict[str, str]:
    """Settings of the model that the older release has, where a release has a choice."""
    has_choice = (release / "model" / "history.py").exists()
    return {"HEADRACE_MODEL__ROW_HISTORY": "false", "HEADRACE_MODEL__CROSS_LAYERS": "0"} if has_choice else {}


class Worker:
    """One worker of one release."""

    def __init__(self, kind: str, release: Path, env: dict[str, str], log: Path, *options: str) -> None:
        self.kind, self.log, self.port = kind, log, _free_port()
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "headrace", "run", kind, "--http-port", str(self.port), *options],
                cwd=release,
                # The path is before the checkout that this interpreter's environment names.
                env={**env, **_as_before(release), "PYTHONPATH": str(release)},
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                stdout=stderr,
            )

    def until_ready(self) -> str:
        """Wait until it is ready. Returns "" then, or how it ended and the end of its log."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return f"ended with {self.process.returncode}: {self.last_words()}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5) as answer:
                    if answer.status == 200:
                        return ""
            except OSError:
                pass
            time.sleep(0.2)
        return f"not ready within {READY_S:g} s: {self.last_words()}"

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def last_words(self) -> str:
        """The last errors or warnings of its log."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if entry.get("level", "").upper() in ("WARNING", "ERROR", "CRITICAL"):
                    found.append(str(entry.get("message", "")))
            except ValueError:
                found.append(line)
        return " | ".join(found[-2:])[:600]


@dataclass
class Traffic:
    """Sends impressions, clicks and requests until it is stopped.

    sent      ids of impressions, with the time and whether a click was sent
    answers   (monotonic time, version or None, deltas since, error or "") of each request
    """

    servers: str
    first_number: int = 0
    sent: dict[str, tuple[float, bool]] = field(default_factory=dict)
    answers: list[tuple[float, int | None, int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._send, self._ask)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ending.set()
        for thread in self._threads:
            if thread.ident is not None:  # it was started
                thread.join(30)

    def answered(self, since: float) -> Counter[str]:
        """How many answers since then had scores, and how many had not, by why."""
        return Counter(error or "scored" for at, _, _, error in self.answers if at >= since)

    def versions(self, since: float) -> list[tuple[int, int]]:
        """Version and deltas of the answers since then, each once, in order."""
        found = [
            (version, delta) for at, version, delta, error in self.answers if at >= since and not error and version is not None
        ]
        return list(dict.fromkeys(found))

    def _send(self) -> None:
        drawn, waiting = random.Random(1), list[tuple[float, str]]()
        with Client(self.servers, topic_prefix="v-") as client:
            number = self.first_number
            while not self._ending.wait(1 / IMPRESSIONS_S):
                name, clicked = f"i{number}", drawn.random() < 0.25
                client.send_impression(name, features={"user": f"u{number % 30}", "item": f"i{drawn.randrange(60)}"})
                self.sent[name] = (time.monotonic(), clicked)
                if clicked:
                    waiting.append((time.monotonic() + 0.2, name))
                while waiting and waiting[0][0] <= time.monotonic():
                    client.send_click(waiting.pop(0)[1])
                number += 1
            for _, name in waiting:
                client.send_click(name)
            client.flush()
            client.send_watermark(int(time.time() * 1_000) + 10 * WINDOW_MS)

    def _ask(self) -> None:
        with Client(self.servers, topic_prefix="v-") as client:
            while not self._ending.wait(1 / ASKS_S):
                try:
                    answer = client.ask({"user": "u1"}, [("a", {"item": "i1"}), ("b", {"item": "i2"})], timeout_ms=20_000)
                except HeadraceError as error:
                    self.answers.append((time.monotonic(), None, 0, type(error).__name__))
                    continue
                error = "" if answer.error is None else answer.error.reason
                self.answers.append((time.monotonic(), answer.model_version, answer.delta, error))


@dataclass
class Examples:
    """First labels in `examples`: how often each id has one, and which label."""

    first: Counter[str] = field(default_factory=Counter)
    labels: dict[str, str] = field(default_factory=dict)
    count: int = 0

    def problems(self, sent: dict[str, tuple[float, bool]]) -> dict[str, int]:
        """How many impressions have no label, several, or another one than their clicks give."""
        return {
            "lost": sum(not self.first[name] for name in sent),
            "doubled": sum(self.first[name] > 1 for name in sent),
            "wrong": sum(name in self.labels and (self.labels[name] == "1") != clicked for name, (_, clicked) in sent.items()),
        }


def examples_of(servers: str) -> Examples:
    """Everything in `examples`, as a `read_committed` reader sees it."""
    consumer = KafkaConsumer(bootstrap_servers=servers.split(","), isolation_level="read_committed", enable_auto_commit=False)
    found = Examples()
    try:
        partition = TopicPartition("v-examples", 0)
        consumer.assign([partition])
        consumer.seek_to_beginning(partition)
        end = consumer.end_offsets([partition])[partition]
        while consumer.position(partition) < end:
            for records in consumer.poll(timeout_ms=200).values():
                for record in records:
                    headers = {name: value.decode() for name, value in record.headers}
                    found.count += headers.get("kind") != "matched"  # the join's notes, which nobody learns
                    if headers.get("kind") == "first" and record.key:
                        found.first[record.key.decode()] += 1
                        found.labels[record.key.decode()] = headers["label"]
    finally:
        consumer.close(autocommit=False)
    return found


def headrace(release: Path, env: dict[str, str], *arguments: str) -> str:
    """Run a command of a release, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *arguments],
        cwd=release,
        env={**env, "PYTHONPATH": str(release)},
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"headrace {' '.join(arguments)}: exit code {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def wait_for(true: Callable[[], bool], within_s: float) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
