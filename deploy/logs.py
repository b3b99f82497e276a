"""Logs of workers: for people on a terminal, JSON lines elsewhere.

A JSON line has `time` (UTC), `level`, `logger` and `message`; `http_port` where a worker says which port it took, and
`exception` with the traceback.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from pythonjsonlogger.msgspec import MsgspecFormatter

__all__ = ["setup_logs"]

LIBRARIES = ("faust", "mode", "aiokafka", "kafka")
# Between two lines of the same kind by a client library. The first line of an outage comes at once; a line every 30 s shows
# that it lasts, and leaves the log readable.
SELDOM_S = 30.0


class _JsonLines(MsgspecFormatter):
    """The fields of our lines. Of a record's `extra`, `http_port` alone: libraries put objects of their own there."""

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data["time"] = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        log_data["level"] = record.levelname.lower()
        log_data["logger"] = record.name
        log_data["message"] = record.getMessage()
        if hasattr(record, "http_port"):
            log_data["http_port"] = record.http_port
        if "exc_info" in message_dict:
            log_data["exception"] = message_dict["exc_info"]


class _Seldom(logging.Filter):
    """Lets a client library's line through once in SELDOM_S. Without brokers, aiokafka repeats it forty times a second."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, str], float] = {}  # (logger, message) → when it was let through last

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(LIBRARIES):
            return True
        kind = record.name, str(record.msg)  # without the values in it: one kind of message, not one for each broker and offset
        now = time.monotonic()
        if now - self._last.get(kind, float("-inf")) < SELDOM_S:
            return False
        self._last[kind] = now
        return True


def setup_logs(*, verbose: bool = False) -> None:
    """Send logs to stderr. Unless `verbose`, client libraries' lines below WARNING and their repetitions are left out."""
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
