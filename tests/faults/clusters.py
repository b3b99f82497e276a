"""The Kafka clusters on which faults happen, and a clock that can be set."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.local_kafka.cluster import LocalKafka
from deploy.local_kafka.files import SERVER
from deploy.local_kafka.java import find_java
from deploy.settings import LocalKafkaSettings

__all__ = ["Clock", "Clusters", "Skipped"]

# Debian's libfaketime, in its `MT` build for programs with threads.
FAKETIME = [Path(f"/usr/lib/{where}/faketime/libfaketimeMT.so.1") for where in ("x86_64-linux-gnu", "aarch64-linux-gnu")]
FAKETIME += [Path("/usr/lib/faketime/libfaketimeMT.so.1")]
# By default a broker checks retention every five minutes, first after half a minute.
PROPERTIES = {"log.retention.check.interval.ms": 1_000, "log.initial.task.delay.ms": 1_000}


class Skipped(Exception):
    """This kind of fault isn't possible on this machine; the message says what is missing."""


class Clock:
    """A wall clock that can be set while processes use it. Monotonic clocks aren't affected."""

    def __init__(self, file: Path) -> None:
        found = [library for library in FAKETIME if library.exists()]
        if not found:
            raise Skipped("a clock that jumps: expected libfaketime (apt install libfaketime), found none")
        self._file = file
        self.environment = {
            "LD_PRELOAD": str(found[0]),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",  # with 1, timed waits in a JVM never end
            "FAKETIME_CACHE_DURATION": "1",
        }
        self.set(0)

    def set(self, ahead_s: int) -> None:
        """Set the clock so far ahead of the real time; processes see this within a second."""
        temporary = self._file.with_suffix(".new")
        temporary.write_text(f"{ahead_s:+d}s\n")
        temporary.replace(self._file)


class HurtKafka(LocalKafka):
    """A local Kafka that checks retention every second."""

    def _planned(self, state: Any) -> Any:
        planned = super()._planned(state)
        for node in planned.nodes:
            with (self._node(node) / SERVER).open("a") as file:
                file.writelines(f"{name}={value}\n" for name, value in PROPERTIES.items())
        return planned


class Clusters:
    """The clusters, each of which is started at its first use.

    Several runs use `shared` at once, without faults of its brokers. `alone`, `three` (brokers) and `clock` have such faults,
    and one run at a time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, LocalKafka] = {}
        self._stack = contextlib.ExitStack()
        self._locks = {name: threading.Lock() for name in ("shared", "alone", "three", "clock")}
        self.clock: Clock | None = None  # of the cluster `clock`, once that is started

    def __enter__(self) -> Clusters:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def adopt(self, name: str, kafka: LocalKafka) -> None:
        """Use a cluster that runs already."""
        self._running[name] = kafka

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[LocalKafka]:
        """A cluster, for the exclusive use of this run unless it is `shared`. Raises Skipped if this machine can't run it."""
        with self._locks[name]:
            if name not in self._running:
                self._running[name] = self._stack.enter_context(self._made(name))
            if name != "shared":
                yield self._running[name]
                return
        yield self._running[name]

    def busy(self, name: str) -> bool:
        """Whether a run has to wait for this cluster."""
        return self._locks[name].locked()

    def _made(self, name: str) -> LocalKafka:
        folder = self._folder / name
        settings = LocalKafkaSettings(dir=folder, start_timeout_ms=180_000, heap_mb=384)
        if name == "clock":
            folder.mkdir(parents=True, exist_ok=True)
            self.clock = Clock(folder / "clock")
            java = folder / "java"
            variables = "\n".join(f"export {key}='{value}'" for key, value in self.clock.environment.items())
            java.write_text(f'#!/bin/sh\n{variables}\nexec {find_java(None)} "$@"\n')
            java.chmod(0o755)
            settings = settings.model_copy(update={"java": java})
        return HurtKafka(settings, brokers=3 if name == "three" else 1)
