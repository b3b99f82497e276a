"""Logs: for people on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import msgspec

__all__ = ["setup_logs"]

LIBRARIES = ("faust", "mode", "aiokafka", "kafka")
# An outage is seen at once, and that it lasts is seen in a log that people still read.
SELDOM_S = 30.0


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if hasattr(record, "http_port"):
            line["http_port"] = record.http_port
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class _Seldom(logging.Filter):
    """Of what the client libraries say, the same words once in SELDOM_S: without brokers they say it forty times a second."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, str], float] = {}  # what was said, and when last

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(LIBRARIES):
            return True
        words = record.name, str(record.msg)  # not the values in it: one kind of message, not one each broker and offset
        now = time.monotonic()
        if now - self._said.get(words, float("-inf")) < SELDOM_S:
            return False
        self._said[words] = now
        return True


def setup_logs(*, verbose: bool = False) -> None:
    """Send logs to stderr. Faust's and aiokafka's everyday news, and what they repeat, are left out unless `verbose`."""
    handler = logging.StreamHandler(sys.stderr)
    if not verbose:
        handler.addFilter(_Seldom())
    if sys.stderr.isatty():
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"))
    else:
        handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.NOTSET)  # commands leave it out
    for name in (*LIBRARIES, "stream.kafka.transport"):
        logging.getLogger(name).setLevel(logging.NOTSET if verbose else logging.WARNING)
