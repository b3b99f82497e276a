"""What the watchdog is told of a trainer and of a scorer: partitions by what is trained, and by what is answered."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from stream.kafka.cluster import Cluster
from stream.kafka.transport import LogEnd
from stream.scorer.worker import ScorerWorker
from stream.settings import KafkaSettings, ScorerSettings, TopicSettings
from stream.topics.names import TopicNames
from stream.trainer.worker import Parts, TrainerWorker
from stream.worker.watchdog import Part

NAMES = TopicNames.of(TopicSettings())
CLUSTER = Cluster("c", {}, {NAMES.score_requests: 2})


_UNUSED = (
    *("snapshots", "store", "go_back", "decoder", "skew", "letters", "deltas", "registry"),
    *("follower", "canary", "challenge", "tracks", "metrics", "table_metrics"),
)


def trainer(positions: dict[int, int]) -> Any:
    worker: Any = TrainerWorker(
        kafka=KafkaSettings(),
        group="g",
        names=NAMES,
        parts=Parts(  # type: ignore[arg-type]
            training=SimpleNamespace(positions=positions),
            **dict.fromkeys(("publisher", "judge", "anchors", "scores", "served", "calibration", "table")),
        ),
        threads=1,
        cluster=CLUSTER,
        **dict.fromkeys(  # type: ignore[arg-type]
            _UNUSED
        ),
    )
    worker._accepted = dict.fromkeys(positions, 9_999)  # what waits in queues is no progress
    return worker


def scorer(positions: dict[int, int]) -> Any:
    worker: Any = ScorerWorker(
        kafka=KafkaSettings(),
        settings=ScorerSettings(),
        names=NAMES,
        stale=lambda: False,
        worker_id="w",
        max_bytes=1,
        cluster=CLUSTER,
        **dict.fromkeys(  # type: ignore[arg-type]
            (
                *("swapper", "follower", "scoring", "candidate", "challengers", "serving", "scrub"),
                *("outbox", "heartbeats", "metrics", "freshness", "standstill"),
            )
        ),
    )
    worker._answering.answered = positions
    return worker


@pytest.mark.parametrize(("make", "topic"), [(trainer, NAMES.examples), (scorer, NAMES.score_requests)])
def test_each_partition_by_what_is_done(make: Any, topic: str) -> None:
    async def check() -> None:
        worker = make({0: 5, 1: 10})
        ends = {TP(topic, 0): 10, TP(topic, 1): 10}
        worker.app.consumer = SimpleNamespace(
            log_end=lambda tp: LogEnd(ends[tp], int(time.time() * 1000), ends[tp]), assignment=set, stop_flow=lambda: None
        )
        assert worker.waiting_for == "joining the group"
        assert list(worker.parts()) == [], "not before it joins"
        worker.joins = True
        assert [part.name for part in worker.parts()] == ["the group's assignment"]
        worker.waiting_for = None
        assert list(worker.parts()) == [
            Part(f"{topic}, partition 0", 5, "records from offset 5 to 10 waiting"),
            Part(f"{topic}, partition 1", 10, None),
        ]

    asyncio.run(check())
