"""Real object stores on the loopback: an S3 server (S3Proxy, from the cache of Kafka's jars) and Azure's emulator (Azurite)."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import fcntl
import hashlib
import hmac
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from deploy.local_kafka.jars import cache_root, jars
from deploy.local_kafka.java import find_java
from deploy.local_kafka.ports import free_ports
from deploy.settings import LocalKafkaSettings

__all__ = ["AZURE_ACCOUNT", "AZURE_KEY", "S3_KEY", "S3_SECRET", "azurite", "make_container", "s3_server"]

HERE = Path(__file__).parent
S3_KEY, S3_SECRET = "headrace", "a secret of the tests"

# Azurite's one account, which its documentation names.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

START_S = 60.0


@contextlib.contextmanager
def s3_server(folder: Path, *, authorized: bool = False) -> Iterator[str]:
    """The address of an S3 server until the end of the block. Its buckets are the folders in `folder`/buckets.

    Args:
        authorized: whether requests must be signed with `S3_KEY` and `S3_SECRET`. Otherwise signatures aren't looked at.
    """
    settings = LocalKafkaSettings()
    path = os.pathsep.join(map(str, jars(settings, lock=HERE / "s3proxy-jars.lock", program="org.gaul:s3proxy")))
    (port,) = free_ports(1)
    (folder / "buckets").mkdir(parents=True)
    secret = f"s3proxy.identity={S3_KEY}\ns3proxy.credential={S3_SECRET}\n"
    (folder / "s3proxy.conf").write_text(
        f"s3proxy.endpoint=http://127.0.0.1:{port}\n"
        f"s3proxy.authorization={'aws-v4' if authorized else 'none'}\n{secret if authorized else ''}"
        f"jclouds.provider=filesystem-nio2\njclouds.filesystem.basedir={folder / 'buckets'}\n"
    )
    (folder / "logback.xml").write_text("<configuration><root level='WARN'/></configuration>")
    command = [find_java(settings.java), "-Xmx256m", f"-Dlogback.configurationFile={folder / 'logback.xml'}", "-cp", path]
    with _running([*command, "org.gaul.s3proxy.Main", "--properties", folder / "s3proxy.conf"], folder, port) as address:
        yield address


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[str]:
    """The address of an Azure blob store until the end of the block. Skips the test where npm can't install it."""
    node = shutil.which("node")
    main = _azurite_main()
    assert node is not None
    (port,) = free_ports(1)
    folder.mkdir()
    options = ["--blobPort", str(port), "--inMemoryPersistence", "--silent", "--skipApiVersionCheck"]
    with _running([node, main, "--blobHost", "127.0.0.1", *options], folder, port) as address:
        yield address


def _azurite_main() -> Path:
    """Azurite's program, installed once by npm from the lock beside this file."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("Azurite: expected npm and node on PATH, to install and run it, found none")
    lock = HERE / "azurite" / "package-lock.json"
    home = cache_root(LocalKafkaSettings()) / f"azurite-{_short_hash(lock)}"
    main = home / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # one of the processes of a test run installs it
        if not (home / "installed").exists():
            for name in ("package.json", "package-lock.json"):
                shutil.copy(lock.with_name(name), home)
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"Azurite: npm can't install it here: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
            (home / "installed").touch()
    return main


def make_container(address: str, name: str) -> None:
    """Make a container, by a request signed with the account's key."""
    date = email.utils.formatdate(usegmt=True)
    path = f"/{AZURE_ACCOUNT}/{name}"
    headers = f"x-ms-date:{date}\nx-ms-version:2021-08-06\n"
    text = "PUT" + "\n" * 12 + headers + f"/{AZURE_ACCOUNT}{path}\nrestype:container"
    signature = hmac.digest(base64.b64decode(AZURE_KEY), text.encode(), "sha256")
    request = urllib.request.Request(f"{address}{path}?restype=container", method="PUT")
    request.add_header("x-ms-date", date)
    request.add_header("x-ms-version", "2021-08-06")
    request.add_header("Authorization", f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(signature).decode()}")
    with urllib.request.urlopen(request):
        pass


def _short_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


@contextlib.contextmanager
def _running(command: Sequence[str | Path], folder: Path, port: int) -> Iterator[str]:
    """Run a server until the end of the block. Its address, once it answers."""
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=folder)
    try:
        address = f"http://127.0.0.1:{port}"
        _until(lambda: _answers(address), process, log)
        yield address
    finally:
        process.kill()
        process.wait(30)


def _until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + START_S
    while not ready():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < ends, log.read_text()
        time.sleep(0.05)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # it rejects the request, so it is there
    except OSError:
        return False
