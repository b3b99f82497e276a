from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deploy.errors import LocalKafkaError
from deploy.local_kafka import jars as kafka_jars
from deploy.local_kafka.jars import LOCK, Jar, cache_root, jars, kafka_version, read_lock
from deploy.settings import LocalKafkaSettings

CONTENT = {"kafka_2.13-9.9.jar": b"kafka", "slf4j-api-1.7.jar": b"slf4j"}


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "jars.lock"
    path.write_text(
        "# two jars\n"
        f"org.apache.kafka:kafka_2.13:9.9 {hashlib.sha256(b'kafka').hexdigest()}\n"
        f"org.slf4j:slf4j-api:1.7 {hashlib.sha256(b'slf4j').hexdigest()}\n"
    )
    return path


@pytest.fixture
def settings(tmp_path: Path) -> LocalKafkaSettings:
    return LocalKafkaSettings(cache_dir=tmp_path / "cache")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for the network: hands out CONTENT, and lists what was asked for."""
    asked: list[str] = []

    def fetch(wanted: Sequence[Jar], folder: Path, on_done: Callable[[int], None]) -> None:
        for done, jar in enumerate(wanted, start=1):
            asked.append(jar.filename)
            (folder / jar.filename).write_bytes(CONTENT[jar.filename])
            on_done(done)

    monkeypatch.setattr(kafka_jars, "_fetch_by_jgo", fetch)
    return asked


def test_the_lock_pins_all_of_kafka_and_names_no_address() -> None:
    pinned = read_lock()
    assert (pinned[0].group, pinned[0].artifact) == ("org.apache.kafka", "kafka_2.13")
    assert pinned[0].version.startswith("4.")
    assert {"kafka-clients", "kafka-raft", "log4j-core", "log4j-slf4j-impl", "slf4j-api"} <= {jar.artifact for jar in pinned}
    assert len({jar.filename for jar in pinned}) == len(pinned)
    assert all(len(jar.sha256) == 64 for jar in pinned)
    assert "://" not in LOCK.read_text()
    assert kafka_version() == pinned[0].version


def test_fetched_once_then_from_the_cache(lock: Path, settings: LocalKafkaSettings, fetched: list[str]) -> None:
    progress: list[tuple[int, int]] = []
    found = jars(settings, lock=lock, on_progress=lambda done, total: progress.append((done, total)))
    assert [file.name for file in found] == list(CONTENT)
    assert [file.read_bytes() for file in found] == list(CONTENT.values())
    assert progress == [(0, 2), (1, 2), (2, 2)]
    assert jars(settings, lock=lock) == found
    found[1].unlink()
    jars(settings, lock=lock)
    assert fetched == [*CONTENT, "slf4j-api-1.7.jar"]
    assert sorted(file.name for file in found[0].parent.iterdir()) == sorted(CONTENT), "nothing is left aside"


def test_two_at_once(lock: Path, settings: LocalKafkaSettings, fetched: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: jars(settings, lock=lock), range(8)))
    assert all(result == results[0] for result in results)


def test_another_jar_than_the_pinned_one_is_refused(
    lock: Path, settings: LocalKafkaSettings, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONTENT, "slf4j-api-1.7.jar", b"something else")
    with pytest.raises(LocalKafkaError, match=r"org.slf4j:slf4j-api:1.7: expected SHA-256 \w{64}, found .*nothing was kept"):
        jars(settings, lock=lock)
    assert list((cache_root(settings) / "9.9").iterdir()) == []


def test_a_changed_cache_is_refused(lock: Path, settings: LocalKafkaSettings, fetched: list[str]) -> None:
    kafka, _ = jars(settings, lock=lock)
    kafka.write_bytes(b"changed")
    with pytest.raises(LocalKafkaError, match=rf"kafka_2.13:9.9: expected SHA-256 .*cached file was changed.*rm {kafka}"):
        jars(settings, lock=lock)


def test_no_network(lock: Path, settings: LocalKafkaSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    def refuse(*args: object, **kwargs: object) -> None:
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "request", refuse)
    with pytest.raises(LocalKafkaError) as caught:
        jars(settings, lock=lock)
    message = str(caught.value)
    assert "expected to download it, found: no route to host" in message
    for variable in ("KAFKA__RESOLVER", "KAFKA__CACHE_DIR", "KAFKA__BOOTSTRAP_SERVERS"):
        assert variable in message


def test_mvn_missing(lock: Path, settings: LocalKafkaSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LocalKafkaError, match=r'resolver = "mvn": expected Maven.*RESOLVER=jgo'):
        jars(settings.model_copy(update={"resolver": "mvn"}), lock=lock)


def test_mvn_is_asked_for_the_pinned_jars(
    lock: Path, settings: LocalKafkaSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maven = tmp_path / "bin" / "mvn"
    maven.parent.mkdir()
    maven.write_text(
        "#!/bin/sh\n"
        'for a in "$@"; do case "$a" in -DoutputDirectory=*) out="${a#*=}";; esac; done\n'
        'grep -q "<artifactId>slf4j-api</artifactId><version>1.7</version>" "$out/pom.xml" || exit 1\n'
        'printf kafka > "$out/kafka_2.13-9.9.jar"; printf slf4j > "$out/slf4j-api-1.7.jar"\n'
    )
    maven.chmod(0o755)
    monkeypatch.setenv("PATH", str(maven.parent), prepend=":")
    found = jars(settings.model_copy(update={"resolver": "mvn"}), lock=lock)
    assert [file.read_bytes() for file in found] == [b"kafka", b"slf4j"]
    maven.write_text("#!/bin/sh\necho 'could not resolve'; exit 1\n")
    shutil.rmtree(cache_root(settings))
    with pytest.raises(LocalKafkaError, match=r"expected to download it, found: could not resolve"):
        jars(settings.model_copy(update={"resolver": "mvn"}), lock=lock)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("org.apache.kafka:kafka_2.13:4.2.2\n", r"line 1: expected `group:artifact:version sha256`, found 'org"),
        ("org.slf4j:slf4j-api:1.7 aa\n", r"expected org.apache.kafka:kafka_2.13 in its first line"),
    ],
)
def test_a_broken_lock(tmp_path: Path, text: str, message: str) -> None:
    lock = tmp_path / "jars.lock"
    lock.write_text(text)
    with pytest.raises(LocalKafkaError, match=message):
        read_lock(lock)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root(LocalKafkaSettings()) == Path("/home/me/.cache/headrace/kafka")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert cache_root(LocalKafkaSettings()) == Path("/var/cache/me/headrace/kafka")
    assert cache_root(LocalKafkaSettings(cache_dir=Path("~/jars"))) == Path("/home/me/jars")
