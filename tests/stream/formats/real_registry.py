"""A real Schema Registry for tests: Apicurio's, in memory, on the loopback, where `SCHEMA_REGISTRY_JAR` names its runner."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["JAR", "WITHOUT", "real_registry", "register"]

JAR = os.environ.get("SCHEMA_REGISTRY_JAR")
WITHOUT = "SCHEMA_REGISTRY_JAR doesn't name Apicurio's runner"
START_S = 90.0


@contextlib.contextmanager
def real_registry(folder: Path) -> Iterator[str]:
    """The address of one that runs until the end of the block. It takes some 8 s to start, and 500 MB of memory."""
    java = shutil.which("java")
    assert java is not None
    assert JAR is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "registry.log"
    options = ["-Xmx512m", "-Dquarkus.http.host=127.0.0.1", f"-Dquarkus.http.port={port}"]
    with log.open("wb") as out:
        command = [java, *options, "-jar", str(Path(JAR).absolute())]
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder)
    try:
        address, ends = f"http://127.0.0.1:{port}/apis/ccompat/v7", time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(f"{address}/subjects", timeout=2):
                    break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < ends, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def register(url: str, subject: str, kind: str, schema: str, references: list[dict[str, Any]] | None = None) -> int:
    body = {"schemaType": kind, "schema": schema, "references": references or []}
    headers = {"Content-Type": "application/vnd.schemaregistry.v1+json"}
    request = urllib.request.Request(f"{url}/subjects/{subject}/versions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        found: int = json.loads(answer.read())["id"]
        return found
