"""A stream that stops: its last labels wait until something moves the watermark, and everybody can see that they wait."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from deploy.demo.audit import Audit
from deploy.doctor.examination import examine
from deploy.doctor.kafka_readings import read_everything
from deploy.doctor.progress_checks import QUIET_MS
from deploy.errors import FeedError
from deploy.feeding.watermarks import send_watermarks
from deploy.settings import Settings
from headrace.events import encode_click, encode_impression
from stream.join import metrics as metrics_module
from stream.join.metrics import JoinMetrics
from stream.join.plan import Plan
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.names import TopicNames
from tests.stream.join.made_up import PATIENCE_S, join_settings, join_worker, send, until

AGE = "headrace_join_watermark_age_seconds"


def test_the_age_of_a_watermark_grows_while_impressions_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    registry = CollectorRegistry()
    metrics = JoinMetrics(registry)

    def step(now: float, watermark_ms: int, pending: int) -> float | None:
        clock.now = now
        memory: Any = SimpleNamespace(early_clicks=0, impressions_seen_ms=90, clicks_seen_ms=90, watermark_ms=watermark_ms)
        metrics.observe_step(3, Plan(), memory, pending)
        return registry.get_sample_value(AGE, {"partition": "3"})

    told = [step(*each) for each in ((100, 50, 2), (107, 50, 2), (109, 50, 1), (110, 51, 1), (112, 51, 0), (115, 51, 1))]
    assert told == [0, 7, 9, 0, 0, 3]
    metrics.forget_partition(3)
    assert registry.get_sample_value(AGE, {"partition": "3"}) is None
    assert step(200, 51, 1) == 0, "what it was before it went elsewhere is forgotten"


@pytest.mark.kafka
def test_the_last_labels_of_a_stream_that_stops_come_with_the_sender_and_not_without(topics: Settings, tmp_path: Any) -> None:
    settings = join_settings(topics, window_ms=300, lateness_ms=0, idle_timeout_ms=200)
    names = TopicNames.of(settings.topics)
    now_ms = time.time_ns() // 1_000_000
    ids = [f"i{index}" for index in range(20)]
    arriving = [("impressions", *encode_impression(name, now_ms, {})) for name in ids]
    arriving += [("clicks", *encode_click(name, now_ms)) for name in ids[:5]]
    worker = join_worker(settings, tmp_path)

    def standing_s() -> float:
        """How long the watermark of the partition that has stood the longest stands."""
        return max((value for (name, _), value in worker.metrics().items() if name == AGE), default=0.0)

    async def check() -> None:
        worker.start()
        await asyncio.to_thread(worker.wait_ready)
        await send(settings, arriving)
        # Ten windows and as many idle time-outs: nothing comes by itself.
        await until(lambda: standing_s() > 3.0, "a watermark that stands", worker)
        async with Audit(settings) as audit:
            assert (await audit.read()).labels.keys().isdisjoint({name.encode() for name in ids[5:]})
            readings = await read_everything(settings, sample=100)
            later = replace(readings, now_ms=readings.now_ms + QUIET_MS + 10_000)
            quiet = [finding for finding in examine(later) if finding.check == "watermark"]
            assert quiet and all("`headrace watermarks`" in finding.cure for finding in quiet)
            sending = asyncio.ensure_future(send_watermarks(settings.kafka, names, lateness_ms=50, every_ms=100))
            try:
                deadline = time.monotonic() + PATIENCE_S
                while (ledger := await audit.read()).labels.keys() != {name.encode() for name in ids}:
                    worker.check()
                    assert time.monotonic() < deadline, ledger
                    await asyncio.sleep(0.1)
            finally:
                sending.cancel()
                await asyncio.wait([sending])
        assert ledger.dead_letters.total() == 0 and set(ledger.positives) == {name.encode() for name in ids[:5]}
        await until(lambda: standing_s() == 0, "nothing waits", worker)

    try:
        asyncio.run(check())
    finally:
        if worker.returncode is None:
            worker.kill()
        worker.wait_stopped()


def test_the_sender_says_what_is_missing() -> None:
    nowhere = KafkaSettings(bootstrap_servers="127.0.0.1:1", connect_timeout_ms=300)
    with pytest.raises(FeedError, match=r"127\.0\.0\.1:1 \(PLAINTEXT\): expected a broker that answers"):
        asyncio.run(send_watermarks(nowhere, TopicNames.of(TopicSettings()), lateness_ms=0, every_ms=10))
    with pytest.raises(ValueError, match="expected 0 or more, found -1"):
        asyncio.run(send_watermarks(nowhere, TopicNames.of(TopicSettings()), lateness_ms=-1, every_ms=10))
