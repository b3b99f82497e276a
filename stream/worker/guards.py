"""Ends the process when something fails that a worker can't go on without.

Every exception ends up in `fatal`, wherever it was raised: in Faust's agent, in a rebalance hook, in a background task or in a
thread. Faust and asyncio would note it and go on, with a record counted as handled or a task missing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Coroutine
from functools import partial
from typing import Any, NoReturn

from aiokafka.errors import KafkaError

__all__ = ["end_on_error", "fatal", "guarded"]

log = logging.getLogger(__name__)


def fatal(what: str, error: BaseException) -> NoReturn:
    """End the process at once with exit code 1. The next process reads the log again, and nothing half decided is sent.

    The process' log gets one line. It includes the traceback unless the error is written for people (one of ours) or comes
    from outside (Kafka, the operating system).
    """
    ours = type(error).__module__ in ("model.errors", "state.errors", "stream.errors")
    found = str(error) if ours else f"{type(error).__name__}: {error}" if isinstance(error, OSError) else repr(error)
    log.critical(
        "%s: %s. The process ends. When it is started again, it goes on from the log.",
        *(what, found.removesuffix(".")),
        exc_info=None if ours or isinstance(error, (KafkaError, OSError)) else error,
    )
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def guarded(work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
    """Start a task. An exception that leaves it ends the process; cancelling it does not."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(partial(end_on_error, what))
    return task


def end_on_error(what: str, task: asyncio.Task[Any]) -> None:
    """End the process if a task has ended with an exception. For `add_done_callback`."""
    if not task.cancelled() and (error := task.exception()) is not None:
        fatal(what, error)
