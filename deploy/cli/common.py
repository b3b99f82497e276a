"""What the commands share: requests to Kafka with their errors, output in text or JSON, who runs them."""

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

__all__ = [
    "ask_kafka",
    "await_kafka",
    "echo_document",
    "echo_json",
    "format_option",
    "model_option",
    "on_named_track",
    "on_terminal",
    "quiet_clients",
    "track_option",
    "who",
    "with_model",
    "with_track",
]

T = TypeVar("T")


def ask_kafka(settings: Settings, doing: Coroutine[Any, Any, T], about: str) -> T:
    """Run a coroutine once Kafka can be reached, and return its result.

    Args:
        about: what is asked for, for the error's text.

    Raises:
        StreamError: Kafka can't be reached, or doesn't answer.
    """
    from aiokafka.errors import KafkaError
    from kafka.errors import KafkaError as AdminError

    from stream.kafka.clients import unreachable
    from stream.kafka.reach import reach

    async def ask() -> T:
        try:
            await reach(settings.kafka)
            return await doing
        finally:
            doing.close()  # it has not begun where Kafka can't be reached

    try:
        return asyncio.run(ask())
    except (KafkaError, AdminError, TimeoutError, ConnectionError) as error:
        raise unreachable(settings.kafka, f"an answer about {about}", error) from error


def await_kafka(settings: Settings) -> None:
    """Return once Kafka can be reached; for commands that don't use `ask_kafka`. Raises NoAnswer."""
    from stream.kafka.reach import reach

    asyncio.run(reach(settings.kafka))


def quiet_clients() -> None:
    """Silence the client libraries' logs: a command reports its errors itself.

    aiokafka logs every fencing as an error, and asyncio logs what aiokafka's producer then leaves behind. In a command, fencing
    is no error: it is how one command waits for another, or ends it. Workers set up their own logs (`deploy.logs`).
    """
    for name in ("aiokafka", "asyncio", "kafka"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def who() -> str:
    """Who runs the command, as the registry and receipts keep it: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def format_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--format text|json` as the argument `output`."""
    return click.option(
        "--format", "output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Output format."
    )(function)


def model_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--model NAME` as the argument `model`, None without it; for `with_model`."""
    return click.option(
        "--model",
        metavar="NAME",
        callback=_known_model,
        help="Which model to learn, instead of model.name: deepfm, lr, fm, fnn, ipnn, opnn, pnn or wide_deep.",
    )(function)


def _known_model(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    from typing import get_args

    from model.settings import ModelName  # here, since it takes long to import, and most commands don't need it

    if name is not None and name not in get_args(ModelName):
        raise click.BadParameter(f"expected one of {', '.join(get_args(ModelName))}, found {name!r}.")
    return name


def with_model(settings: Settings, name: str | None) -> Settings:
    """The settings with `model.name` replaced, if a name is given."""
    if name is None:
        return settings
    return settings.model_copy(update={"model": settings.model.model_copy(update={"name": name})})


_TRACK = "headrace.track"  # where the name that --track gives is kept, for the command and those below it


def track_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--track NAME`, which `with_track` reads."""
    return click.option(
        "--track",
        metavar="NAME",
        expose_value=False,
        callback=_note_track,
        help="The track: `main`, or a challenger's name. Instead of snapshots.track.",
    )(function)


def _note_track(context: click.Context, parameter: click.Parameter, name: str | None) -> None:
    from state.tracks import TRACK_NAME

    if name is None:
        return
    if not TRACK_NAME.fullmatch(name):
        raise click.BadParameter(
            f"expected a lowercase letter, then at most 30 lowercase letters, digits or dashes, found {name!r}."
        )
    context.meta[_TRACK] = name


def with_track(settings: Settings) -> Settings:
    """The settings with `snapshots.track` replaced, if --track names one."""
    name = click.get_current_context().meta.get(_TRACK)
    return settings if name is None else settings.model_copy(update={"snapshots": settings.snapshots.on_track(name)})


def on_named_track(command: str) -> str:
    """A command of `headrace snapshot`, with the track that --track names."""
    name = click.get_current_context().meta.get(_TRACK)
    return command if name is None else command.replace("headrace snapshot ", f"headrace snapshot --track {name} ", 1)


def echo_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    echo_document(msgspec.json.format(msgspec.json.encode(value), indent=2 if on_terminal() else 0))


def echo_document(text: bytes | str) -> None:
    """Print a document for machines (JSON, TOML) in UTF-8, whatever the terminal's encoding is."""
    click.echo(text if isinstance(text, bytes) else text.encode())


def on_terminal() -> bool:
    """Whether the output goes to a terminal: progress bars and colours only then."""
    return sys.stdout.isatty()
