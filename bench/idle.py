"""Memory and CPU of an idle join worker, by the number of its partitions.

    .venv/bin/python bench/idle.py                      # 1, 16 and 64 partitions: about 2 minutes

Memory is the process' VmRSS once it has taken over all partitions; CPU is measured over the 10 s after that.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report, warn_if_busy
from deploy.demo.play import worker_environment
from deploy.local_kafka.cluster import LocalKafka
from deploy.processes.usage import usage
from deploy.processes.workers import Worker
from deploy.settings import LocalKafkaSettings, Settings
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.admin import create_topics

STRETCH_S = 10.0
PATIENCE_S = 120.0


def measure(bootstrap_servers: str, partitions: int, work: Path) -> dict[str, float]:
    """One idle worker on core 0, with so many partitions of each source."""
    settings = Settings(
        kafka=KafkaSettings(bootstrap_servers=bootstrap_servers),
        topics=TopicSettings(prefix=f"{partitions}-", partitions=partitions),
        state_dir=work / f"{partitions}-state",
    )
    create_topics(settings.kafka, settings.topics)
    worker = Worker("join", worker_environment(settings), work / f"{partitions}.log", cwd=work)
    began = time.monotonic()
    worker.start()
    os.sched_setaffinity(worker.pid, {0})
    try:
        worker.wait_ready(PATIENCE_S)
        ready_s = time.monotonic() - began
        time.sleep(2.0)
        before = usage(worker.pid).cpu_seconds
        time.sleep(STRETCH_S)
        used = usage(worker.pid)
    finally:
        worker.ask_to_stop()
        worker.wait_stopped()
    return {
        "rss_mb": round(used.rss_mb),
        "cpu_percent": round((used.cpu_seconds - before) / STRETCH_S * 100, 1),
        "ready_s": round(ready_s, 1),
    }


@click.command()
@click.option("--partitions", "sizes", type=int, multiple=True, default=(1, 16, 64), show_default=True)
def main(sizes: tuple[int, ...]) -> None:
    """Measure and print; the last line is one JSON object."""
    work = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
    warn_if_busy()
    try:
        with LocalKafka(LocalKafkaSettings(dir=work / "kafka")) as kafka:
            found = {}
            for partitions in sizes:
                found[partitions] = one = measure(kafka.bootstrap_servers, partitions, work)
                click.echo(f"{partitions:>4} partitions  {one['rss_mb']:>5.0f} MB  {one['cpu_percent']:>5.1f} % of a core")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(by_partitions=found)


if __name__ == "__main__":
    main()
