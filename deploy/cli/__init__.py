"""The command `headrace`: nouns and verbs, each loaded when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

import click

from deploy.cli.common import quiet_clients
from deploy.cli.failures import telling
from deploy.cli.standard_streams import prepare

__all__ = ["cli", "console", "main"]

# command → module:attribute. Importing this package imports none of them, so `headrace --help` needs neither torch nor Faust.
COMMANDS = {
    "config": "deploy.cli.config:config",
    "data": "deploy.cli.data:data",
    "dead-letters": "deploy.cli.dead_letters:dead_letters",
    "demo": "deploy.cli.demo:demo",
    "doctor": "deploy.cli.doctor:doctor",
    "kafka": "deploy.cli.kafka:kafka",
    "replay": "deploy.cli.replay:replay",
    "run": "deploy.cli.run:run",
    "scores": "deploy.cli.scores:scores",
    "simulate": "deploy.cli.simulate:simulate",
    "snapshot": "deploy.cli.snapshot:snapshot",
    "topics": "deploy.cli.topics:topics",
    "watermarks": "deploy.cli.watermarks:watermarks",
}


class LazyGroup(click.Group):
    """A group whose commands are imported on first use, and whose errors all end as one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with telling():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with telling(ctx):
            return super().invoke(ctx)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="headrace")
def cli() -> None:
    """Online learning from a stream: Kafka in, fresh click predictions out, one command to go back.

    \b
    Examples:
      headrace kafka start                        run a local Apache Kafka
      headrace topics create                      make the eight topics
      headrace run join                           start a join worker (also: trainer, scorer)
      headrace replay kuairand --speed 1000       feed real impressions
      headrace snapshot rollback                  put the last good model back
    """
    quiet_clients()


def console() -> Any:
    """Run the command line as the process that it is: see `deploy.cli.standard_streams`."""
    prepare()
    return main()


def main(argv: list[str] | None = None) -> Any:
    """Run the command line and end the process; every error is one line on stderr (`deploy.cli.failures`)."""
    return cli.main(args=argv, prog_name="headrace", standalone_mode=True)
