"""`headrace watermarks` as a user runs it."""

from __future__ import annotations

import time

from deploy.settings import Settings
from tests.deploy.conftest import Run
from tests.deploy.made_up import read_topic


def test_rounds_go_to_every_partition_and_never_beyond_now(run: Run, topics: Settings) -> None:
    ran = run("watermarks --lateness 2s --every 20ms --limit 3")
    assert ran.code == 0 and ran.out == "" and ran.err.startswith("sending now minus 2 s every 20 ms")
    latest_ms = time.time_ns() // 1_000_000 - 2_000
    for topic in ("impressions", "clicks"):
        found = read_topic(topics, topic)
        assert sorted(record.partition for record in found) == [0, 0, 0, 1, 1, 1]
        watermarks = [int(dict(record.headers)["headrace-watermark"]) for record in found]
        assert max(watermarks) <= latest_ms and len(set(watermarks)) > 1
        assert all((record.key, record.value) == (None, b"") for record in found)


def test_usage(run: Run, topics: Settings) -> None:
    assert "expected a number and a unit" in run("watermarks --lateness soon").err
    assert "expected 1ms or more" in run("watermarks --every 0ms").err
    assert run("watermarks --lateness 1s --limit 0").code == 2
