"""What a worker's log leaves out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from deploy import logs
from deploy.logs import setup_logs


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root, names = logging.getLogger(), ("asyncio", "stream.kafka.transport", *logs.LIBRARIES)
    handlers, level, levels = root.handlers[:], root.level, {name: logging.getLogger(name).level for name in names}
    yield
    root.handlers[:], root.level = handlers, level
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


def said(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return [json.loads(line)["message"] for line in capfd.readouterr().err.splitlines()]


def test_what_a_library_repeats_is_said_seldom(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    setup_logs()
    for node in range(100):
        logging.getLogger("aiokafka").error("Unable connect to node with id %s", node)
        logging.getLogger("aiokafka.conn").error("Unable connect to node with id %s", node)
        logging.getLogger("aiokafka").info("everyday")
    for number in range(3):
        logging.getLogger("stream.join.worker").warning("partition %d", number)
    assert said(capfd) == ["Unable connect to node with id 0"] * 2 + [f"partition {number}" for number in range(3)]
    monkeypatch.setattr(logs, "SELDOM_S", 0.0)
    logging.getLogger("aiokafka").error("Unable connect to node with id %s", 100)
    assert said(capfd) == ["Unable connect to node with id 100"]


def test_verbose_leaves_out_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    setup_logs(verbose=True)
    for _ in range(3):
        logging.getLogger("aiokafka").error("again")
    assert said(capfd).count("again") == 3
