"""The one broker that all runs use: it compacts and deletes within a second."""

from __future__ import annotations

from typing import Any

from deploy.local_kafka.cluster import LocalKafka
from deploy.local_kafka.files import SERVER

__all__ = ["FaultKafka"]

# By default a broker looks for logs to compact every 15 s, and for logs to delete every five minutes.
PROPERTIES = {
    "log.cleaner.backoff.ms": 200,
    "log.retention.check.interval.ms": 500,
    "log.initial.task.delay.ms": 500,
    "log.index.size.max.bytes": 65_536,  # of each log, reserved at once; a series makes some thousand topics
}


class FaultKafka(LocalKafka):
    """A local Kafka with one broker."""

    def _planned(self, state: Any) -> Any:
        planned = super()._planned(state)
        for node in planned.nodes:
            with (self._node(node) / SERVER).open("a") as file:
                file.writelines(f"{name}={value}\n" for name, value in PROPERTIES.items())
        return planned
