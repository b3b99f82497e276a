"""Tests written as coroutines run on an event loop of their own."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.settings import Settings
from tests.stream.trainer.process import Process


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def one(settings: Settings, *options: str, **environment: str) -> Process:
        started.append(Process(settings, tmp_path, *options, **environment))
        return started[-1]

    yield one
    for each in started:
        each.process.kill()
        each.process.wait()
