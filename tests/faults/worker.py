"""`headrace run …` with a fault, which the environment variable FAULT (JSON) describes. The product's code isn't changed.

{"step": "in the commit", "after": 7}        SIGKILL to itself when it reaches this step for the 7th time
… "signal": 15}                              the same with another signal
… "memory_group": "/sys/fs/…/cgroup.procs"}  join this control group instead, and use memory until the kernel ends the process
{"open_files": 64}                           limit of open files
{"flush_s": 0.2}                             the state is flushed this often, instead of every 30 s
{"links": {"9092": 40123}}                   connections to this port go to another port (`network.Link`)
"""

from __future__ import annotations

import asyncio
import functools
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from aiokafka import AIOKafkaProducer

from state.join_state import JoinState
from stream.join import partition
from stream.join.committed import CommittedReader
from stream.join.local_state import LocalState
from stream.join.partition import PartitionJoin
from stream.join.rebuild import Rebuild
from stream.join.takeover import Takeover
from stream.join.worker import JoinWorker

__all__ = ["RECOVERY", "REVOKE", "STEPS", "Fault"]


class Fault(msgspec.Struct, omit_defaults=True):
    """The contents of FAULT."""

    step: str = ""
    after: int = 1
    signal: int = signal.SIGKILL
    memory_group: str = ""
    open_files: int = 0
    flush_s: float = 0.0
    links: dict[str, int] = {}


# Step → class, method, and when the fault happens: before, after or amid a call of the method.
STEPS: dict[str, tuple[type, str, str]] = {
    "before the transaction": (AIOKafkaProducer, "begin_transaction", "before"),
    "amid the produce": (AIOKafkaProducer, "send_batch", "after"),
    "between produce and offsets": (AIOKafkaProducer, "send_offsets_to_transaction", "before"),
    "between offsets and commit": (AIOKafkaProducer, "commit_transaction", "before"),
    "in the commit": (AIOKafkaProducer, "commit_transaction", "amid"),
    "between commit and write": (AIOKafkaProducer, "commit_transaction", "after"),
    "after the write": (PartitionJoin, "_apply", "after"),
    "in a flush": (JoinState, "flush", "amid"),
}
# Steps of taking over and of rebuilding, which a worker reaches when it starts or gets a partition.
RECOVERY: dict[str, tuple[type, str, str]] = {
    "taking over: producer started": (CommittedReader, "read", "before"),
    "taking over: offsets read": (LocalState, "open", "before"),
    "taking over: state opened": (Rebuild, "run", "before"),
    "recovery: labels being read": (Rebuild, "_resolve", "after"),
    "recovery: impressions being read": (Rebuild, "_impressions", "after"),
    "recovery: clicks being read": (Rebuild, "_clicks", "after"),
    "recovery: before settling": (Rebuild, "_settle", "before"),
    "recovery: settled": (Rebuild, "_settle", "after"),
    "taking over: done": (Takeover, "take", "after"),
}
REVOKE: dict[str, tuple[type, str, str]] = {
    "on revoke": (JoinWorker, "revoked", "before"),
    "after revoke": (JoinWorker, "revoked", "after"),
}


def _die(fault: Fault) -> None:
    """End this process, by a signal or by its use of memory."""
    if not fault.memory_group:
        os.kill(os.getpid(), fault.signal)
        return
    Path(fault.memory_group).write_text(str(os.getpid()))
    held = []
    while True:
        held.append(b"x" * (1 << 20))


def _arm(fault: Fault) -> None:
    """Wrap the method of the step with the fault."""
    owner, method, when = {**STEPS, **RECOVERY, **REVOKE}[fault.step]
    original: Callable[..., Any] = getattr(owner, method)
    left = fault.after

    def reached() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    if asyncio.iscoroutinefunction(original):

        @functools.wraps(original)
        async def hurt(*args: Any, **kwargs: Any) -> Any:
            now = reached()
            if now and when == "before":
                _die(fault)
            if now and when == "amid":
                task = asyncio.ensure_future(original(*args, **kwargs))
                await asyncio.sleep(fault.after % 5 / 1000)  # 0 to 4 ms, so that the request is sent, or answered
                _die(fault)
                return await task
            result = await original(*args, **kwargs)
            if now:
                _die(fault)
            return result

    else:

        @functools.wraps(original)
        def hurt(*args: Any, **kwargs: Any) -> Any:
            now = reached()
            if now and when == "before":
                _die(fault)
            if now and when == "amid":
                threading.Timer(fault.after % 5 / 1000, _die, (fault,)).start()
            result = original(*args, **kwargs)
            if now and when == "after":
                _die(fault)
            return result

    setattr(owner, method, hurt)


def _relink(links: dict[str, int]) -> None:
    """Connect to the links instead of the brokers."""
    original = asyncio.BaseEventLoop.create_connection

    @functools.wraps(original)
    async def create_connection(self: Any, factory: Any, host: Any = None, port: Any = None, **kwargs: Any) -> Any:
        return await original(self, factory, host, links.get(str(port), port), **kwargs)

    asyncio.BaseEventLoop.create_connection = create_connection  # type: ignore[method-assign,assignment]


def main() -> Any:
    fault = msgspec.json.decode(os.environ.get("FAULT", "{}"), type=Fault)
    if fault.open_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (fault.open_files, fault.open_files))
    if fault.step:
        _arm(fault)
    if fault.flush_s:
        partition.FLUSH_S = fault.flush_s
    if fault.links:
        _relink(fault.links)
    from deploy.cli import main as cli

    return cli(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
