"""The command line as a user runs it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import main
from deploy.settings import Settings


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[[str], Ran]


@pytest.fixture
def run(settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line with this test's Kafka, topics and store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADRACE_KAFKA__BOOTSTRAP_SERVERS", settings.kafka.bootstrap_servers)
    monkeypatch.setenv("HEADRACE_TOPICS__PREFIX", settings.topics.prefix)
    monkeypatch.setenv("HEADRACE_TOPICS__PARTITIONS", str(settings.topics.partitions))
    monkeypatch.setenv("HEADRACE_TOPICS__REQUEST_PARTITIONS", str(settings.topics.request_partitions))
    monkeypatch.setenv("HEADRACE_SNAPSHOTS__URL", settings.snapshots.url)

    def run(command: str) -> Ran:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(shlex.split(command))
        out, err = capfd.readouterr()
        return Ran(int(exit_.value.code or 0), out, err)

    return run
