"""What the commands share: errors, output in text or JSON, progress."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click
import msgspec

__all__ = ["echo_json", "format_option", "on_terminal", "own_errors"]


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
