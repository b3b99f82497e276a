"""Stands in for the worker that owns a partition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from faust.types import TP

from stream.join.partition import PartitionJoin
from stream.kafka.transport import LogEnd

__all__ = ["Owner"]


class Owner:
    """Answers a partition's questions with the callbacks given."""

    def __init__(
        self,
        log_end: Callable[[str], LogEnd | None] = lambda topic: None,
        failed: Callable[[str, BaseException], Any] = lambda what, error: None,
    ) -> None:
        self._log_end, self._failed = log_end, failed

    def log_end(self, tp: TP) -> LogEnd | None:
        return self._log_end(tp.topic)

    def stepped(self, partition: PartitionJoin) -> None:
        pass

    def failed(self, what: str, error: BaseException) -> None:
        self._failed(what, error)
