"""What the commands share: questions to Kafka, errors, output in text or JSON, progress."""

from __future__ import annotations

import asyncio
import getpass
import logging
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

if TYPE_CHECKING:
    from deploy.settings import Settings

__all__ = ["ask_kafka", "echo_json", "format_option", "on_terminal", "own_errors", "who"]

T = TypeVar("T")


def ask_kafka(settings: Settings, doing: Coroutine[Any, Any, T], about: str) -> T:
    """Run it without the clients' own logs.

    Raises:
        StreamError: Kafka can't be reached, or doesn't answer.
    """
    from aiokafka.errors import KafkaError
    from kafka.errors import KafkaError as AdminError

    from stream.errors import StreamError

    # aiokafka logs every fencing as an error, and asyncio what its producer then leaves behind; here it is how one command
    # waits for another or ends it. What fails is told in words of ours.
    for name in ("aiokafka", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return asyncio.run(doing)
    except (KafkaError, AdminError, OSError) as error:
        raise StreamError(
            f"Kafka at {settings.kafka.bootstrap_servers}: expected an answer about {about}, found {error!r}. Is it running? "
            "`headrace kafka status` for a local one; another address: HEADRACE_KAFKA__BOOTSTRAP_SERVERS."
        ) from error


def who() -> str:
    """Who runs the command, as the logs keep it: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def own_errors() -> tuple[type[Exception], ...]:
    """The roots of every room's errors: what is written for people, shown without a traceback."""
    from deploy.errors import DeployError
    from headrace.errors import HeadraceError
    from model.errors import ModelError
    from state.errors import StateError
    from stream.errors import StreamError

    return DeployError, HeadraceError, ModelError, StateError, StreamError


def format_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--format text|json` as the argument `output`."""
    return click.option(
        "--format", "output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Output format."
    )(function)


def echo_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2 if on_terminal() else 0).decode())


def on_terminal() -> bool:
    """Whether people are looking: progress bars and colours only then."""
    return sys.stdout.isatty()
