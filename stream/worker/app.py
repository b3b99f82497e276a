"""Builds the Faust app of a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from faust.types import TP

from stream.kafka.clients import faust_options
from stream.kafka.transport import FETCH_MAX_WAIT_MS, RunApp
from stream.settings import KafkaSettings

__all__ = ["build_app"]

# aiokafka leaves the group when nothing was fetched for this long, and a rebuild of the join's state fetches nothing. A day is
# long enough for any rebuild: the watchdog looks after progress, so a long rebuild must not end by losing its partition. (How
# long the other members wait for one that doesn't rejoin is the rebalance timeout, 60 s.)
MAX_POLL_INTERVAL_S = 86_400.0


def build_app(
    group: str,
    kafka: KafkaSettings,
    *,
    next_offset: Callable[[TP], int | None],
    session_timeout_ms: int,
    instance_id: str | None = None,
    fetch_max_wait_ms: int = FETCH_MAX_WAIT_MS,
) -> RunApp:
    """A Faust app that does membership, rebalances, agents and supervision, and nothing else: no tables, no web, no commits.

    With an `instance_id` membership is static: a worker that comes back within the session timeout gets its partitions back
    at once and without a rebalance.
    """
    return RunApp(
        group,
        next_offset=next_offset,
        fetch_max_wait_ms=fetch_max_wait_ms,
        loop=asyncio.get_running_loop(),
        broker_session_timeout=session_timeout_ms / 1000,
        broker_heartbeat_interval=session_timeout_ms / 3000,
        broker_max_poll_interval=MAX_POLL_INTERVAL_S,
        broker_max_poll_records=20_000,  # of one fetch, all partitions together; FETCH_MAX_BYTES bounds each
        # A worker seeks to its own position in every partition. A position outside the log is an error and never a silent skip.
        consumer_auto_offset_reset="none",
        consumer_group_instance_id=instance_id,
        # Size of Faust's queue between its consumer and an agent, in runs: Faust 0.15.3 ignores `app.topic(maxsize=…)`. Bytes
        # bound what waits (stream/kafka/transport.py). This bound keeps waiting runs in the fetcher and in the worker's own
        # queues, where the runs of revoked or paused partitions are dropped at once.
        stream_buffer_maxsize=4,
        stream_wait_empty=False,
        stream_recovery_delay=0.0,
        # With 0 standby replicas and no tables Faust takes a round-robin assignor, which may give partition N of two topics to
        # different workers.
        table_standby_replicas=1,
        topic_disable_leader=True,
        topic_allow_declare=False,
        web_enabled=False,
        autodiscover=False,
        store="memory://",
        **faust_options(kafka),
    )
