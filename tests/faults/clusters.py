"""The Kafka clusters that faults happen on, and the clock that some of them go by."""

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

# Debian's libfaketime; its `MT` build is the one for programs with threads.
FAKETIME = [Path(f"/usr/lib/{where}/faketime/libfaketimeMT.so.1") for where in ("x86_64-linux-gnu", "aarch64-linux-gnu")]
FAKETIME += [Path("/usr/lib/faketime/libfaketimeMT.so.1")]
# Retention is looked at every five minutes by default, for the first time after half a minute.
PROPERTIES = {"log.retention.check.interval.ms": 1_000, "log.initial.task.delay.ms": 1_000}


class Skipped(Exception):
    """This kind of fault can't be made on this machine; the text says what is missing."""


class Clock:
    """A wall clock that can be set while those who go by it run. Monotonic clocks go on as they are."""

    def __init__(self, file: Path) -> None:
        found = [library for library in FAKETIME if library.exists()]
        if not found:
            raise Skipped("a clock that jumps: expected libfaketime (apt install libfaketime), found none")
        self._file = file
        self.environment = {
            "LD_PRELOAD": str(found[0]),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",  # with it every timed wait of a JVM lasts for ever
            "FAKETIME_CACHE_DURATION": "1",
        }
        self.set(0)

    def set(self, ahead_s: int) -> None:
        """From now on (within a second) the clock is that far ahead."""
        aside = self._file.with_suffix(".new")
        aside.write_text(f"{ahead_s:+d}s\n")
        aside.replace(self._file)


class HurtKafka(LocalKafka):
    """A local Kafka that looks at retention all the time."""

    def _planned(self, state: Any) -> Any:
        planned = super()._planned(state)
        for node in planned.nodes:
            with (self._node(node) / SERVER).open("a") as file:
                file.writelines(f"{name}={value}\n" for name, value in PROPERTIES.items())
        return planned


class Clusters:
    """Clusters, each started when it is first asked for.

    `shared` is used by several runs at once; `alone`, `three` (brokers) and `clock` are hurt, by one run at a time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, LocalKafka] = {}
        self._stack = contextlib.ExitStack()
        self._locks = {name: threading.Lock() for name in ("shared", "alone", "three", "clock")}
        self.clock: Clock | None = None  # of `clock`

    def __enter__(self) -> Clusters:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def adopt(self, name: str, kafka: LocalKafka) -> None:
        """Use one that runs already."""
        self._running[name] = kafka

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[LocalKafka]:
        """A cluster, for oneself alone unless it is `shared`. Raises Skipped where it can't be had."""
        with self._locks[name]:
            if name not in self._running:
                self._running[name] = self._stack.enter_context(self._made(name))
            if name != "shared":
                yield self._running[name]
                return
        yield self._running[name]

    def busy(self, name: str) -> bool:
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
