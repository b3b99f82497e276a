"""The peer of `bench/join.py` on Kafka Streams: builds `bench/kafka_streams/` with Maven, once, and runs it.

The build is kept beside the broker's jars in the cache, in a folder named by the versions and a hash of the sources. So it is
built again when one of them changes, and a second run needs neither Maven nor a network. For experiments, set `PEER_CONFIG` to
settings of Kafka Streams (`name=value`, separated by commas), and `PEER_JVM` to options that replace `JVM`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local_kafka.jars import cache_root, kafka_version, read_lock
from deploy.local_kafka.java import find_java
from deploy.settings import LocalKafkaSettings, Settings
from stream.topics.names import TopicNames

__all__ = ["KafkaStreamsPeer", "build", "pinned"]

SOURCES = Path(__file__).with_name("kafka_streams")
# Bounded as in a container: the heap has room for 64 MB of producer buffers and a few MB of records in each queue; RocksDB's
# memory is outside the heap. On one core the threads of G1 and of the parallel collector would only be overhead.
JVM = ("-Xms384m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:+AlwaysPreTouch")
START_S = 120.0


def build() -> list[Path]:
    """Build the peer if necessary; returns its jar and the jars that it needs.

    Raises:
        SystemExit: Maven isn't installed, or the build failed.
    """
    versions = {f"{jar.group}:{jar.artifact}": jar.version for jar in read_lock()}
    jackson = versions["com.fasterxml.jackson.core:jackson-core"]
    sources = sorted(file for file in SOURCES.rglob("*") if file.suffix in (".java", ".xml"))
    digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in sources)).hexdigest()[:12]
    work = cache_root(LocalKafkaSettings()).parent / "kafka-streams" / f"{kafka_version()}-{digest}"
    if not (work / "built").exists():
        maven = shutil.which("mvn")
        if maven is None:
            raise SystemExit("--peer kafka-streams: expected Maven, found no `mvn` on PATH. Install it.")
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(SOURCES, work, ignore=shutil.ignore_patterns("target"))
        command = [maven, "--batch-mode", "--quiet", f"-Dkafka.version={kafka_version()}", f"-Djackson.version={jackson}"]
        command += ["package", "dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={work}/target/lib"]
        answer = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise SystemExit(f"--peer kafka-streams: Maven failed in {work}:\n{(answer.stdout + answer.stderr)[-3000:]}")
        (work / "built").touch()
    return [next((work / "target").glob("*.jar")), *sorted((work / "target/lib").glob("*.jar"))]


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Processes that are started in this block run on one core, with all their threads."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


class KafkaStreamsPeer:
    """One process of the peer, on core 0.

    Args:
        application: its consumer group, and the prefix of its changelog topics.
    """

    def __init__(self, settings: Settings, application: str, work: Path) -> None:
        join, names = settings.join, TopicNames.of(settings.topics)
        self.log, self._started = work / f"{application}.log", work / f"{application}.started"
        env = {
            **os.environ,
            "PEER_BROKER": settings.kafka.bootstrap_servers,
            "PEER_APPLICATION": application,
            "PEER_IMPRESSIONS": names.impressions,
            "PEER_CLICKS": names.clicks,
            "PEER_EXAMPLES": names.examples,
            "PEER_DEAD_LETTERS": names.dead_letters,
            "PEER_STATE_DIR": str(work / f"{application}-state"),
            "PEER_STARTED": str(self._started),
            "PEER_WINDOW_MS": str(join.window_ms),
            "PEER_HOLD_MS": str(join.held_ms),
            "PEER_LATENESS_MS": str(join.lateness_ms),
            "PEER_HORIZON_MS": str(join.dedupe_horizon_ms),
            "PEER_MAX_FUTURE_MS": str(join.max_future_ms),
        }
        classpath = ":".join(str(jar) for jar in build())
        jvm = os.environ.get("PEER_JVM", "").split() or JVM
        command = [str(find_java(None)), *jvm, "-cp", classpath, "headrace.Join"]
        with self.log.open("ab") as log, pinned(0):
            self._process = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raises SystemExit, with the end of the peer's log, if the peer has ended."""
        if self._process.poll() is not None:
            raise SystemExit(f"the peer ended with {self._process.returncode}: {self.log.read_text()[-3000:]}")

    def wait_ready(self) -> None:
        """Wait until its partitions are assigned and it fetches. Raises SystemExit after `START_S` seconds."""
        deadline = time.monotonic() + START_S
        while not self._started.exists():
            self.check()
            if time.monotonic() > deadline:
                raise SystemExit(f"the peer was not ready within {START_S:.0f} s: {self.log.read_text()[-3000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
