"""Logs: for people on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import msgspec

__all__ = ["setup_logs"]


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


def setup_logs(*, verbose: bool = False) -> None:
    """Send logs to stderr. Faust's and aiokafka's everyday news are left out unless `verbose`."""
    handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S"))
    else:
        handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.NOTSET)  # commands leave it out
    for name in ("faust", "mode", "aiokafka", "kafka", "stream.transport"):
        logging.getLogger(name).setLevel(logging.NOTSET if verbose else logging.WARNING)
